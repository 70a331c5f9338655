"""F.linear's numbers, and a row's bits that depend on that row and the weights alone."""

import pytest
import torch
from covering import covering, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_within_budget, long_sums

import neobert_kernels as nk
from neobert_kernels import _runtime
from neobert_kernels.ops import linear as module

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CHOICE = module.choice
runs_kernel = pytest.mark.skipif(
    not CUDA and not _runtime.INTERPRET, reason="no kernel runs on the CPU"
)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """In the interpreter: a few rows have several blocks, groups and edges."""
    if _runtime.INTERPRET:
        tile = module.Choice(16, 32, 16, 1, 1, group=2)
        monkeypatch.setattr(module, "choice", lambda itemsize, sm: tile)


def make(M, N, K, dtype=torch.float32, bias=True):
    x, weight, vector = (torch.randn(n, K, device=DEVICE).to(dtype) for n in (M, N, N))
    return x, weight, vector[:, 0].contiguous() if bias else None


def compare(x, weight, bias):
    def wide(value):
        return None if value is None else value.double()

    reference = nk.batch_invariant_linear_reference
    exact = reference(wide(x), wide(weight), wide(bias))
    actual = nk.batch_invariant_linear(x, weight, bias)
    assert_within_budget(actual, reference(x, weight, bias), exact, ulps=long_sums(x.dtype))
    return actual


@pytest.mark.parametrize("bias", [True, False])
def test_reference_is_torchs_linear(bias):
    x, weight, vector = make(7, 5, 9, torch.float64, bias)
    found = nk.batch_invariant_linear_reference(x, weight, vector)
    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, vector))


@covering(
    shape=[(1, 1, 1), (33, 65, 40), (16, 32, 16), (70, 2, 17), (5, 130, 96)],
    dtype=DTYPES,
    bias=[True, False],
)
def test_tiles_and_their_edges(shape, dtype, bias):
    compare(*make(*shape, dtype, bias))


@pytest.mark.parametrize(("K", "dtype"), list(zip((760, 768, 1152), DTYPES, strict=True)), ids=str)
def test_common_widths(K, dtype):
    compare(*make(5, 40, K, dtype))


@settings(max_examples=examples(12), deadline=None, derandomize=True)
@given(M=st.integers(0, 50), N=st.integers(1, 80), K=st.integers(1, 70), i=st.integers(0, 2))
def test_any_shape(M, N, K, i):
    torch.manual_seed(0)
    compare(*make(M, N, K, DTYPES[i], bias=bool(K % 2)))


def test_the_bias_is_added_before_the_rounding():
    """256.5 is no bfloat16: rounded first, nothing would be left."""
    rows = ([[256.0, 0.5]], [[1.0, 1.0]], [-256.0])
    y = nk.batch_invariant_linear(*(torch.tensor(v, device=DEVICE).bfloat16() for v in rows))
    assert y.tolist() == [[0.5]]


@runs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [40, 100])
def test_a_row_has_its_bits_in_any_batch(K, dtype, ordered_products):
    """Alone, among any number of others, at any place, and whatever these are."""
    x, weight, bias = make(300 if CUDA else 40, 70, K, dtype)
    expected = nk.batch_invariant_linear(x, weight, bias)
    for i in range(0, len(x), 1 if CUDA else 5):
        assert torch.equal(nk.batch_invariant_linear(x[i : i + 1], weight, bias)[0], expected[i])
    generator = torch.Generator().manual_seed(0)
    for _ in range(examples(200 if CUDA else 12)):
        count = int(torch.randint(1, 400 if CUDA else 60, (), generator=generator))
        places = torch.randint(len(x), (count,), generator=generator).to(DEVICE)
        found = nk.batch_invariant_linear(x[places], weight, bias)
        assert torch.equal(found, expected[places])
    others = torch.where(torch.arange(len(x), device=DEVICE)[:, None] == 17, x, torch.nan)
    assert torch.equal(nk.batch_invariant_linear(others, weight, bias)[17], expected[17])


@runs_kernel
def test_a_column_has_its_bits_beside_any_others(ordered_products):
    """Products of stacked weights are those of each: q, k and v in one, or one by one."""
    x, weight, bias = make(20, 100, 50)
    whole = nk.batch_invariant_linear(x, weight, bias)
    parts = [
        nk.batch_invariant_linear(x, w, b)
        for w, b in zip(weight.split(37), bias.split(37), strict=True)
    ]
    assert torch.equal(whole, torch.cat(parts, 1))


VIEWS = {
    "transposed": lambda x: x.t().contiguous().t(),
    "every second channel": lambda x: torch.stack([x, x], -1).flatten(1)[:, ::2],
    "every second row": lambda x: torch.stack([x, x], 1).flatten(0, 1)[::2],
    "slice of wider rows": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
}


