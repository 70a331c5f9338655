"""attention: the meaning stated with one dense mask, and what must hold whatever the kernel.

One file, three runs: CPU reference, Triton interpreter, GPU. test_attention_tiles.py has what is
about the kernels' cuts.
"""

import itertools

import pytest
import torch
from attention_cases import (
    DEVICE,
    DTYPES,
    bounds,
    compare,
    dense,
    every_dtype,
    make,
    runs_kernel,
    table,
)
from covering import covering, examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import assert_parity, assert_within_budget, outputs_and_gradients
from torch.utils._python_dispatch import TorchDispatchMode

import neobert_kernels as nk
from neobert_kernels import _runtime
from neobert_kernels.ops import attention as module
from neobert_kernels.ops.attention.reference import attention_reference_backward

pytestmark = pytest.mark.usefixtures("small_tiles")
# For tiles of 32 by 16 and a search by fours: tails, a second tile, a document behind the first
# vector of boundaries, empty ones inside and at the end.
LENGTHS = (5, 1, 0, 33, 0, 18, 0)
on_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")


VARIANTS = {
    "plain": {},
    "half-split": {"rope": True},
    "interleaved": {"rope": True, "interleaved": True},
    "grouped": {"heads": 4, "groups": 2, "rope": True},
    "window": {"window": 3, "rope": True},
    "wide window": {"window": 21},
    "scale": {"scale": 0.3},
}


# What the dtype changes, the products' rounding, is the same in every variant.
HALVES = {"half-split": torch.float16, "grouped": torch.bfloat16, "window": torch.float16}


@pytest.mark.parametrize("variant", VARIANTS)
@every_dtype
def test_matches_the_dense_mask_with_every_gradient(variant, dtype):
    if _runtime.INTERPRET and dtype not in (torch.float32, HALVES.get(variant)):
        pytest.skip("one kind of 16 bits in three variants is enough in the interpreter")
    compare(LENGTHS, dtype, **VARIANTS[variant])


@covering(inside=[False, True], interleaved=[False, True], dtype=DTYPES)
def test_rope_in_either_place_matches_the_dense_mask(inside, interleaved, dtype, place_rope):
    place_rope(inside)
    compare((37, 3), dtype, heads=2, groups=1, rope=True, interleaved=interleaved)


@pytest.mark.parametrize("dim", range(8, 129, 8))
def test_every_head_size(dim, turn_inside):
    if _runtime.INTERPRET and (dim not in (8, 24, 40, 80, 96, 128) or turn_inside == (dim > 40)):
        pytest.skip("one of each kind is enough in the interpreter")
    compare((17, 3), torch.float32, heads=1, dim=dim, rope=True, interleaved=dim % 16 == 0)


@pytest.mark.parametrize("dim", [72, 96])
def test_plain_rows_in_two_parts(dim):
    compare((17, 3), torch.float32, heads=1, dim=dim)


@pytest.mark.skipif(_runtime.INTERPRET, reason="takes minutes there")
@pytest.mark.parametrize("window", [None, 64])
@every_dtype
def test_longer_documents(dtype, window):
    compare((511, 512, 1, 0, 513), dtype, dim=64, rope=True, window=window)


