"""attention's launch choices: no cut of the work, TMA copy or place of RoPE changes a result."""

import itertools

import pytest
import torch
from attention_cases import (
    DEVICE,
    DTYPES,
    bounds,
    compare,
    make,
    runs_kernel,
    small_tiles,
    table,
)
from parity import assert_within_budget, outputs_and_gradients

import neobert_kernels as nk
from neobert_kernels import _runtime
from neobert_kernels._triton import tl, triton
from neobert_kernels.ops.attention import tiles
from neobert_kernels.ops.attention.device import locate


def sm_of_device():
    """The interpreter has TMA as well."""
    return _runtime.generation(torch.empty(0, device=DEVICE)) if DEVICE.type == "cuda" else 90


@runs_kernel
@pytest.mark.parametrize(("dim", "interleaved"), [(24, True), (32, False)], ids=str)
def test_ropes_place_changes_rounding_at_most(interleaved, dim, monkeypatch):
    qkv, cu_seqlens, longest = make((37, 3), torch.float16, dim=dim)
    cos, sin = table((37, 3), dim)
    results = []
    for inside in (True, False):
        monkeypatch.setattr(tiles, "choose", lambda *_, inside=inside: small_tiles(inside))
        results.append(
            outputs_and_gradients(
                lambda *qkv: nk.attention(
                    *qkv, cu_seqlens, longest, cos=cos, sin=sin, interleaved=interleaved
                ),
                qkv,
                [torch.ones_like(qkv[0])],
            )
        )
    # A last bit may differ where sums of 16 channels are cut elsewhere.
    for a, b in zip(*results, strict=True):
        assert_within_budget(a, b, b.double())


@runs_kernel
@pytest.mark.parametrize("specialized", [False, True], ids=["same warps", "specialized"])
@pytest.mark.parametrize(
    "options", [{"dim": 16, "rope": True}, {"dim": 96}, {"window": 3}], ids=str
)
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # numpy's
def test_bulk_copies_change_no_bit(options, specialized, monkeypatch, request):
    """TMA descriptors end with the document, whose neighbour is NaN; a spare program reads none."""
    if sm_of_device() < 90:
        pytest.skip("needs TMA")
    options, dtype = dict(options), torch.float16
    dim, lengths = options.pop("dim", 32), (37, 0, 32, 3, 0)
    if specialized and dim == 96 and not _runtime.INTERPRET:
        reason = "rows in two parts: other bits on an H200, Triton 3.6; no call chooses it"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    qkv, cu_seqlens, longest = make(lengths, dtype, dim=dim)
    for x in qkv:
        x[37:69] = torch.nan
    if options.pop("rope", False):
        options["cos"], options["sin"] = table(lengths, dim)
    outs = []
    for bulk in (False, True):
        choice = small_tiles(False)
        tile = tiles.Tile(64, 16, 4, 2, tma=bulk, specialized=bulk and specialized)
        forced = tiles.Tiles(tile, choice.dq, choice.dkv, False, False, choice.search)
        monkeypatch.setattr(tiles, "choose", lambda *_, forced=forced: forced)
        outs.append(nk.attention(*qkv, cu_seqlens, longest, **options))
    assert torch.equal(*(out.nan_to_num(7.0) for out in outs))
    assert not outs[1][[*range(37), *range(69, 72)]].isnan().any()


@runs_kernel
def test_a_users_allocator_stays(monkeypatch):
    allocation = pytest.importorskip("triton.runtime._allocation")
    before = allocation._allocator.get()
    tile = tiles.Tile(32, 16, 4, 1, tma=sm_of_device() >= 90)
    forced = tiles.Tiles(tile, tile, tile, False, False)
    monkeypatch.setattr(tiles, "choose", lambda *_: forced)
    (q, k, v), cu_seqlens, longest = make((20,))
    nk.attention(q, k, v, cu_seqlens, longest)
    assert allocation._allocator.get() is before


@runs_kernel
def test_views_off_16_bytes_are_told_apart(monkeypatch):
    seen = []

    def spy(D, dtype, sm, longest, aligned):
        seen.append(aligned)
        return small_tiles(True)

    monkeypatch.setattr(tiles, "choose", spy)
    flat = torch.randn(3 * 40 * 16 + 1, device=DEVICE)
    for shift in (0, 1):
        q, k, v = flat[shift : shift + 3 * 40 * 16].view(3, 20, 2, 16)
        nk.attention(q, k, v, bounds((20,)), 20)
    assert seen == [True, False]


@pytest.mark.parametrize("longest", [64, 65, 300])
def test_production_tiles_around_their_edges(longest):
    if _runtime.INTERPRET and longest == 300:
        compare((300,), torch.float16, heads=1, rope=True, interleaved=True)
    else:
        compare((longest - 1, 1, longest, 0, 63), torch.float16, heads=1, rope=True)


@triton.jit
def _map_kernel(cu_seqlens_ptr, first_ptr, documents, BLOCK: tl.constexpr, SEARCH: tl.constexpr):
    slot = tl.program_id(0)
    start, length, first = locate(cu_seqlens_ptr, documents, slot, BLOCK, SEARCH)
    tl.store(first_ptr + slot, tl.where(first < length, start + first, -1))


@runs_kernel
@pytest.mark.parametrize(
    "lengths",
    [(), (0,), (1,), (32,), (33,), (0, 0, 5, 0), (31, 1, 32, 64, 65, 0), (200, *range(40)),
     tuple(i % 3 for i in range(90))],
    ids=lambda lengths: str(len(lengths)),
)  # fmt: skip
def test_every_tile_has_one_program_and_no_document_more_than_one_to_spare(lengths):
    cu_seqlens, block = bounds(lengths), 32
    slots = sum(lengths) // block + len(lengths)
    first = torch.full((slots + 1,), -2, dtype=torch.int64, device=DEVICE)
    if slots:
        _map_kernel[(slots,)](cu_seqlens, first, len(lengths), BLOCK=block, SEARCH=16)
    starts = cu_seqlens.tolist()
    tiles_of = [range(a, b, block) for a, b in itertools.pairwise(starts)]
    assert [s for s in first.tolist()[:-1] if s >= 0] == [at for r in tiles_of for at in r]
    needed = sum(map(len, tiles_of))
    assert needed <= slots <= needed + len(lengths)


SHAPES = [(D, dtype, sm) for D in (32, 64, 96, 128) for dtype in DTYPES for sm in (80, 90, 100)]


@pytest.mark.parametrize(("D", "dtype", "sm"), SHAPES, ids=str)
def test_the_order_of_sums_does_not_depend_on_the_longest_document(D, dtype, sm):
    inner = {
        tuple(t.inner for t in (c.forward, c.dq, c.dkv))
        for c in (
            tiles.choose(D, dtype, sm, n, a)
            for n in (1, 64, 65, 256, 257, 1 << 20)
            for a in (False, True)
        )
    }
    assert len(inner) == 1


@pytest.mark.parametrize("D", range(8, 129, 8))
def test_columns_cover_a_row_in_tensor_core_widths(D):
    for c, needed in ((tiles.columns(D), D), (tiles.halves(D), 2 * (D // 2))):
        assert c.first + c.second >= needed
        assert all(part in (16, 32, 64, 128) for part in (c.first, c.second) if part)
    assert tiles.halves(D).first >= D // 2
    plain = tiles.columns(D)
    assert D <= 16 or plain.first + plain.second <= triton.next_power_of_2(D)
    assert plain.first + plain.second == 96 or D != 96