@covering(view=VIEWS, of=["x", "weight"], dtype=[torch.float32, torch.bfloat16])
def test_strided(view, of, dtype):
    x, weight, bias = make(20, 40, 24, dtype)
    expected = nk.batch_invariant_linear(x, weight, bias)
    if of == "x":
        x = VIEWS[view](x)
    else:
        weight = VIEWS[view](weight)
    assert torch.equal(compare(x, weight, bias), expected)


def test_leading_dimensions_and_no_rows():
    x, weight, bias = make(24, 5, 8)
    expected = nk.batch_invariant_linear(x, weight, bias)
    found = nk.batch_invariant_linear(x.view(2, 3, 4, 8), weight, bias)
    assert torch.equal(found, expected.view(2, 3, 4, 5))
    assert nk.batch_invariant_linear(x[:0], weight, bias).shape == (0, 5)
    assert nk.batch_invariant_linear(x[0], weight, bias).shape == (5,)


@runs_kernel
def test_nothing_is_written_behind_the_result(monkeypatch):
    x, weight, bias = make(19, 37, 20)
    expected = nk.batch_invariant_linear(x, weight, bias)
    behind = torch.full((19 * 37 + 2048,), 7.0, device=DEVICE)
    monkeypatch.setattr(module, "_fake", lambda *arguments: behind)
    module._launch(x, weight, bias)
    assert torch.equal(behind[: 19 * 37].view(19, 37), expected)
    assert (behind[19 * 37 :] == 7).all()


@runs_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_registration(dtype):
    x, weight, bias = make(6, 12, 20, dtype)
    for arguments in ((x, weight, bias), (x.view(2, 3, 20), weight, None)):
        torch.library.opcheck(module._forward, arguments)


def test_compiles_to_one_graph():
    torch.compiler.reset()
    x, weight, bias = make(9, 12, 20)
    compiled = torch.compile(nk.batch_invariant_linear, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found = compiled(x, weight, bias)
    assert torch.equal(found, nk.batch_invariant_linear(x, weight, bias))


@pytest.mark.parametrize("sm", [80, 86, 89, 90, 100, 103, 120, 121])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_fit_every_generation(itemsize, sm):
    """96 KiB of shared memory is what a program may use everywhere."""
    tile = CHOICE(itemsize, sm)
    assert (tile.m + tile.n) * tile.k * itemsize * tile.stages <= 96 << 10
    assert all(size % 16 == 0 for size in (tile.m, tile.n, tile.k))


@pytest.mark.skipif(not CUDA, reason="needs a GPU's memory")
def test_more_than_two_to_the_31_elements():
    weight = torch.randn(4096, 16, device=DEVICE, dtype=torch.bfloat16)
    x = torch.randn(2**31 // 4096 + 3, 16, device=DEVICE, dtype=torch.bfloat16)
    y = nk.batch_invariant_linear(x, weight)
    assert torch.equal(y[-2:], nk.batch_invariant_linear(x[-2:], weight))


@pytest.mark.parametrize("which", ["x", "weight", "bias"])
def test_a_gradient_is_refused(which):
    tensors = dict(zip(("x", "weight", "bias"), make(2, 3, 4), strict=True))
    tensors[which].requires_grad_()
    with pytest.raises(ValueError, match=rf"^{which}: expected no gradient to record \(.*, got "):
        nk.batch_invariant_linear(**tensors)
    with torch.no_grad():
        expected = nk.batch_invariant_linear(**tensors)
    assert not expected.requires_grad
    with torch.inference_mode():
        assert torch.equal(nk.batch_invariant_linear(**tensors), expected)


@pytest.mark.parametrize(
    ("x", "weight", "bias", "message"),
    [
        ([1.0], torch.ones(2, 3), None, "x: expected a torch.Tensor, got list"),
        (torch.tensor(1.0), torch.ones(2, 3), None, "x: expected at least 1 dimension"),
        (torch.ones(2).double(), torch.ones(2, 2), None, "x: expected dtype float32 or float16"),
        (torch.ones(2, 0), torch.ones(2, 0), None, "x: expected at least one channel, got 0"),
        (torch.ones(2), torch.ones(2), None, r"weight: expected 2 dimensions, got shape \(2,\)"),
        (torch.ones(2), torch.ones(3, 2).half(), None, "weight: expected dtype float32, got fl"),
        (torch.ones(2), torch.ones(3, 4), None, r"weight: expected shape \(N, 2\), got \(3, 4\)"),
        (torch.ones(2), torch.ones(0, 2), None, r"weight: expected shape \(N, 2\), got \(0, 2\)"),
        (torch.ones(2), torch.ones(3, 2, device="meta"), None, "weight: expected device cpu, got"),
        (torch.ones(2), torch.ones(3, 2), torch.ones(2), r"bias: expected shape \(3,\), got"),
        (torch.ones(2), torch.ones(3, 2), torch.ones(3).half(), "bias: expected dtype float32, go"),
        (torch.ones(2), torch.ones(3, 2), 1.0, "bias: expected a torch.Tensor, got float"),
    ],
)
def test_rejects(x, weight, bias, message):
    with pytest.raises(ValueError, match=message):
        nk.batch_invariant_linear(x, weight, bias)