@settings(
    deadline=None, max_examples=examples(16), derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
@given(st.lists(st.integers(0, 40), max_size=7), st.sampled_from([None, 1, 2, 20]))
def test_any_ragged_batch_matches_the_dense_mask(lengths, window):
    compare([*lengths, 5], torch.float32, heads=1, dim=8, window=window)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # numpy's
def test_a_document_depends_on_no_other():
    """Not even on its NaNs: neither outputs nor gradients change by one bit."""
    qkv, cu_seqlens, longest = make(LENGTHS)
    touched = slice(int(cu_seqlens[3]), int(cu_seqlens[4]))
    grad = [torch.randn_like(qkv[0])]

    def op(*qkv):
        return nk.attention(*qkv, cu_seqlens, longest)

    before = outputs_and_gradients(op, qkv, grad)
    for x in qkv:
        x[touched] = torch.nan
    after = outputs_and_gradients(op, qkv, grad)
    keep = torch.ones(len(qkv[0]), dtype=torch.bool, device=DEVICE)
    keep[touched] = False
    for b, a in zip(before, after, strict=True):
        assert torch.equal(b[keep], a[keep])
        assert a[touched].isnan().all()


@pytest.mark.parametrize("window", [None, 4])
def test_a_document_alone_gives_the_same_bits_as_packed(window):
    """Also in its gradients. The longest document differs, so launch choices may."""
    (q, k, v), cu_seqlens, longest = make(LENGTHS)
    grad = torch.randn_like(q)

    def both(q, k, v, grad, cu_seqlens, longest):
        return outputs_and_gradients(
            lambda *qkv: nk.attention(*qkv, cu_seqlens, longest, window=window), [q, k, v], [grad]
        )

    packed = both(q, k, v, grad, cu_seqlens, longest)
    for low, high in itertools.pairwise(cu_seqlens.tolist()):
        n = high - low
        if n:
            rows = slice(low, high)
            alone = both(q[rows], k[rows], v[rows], grad[rows], bounds([n]), n)
            assert all(torch.equal(p[rows], a) for p, a in zip(packed, alone, strict=True))


def test_padding_and_packing_change_nothing():
    """Documents of one length, each followed by padding that is a document of its own."""
    lengths = (7, 20, 13)
    (q, k, v), cu_seqlens, longest = make(lengths)
    packed = nk.attention(q, k, v, cu_seqlens, longest)
    pieces = list(zip(*(x.split(lengths) for x in (q, k, v)), strict=True))
    padded = [
        torch.cat([torch.cat([piece[i], torch.ones(20 - len(piece[i]), 2, 16, device=DEVICE)])
                   for piece in pieces])
        for i in range(3)
    ]  # fmt: skip
    split = bounds([n for length in lengths for n in (length, 20 - length)])
    out = nk.attention(*padded, split, 20).split(20)
    assert torch.equal(packed, torch.cat([o[:n] for o, n in zip(out, lengths, strict=True)]))


@pytest.mark.parametrize(("window", "as_if"), [(0, "identity"), (63, None), (2**40, None)])
def test_window_edges(window, as_if):
    (q, k, v), cu_seqlens, longest = make((64, 7))
    out = nk.attention(q, k, v, cu_seqlens, longest, window=window)
    expected = v if as_if else nk.attention(q, k, v, cu_seqlens, longest)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("window", [3, 15, 16])
def test_the_window_is_inclusive(window):
    (q, k, v), cu_seqlens, longest = make((40,))
    before = nk.attention(q, k, v, cu_seqlens, longest, window=window)
    v[0] += 1.0
    after = nk.attention(q, k, v, cu_seqlens, longest, window=window)
    changed = (after != before).flatten(1).any(1)
    assert changed.tolist() == [i <= window for i in range(40)]


def test_only_relative_positions_count(turn_inside):
    (q, k, v), cu_seqlens, longest = make((40,))
    near, far = (nk.rope_table(torch.arange(40, device=DEVICE) + s, 16) for s in (0, 1000))
    a, b = (nk.attention(q, k, v, cu_seqlens, longest, cos=c, sin=s) for c, s in (near, far))
    # The angles of position 1,000 carry 1,000 times the rounding of those of position 1.
    torch.testing.assert_close(a, b, rtol=0, atol=1000 * torch.finfo(torch.float32).eps)


def test_grouped_heads_are_repeated_heads():
    (q, k, v), cu_seqlens, longest = make(LENGTHS, heads=4, groups=2)
    repeated = [x.repeat_interleave(2, dim=1) for x in (k, v)]
    grouped = nk.attention(q, k, v, cu_seqlens, longest)
    assert torch.equal(grouped, nk.attention(q, *repeated, cu_seqlens, longest))


# In the rows of keys past the end, which are not stored.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("window", [None, 3])
def test_huge_scores_stay_finite(sign, window):
    """With sign -1 every score of a row is near -10,000, so 1 / sum(exp(score)) overflows."""
    (q, k, v), cu_seqlens, longest = make((37, 3))
    direction = torch.ones(16, device=DEVICE)
    q, k = (50 * s * (direction + 0.1 * x) for s, x in ((1, q), (sign, k)))
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out = nk.attention(*inputs, cu_seqlens, longest, window=window)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert all(t.isfinite().all() for t in (out, *grads))


@pytest.mark.parametrize("window", [0, 1, 5])
@pytest.mark.parametrize("scale", [2.5, 40.0])
def test_any_scale_with_rows_that_see_nothing_in_their_first_tile(small_tiles, scale, window):
    qkv, cu_seqlens, longest = make((70, 5))
    leaves = [x.requires_grad_() for x in qkv]
    out = nk.attention(*leaves, cu_seqlens, longest, window=window, scale=scale)
    grads = torch.autograd.grad(out.sum(), leaves)
    assert all(grad.isfinite().all() for grad in grads)
    rounded, exact = (
        dense(*(x.detach().to(dtype) for x in qkv), (70, 5), window=window, scale=scale)
        for dtype in (torch.float32, torch.float64)
    )
    assert_within_budget(out.detach(), rounded, exact, ulps=2 * scale)  # a score's last bits


@pytest.mark.parametrize("layout", ["per head", "blocks"])
def test_one_projection_in_any_layout(layout, turn_inside):
    T = sum(LENGTHS)
    flat = torch.randn(T, 2 * 3 * 16, device=DEVICE, requires_grad=True)

    def view(flat):
        blocks = layout == "blocks"
        return flat.view(T, 3, 2, 16).transpose(1, 2) if blocks else flat.view(T, 2, 3, 16)

    cos, sin = table(LENGTHS)
    options = {"cos": cos, "sin": sin, "interleaved": True}
    cu_seqlens, longest = bounds(LENGTHS), max(LENGTHS)
    out = nk.qkv_attention(view(flat), cu_seqlens, longest, **options)
    separate = nk.attention(*view(flat).unbind(2), cu_seqlens, longest, **options)
    assert torch.equal(out, separate)
    dout = torch.randn_like(out)
    (grad,) = torch.autograd.grad(out, flat, dout)
    (expected,) = torch.autograd.grad(separate, flat, dout)
    assert torch.equal(grad, expected)
    assert grad.view(T, -1).any(1).all()


@runs_kernel
def test_the_packed_gradient_has_the_strides_of_the_projection():
    qkv = torch.randn(8, 3, 2, 16, device=DEVICE).transpose(1, 2).requires_grad_()
    out = nk.qkv_attention(qkv, bounds((5, 3)), 5)
    (grad,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert grad.stride() == qkv.stride()


VIEWS = {
    "slices of wider rows": lambda x: x[..., 8:24],
    "heads before tokens": lambda x: x[..., :16].transpose(0, 1).contiguous().transpose(0, 1),
    "every second channel": lambda x: x[..., ::2],
    "channels before heads": lambda x: x[..., :16].transpose(1, 2).contiguous().transpose(1, 2),
}


@pytest.mark.parametrize("view", VIEWS)
def test_strided_views(view):
    """q, k and v are views, and so is the gradient that comes back."""
    qkv, cu_seqlens, longest = make((20, 3), dim=32)

    def strided(fn):
        return lambda *qkv: VIEWS[view](
            torch.cat([fn(*map(VIEWS[view], qkv), cu_seqlens, longest)] * 2, dim=-1)
        )

    assert_parity(strided(nk.attention), strided(nk.attention_reference), qkv)


def test_expanded_gradient():
    qkv, cu_seqlens, longest = make((20, 3))
    assert_parity(
        lambda *qkv: nk.attention(*qkv, cu_seqlens, longest).sum(),
        lambda *qkv: nk.attention_reference(*qkv, cu_seqlens, longest).sum(),
        qkv,
    )


def test_no_documents_and_no_tokens():
    (q, k, v), _, _ = make(())
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for boundaries in (bounds([]), bounds([0, 0])):
        out = nk.attention(*leaves, boundaries, 0)
        assert out.shape == (0, 2, 16)
        grads = torch.autograd.grad(out.sum(), leaves)
        assert [g.shape for g in grads] == [x.shape for x in leaves]


def test_backward_gives_the_same_bits_twice():
    qkv, cu_seqlens, longest = make(LENGTHS, heads=2, groups=1)
    leaves = [x.requires_grad_() for x in qkv]
    out = nk.attention(*leaves, cu_seqlens, longest)
    dout = torch.randn_like(out)
    first = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    for _ in range(1000 if DEVICE.type == "cuda" else 1):
        again = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        assert all(map(torch.equal, first, again))


BLOCKS = (300, 300, 1, 129, 0, 128, 64, 65, 257)  # about the ends of the reference's blocks


@pytest.mark.skipif(_runtime.INTERPRET, reason="about the reference")
@pytest.mark.parametrize("window", [0, 1, 63, 64, 65, 100, 128, 298])
@pytest.mark.parametrize("short", ["in blocks", "whole"])
def test_the_references_blocks_hold_what_a_window_reaches(window, short, monkeypatch):
    """Documents long enough for blocks, and those that are not, at the same lengths."""
    if short == "in blocks":
        monkeypatch.setattr(module.reference, "_short_mask", lambda *_: None)
    qkv, cu_seqlens, longest = make(BLOCKS, torch.float64, heads=4, groups=2, dim=8)
    dout = torch.randn_like(qkv[0])
    options = dict(zip(("cos", "sin"), table(BLOCKS, 8), strict=True), window=window, scale=0.3)

    def reference(*qkv):
        return nk.attention_reference(*qkv, cu_seqlens, longest, **options)

    expected = outputs_and_gradients(lambda *qkv: dense(*qkv, BLOCKS, **options), qkv, [dout])
    actual = outputs_and_gradients(reference, qkv, [dout])
    rest = (cu_seqlens, longest, options["cos"], options["sin"], False, window, 0.3)
    written_out = attention_reference_backward(dout, *qkv, *rest)
    for a, e in zip((*actual, *written_out), (*expected, *expected[1:]), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("step", [1, 2])
def test_rows_of_an_odd_stride_are_rotated(step):
    """Channels that no complex number can view, and those that are not neighbours."""
    (q, k, v), cu_seqlens, longest = make((20, 3))
    wide = torch.zeros(23, 2, 16 * step + 1, device=DEVICE)
    odd = wide[:, :, 1::step]
    odd.copy_(q)
    cos, sin = table((20, 3))
    outs = [
        nk.attention(x, k, v, cu_seqlens, longest, cos=cos, sin=sin, interleaved=True)
        for x in (q, odd)
    ]
    assert torch.equal(*outs)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.skipif(_runtime.INTERPRET, reason="about the reference")
def test_the_references_memory_grows_with_the_window():
    qkv, cu_seqlens, longest = make((4000,), heads=1, dim=8)
    rest = (cu_seqlens, longest, None, None, False, 5, 0.3)
    with Largest() as largest:
        leaves = [x.requires_grad_() for x in qkv]
        out = nk.attention_reference(*leaves, cu_seqlens, longest, window=5)
        out.sum().backward()
        attention_reference_backward(torch.ones_like(out), *(x.detach() for x in qkv), *rest)
    assert largest.elements <= 4000 * 8 * 3


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_operator_behind_compile_has_the_same_gradients(variant):
    options = dict(VARIANTS[variant])
    heads, groups = options.pop("heads", 2), options.pop("groups", None)
    qkv, cu_seqlens, longest = make((20, 3), heads=heads, groups=groups)
    if options.pop("rope", False):
        options["cos"], options["sin"] = table((20, 3))
    scale = options.get("scale", 16**-0.5)
    rest = [options.get(name) for name in ("cos", "sin", "interleaved", "window")]
    rest[2] = bool(rest[2])

    def op(*qkv):
        return module._Attention.apply(*qkv, cu_seqlens, longest, *rest, scale)

    assert_parity(
        op, lambda *qkv: nk.attention_reference(*qkv, cu_seqlens, longest, **options), qkv
    )


@pytest.mark.parametrize(
    ("packed", "dynamic"), [(False, True), (True, True), (True, False)], ids=str
)
def test_compiles_to_one_graph_with_its_backward(dynamic, packed):
    torch.compiler.reset()
    op = nk.qkv_attention if packed else nk.attention
    compiled = torch.compile(op, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths in ((5, 3), (4, 9), (20, 1)):
        qkv, cu_seqlens, longest = make(lengths)
        cos, sin = table(lengths)
        leaves = [x.requires_grad_() for x in ([torch.stack(qkv, dim=2)] if packed else qkv)]
        outs = [f(*leaves, cu_seqlens, longest, cos=cos, sin=sin) for f in (compiled, op)]
        torch.testing.assert_close(*outs)
        torch.testing.assert_close(*(torch.autograd.grad(o.square().sum(), leaves) for o in outs))


def test_registration():
    qkv, cu_seqlens, longest = make((5, 3))
    rest = (cu_seqlens, longest, *table((5, 3)), False, 2, 0.5)
    saved = (qkv[0], *module._forward(*qkv, *rest))
    packed = torch.stack(qkv, dim=2)
    torch.library.opcheck(module._forward, (*qkv, *rest))
    torch.library.opcheck(module._backward, (*saved, *qkv, *rest))
    torch.library.opcheck(module._qkv_forward, (packed, *rest))
    for view in (packed, packed.transpose(1, 2).contiguous().transpose(1, 2)):
        torch.library.opcheck(module._qkv_backward, (*saved, view, *rest))


@on_gpu
def test_a_cuda_graph_replays_other_lengths():
    """Slots, not lengths, are in the graph, so one capture serves every batch of its T and B."""
    lengths, others = (100, 30, 70), (10, 150, 40)
    (q, k, v), cu_seqlens, _ = make(lengths, torch.bfloat16, dim=64)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        nk.attention(q, k, v, cu_seqlens, 256)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = nk.attention(q, k, v, cu_seqlens, 256)
    for case in (lengths, others):
        cu_seqlens.copy_(bounds(case))
        graph.replay()
        assert torch.equal(out, nk.attention(q, k, v, bounds(case), 256))


@on_gpu
def test_more_than_two_to_the_31_elements():
    T, H, D = 2**31 // (3 * 12 * 64) + 300, 12, 64
    qkv = torch.randn(T, H, 3, D, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    lengths = [256] * (T // 256) + [T % 256]
    out = nk.qkv_attention(qkv, bounds(lengths), 256)
    (grad,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
    tail = qkv.detach()[-lengths[-1] :]
    ones = [torch.ones(lengths[-1], H, D, device=DEVICE)]

    def reference(x):
        return nk.qkv_attention_reference(x, bounds(lengths[-1:]), 256)

    rounded, exact = (
        outputs_and_gradients(reference, [x], ones) for x in (tail, tail.double())
    )  # fmt: skip
    for actual, r, e in zip((out.detach(), grad), rounded, exact, strict=True):
        assert_within_budget(actual[-lengths[-1] :], r, e)


@runs_kernel
@pytest.mark.parametrize("dim", [4, 12, 136])
def test_rejects_head_sizes_that_no_kernel_has(dim):
    (q, k, v), cu_seqlens, longest = make((3,), dim=dim)
    with pytest.raises(ValueError, match="q: expected a head size that is a multiple of 8, at"):
        nk.attention(q, k, v, cu_seqlens, longest)


Q = torch.ones(3, 4, 8)
CU = torch.tensor([0, 3], dtype=torch.int32)
COS = torch.ones(3, 4)
ARGUMENTS = {"q": Q, "k": Q, "v": Q, "cu_seqlens": CU, "max_seqlen": 3}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": Q[0]}, "q: expected 3 dimensions"),
        ({"q": Q.double()}, "q: expected dtype float32 or float16 or bfloat16, got float64"),
        ({"k": Q.half()}, "k: expected dtype float32, got float16"),
        ({"k": Q[:, :3]}, r"k: expected shape \(3, a divisor of 4, 8\), got \(3, 3, 8\)"),
        ({"v": Q[:, :2]}, r"v: expected shape \(3, 4, 8\)"),
        ({"v": Q.to("meta")}, "v: expected device cpu, got meta"),
        ({"cu_seqlens": CU.long()}, "cu_seqlens: expected dtype int32"),
        ({"cu_seqlens": CU + 1}, "cu_seqlens: expected a first element of 0, got 1"),
        ({"max_seqlen": 2}, r"max_seqlen: expected at least the longest document \(3\), got 2"),
        ({"max_seqlen": 3.0}, "max_seqlen: expected an int of at least 0, got 3.0"),
        ({"cos": COS}, "sin: expected both of cos and sin, or neither, got None"),
        ({"cos": COS, "sin": COS.half()}, "sin: expected dtype float32, got float16"),
        ({"cos": COS[:2], "sin": COS}, r"cos: expected shape \(3, 4\), got \(2, 4\)"),
        ({"window": -1}, "window: expected None or a radius of at least 0, got -1"),
        ({"window": True}, "window: expected None or a radius of at least 0, got True"),
        ({"scale": 0.0}, "scale: expected a finite number over 0, got 0"),
        ({"interleaved": "no"}, "interleaved: expected True or False, got 'no'"),
        (
            {"cos": COS.clone().requires_grad_(), "sin": COS},
            "cos: expected a table without gradient, got one that requires it",
        ),
    ],
)
def test_rejects(changes, message):
    with pytest.raises(ValueError, match=message):
        nk.attention(**(ARGUMENTS | changes))


def test_rejects_a_projection_without_three_slices():
    with pytest.raises(ValueError, match=r"qkv: expected shape \(T, H, 3, D\), got"):
        nk.qkv_attention(torch.ones(3, 4, 2, 8), CU, 3)
