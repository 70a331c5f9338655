"""mean_pool and first_pool against loops over the documents."""

import pytest
import torch
from covering import covering, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_parity, assert_within_budget, outputs_and_gradients
from torch.nn import functional as F

import neobert_kernels as nk
from neobert_kernels import _runtime
from neobert_kernels.ops import pooling as module

CUDA = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

LENGTHS = (3, 0, 1, 7, 0)
PART = 16  # small, so that short documents already have several


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(module, "PART", PART)


def make(dtype, device, lengths=LENGTHS, C=5):
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    return torch.randn(sum(lengths), C, device=device).to(dtype), bounds.to(device)


def mean_by_hand(x, lengths=LENGTHS):
    return torch.stack([d.sum(0) / max(len(d), 1) for d in x.split(lengths)])


def first_by_hand(x, lengths=LENGTHS):
    return torch.stack([d[0] if len(d) else torch.zeros_like(x[0]) for d in x.split(lengths)])


POOLS = [
    (nk.mean_pool, nk.mean_pool_reference, mean_by_hand),
    (nk.first_pool, nk.first_pool_reference, first_by_hand),
]
pools = pytest.mark.parametrize(("op", "reference", "by_hand"), POOLS, ids=["mean", "first"])


@pools
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_matches_a_loop_over_documents(op, reference, by_hand, dtype, device):
    x, cu_seqlens = make(dtype, device)
    exact = by_hand(x.double())
    assert_within_budget(op(x, cu_seqlens), exact.to(dtype), exact, ulps=2)
    assert_parity(op, reference, [x, cu_seqlens])


def test_16_bit_means_are_summed_in_float32(device, monkeypatch):
    monkeypatch.undo()  # the part that users get
    assert module.PART != PART
    x, cu_seqlens = make(torch.float16, device, lengths=(2000,))
    exact = mean_by_hand((x.abs() + 1).double(), (2000,))
    mean = nk.mean_pool(x.abs() + 1, cu_seqlens)
    assert_within_budget(mean, exact.to(torch.float16), exact, ulps=0)


@pools
def test_gradients_match_a_loop_over_documents(op, reference, by_hand, device):
    x, cu_seqlens = make(torch.float32, device)
    x.requires_grad_()
    dy = torch.randn(len(LENGTHS), 5, device=device)
    (grad,) = torch.autograd.grad(op(x, cu_seqlens), x, dy)
    wide = x.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(by_hand(wide), wide, dy.double())
    assert_within_budget(grad, exact.float(), exact)


@pools
def test_empty_documents_give_zeros(op, reference, by_hand, device):
    x, cu_seqlens = make(torch.float32, device)
    y = op(x, cu_seqlens)
    assert not y[[1, 4]].any()
    nothing = torch.zeros(4, dtype=torch.int32, device=device)
    assert torch.equal(op(x[:0], nothing), torch.zeros(3, 5, device=device))
    assert op(x[:0], nothing[:1]).shape == (0, 5)


@pools
def test_a_document_depends_on_no_other(op, reference, by_hand, device):
    x, cu_seqlens = make(torch.float32, device)
    before = op(x, cu_seqlens)
    x[4:] += 1.0
    after = op(x, cu_seqlens)
    assert torch.equal(before[:3], after[:3])
    assert not torch.equal(before[3], after[3])


@pools
def test_compiles_to_one_graph(op, reference, by_hand, device):
    x, cu_seqlens = make(torch.float32, device)
    x.requires_grad_()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, cu_seqlens), op(x, cu_seqlens))


normalized = pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
runs_kernel = pytest.mark.skipif(
    not CUDA and not _runtime.INTERPRET, reason="no kernel runs on the CPU"
)
MIXED = (1, PART - 1, 0, PART, 0, PART + 1, 10, 3 * PART, 2 * PART + 7, 0)


def compare(op, reference, x, cu_seqlens, normalize):
    assert_parity(
        lambda x: op(x, cu_seqlens, normalize), lambda x: reference(x, cu_seqlens, normalize), [x]
    )


@covering(mean=[False, True], normalize=[False, True], dtype=DTYPES, C=[5, 384, 768, 1152])
def test_long_and_short_documents(mean, normalize, dtype, C, device):
    op, reference, _ = POOLS[not mean]
    lengths = MIXED if C == 5 else (PART + 3, 0, 2)
    compare(op, reference, *make(dtype, device, lengths, C), normalize)


@pools
@normalized
@settings(max_examples=examples(15), deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.sampled_from([0, 0, 1, 2, 9, PART, PART + 1]), max_size=9),
    C=st.integers(1, 300),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(op, reference, by_hand, normalize, lengths, C, dtype):
    torch.manual_seed(0)
    compare(op, reference, *make(dtype, "cuda" if CUDA else "cpu", lengths, C), normalize)


@pools
def test_more_chunks_than_are_unrolled(op, reference, by_hand, device):
    compare(op, reference, *make(torch.float32, device, (3, 0, 2), 1300), False)
    compare(op, reference, *make(torch.float32, device, (3, 0, 2), 1300), True)


VIEWS = {
    "transposed": lambda x: x.t(),
    "every second channel": lambda x: x[:, ::2],
    "every second token": lambda x: x[::2],
    "slice of wider rows": lambda x: x[:, 8:-8],
}


@covering(mean=[False, True], normalize=[False, True], name=VIEWS)
def test_strided_tokens(mean, normalize, name, device):
    (op, reference, _), view = POOLS[not mean], VIEWS[name]
    x = torch.randn(32, 32, device=device)
    tokens = len(view(x))
    cu_seqlens = bounds(0, 5, 5, tokens).to(device)

    def strided(fn):
        # The gradient comes back as a slice of wider rows.
        def call(x):
            y = fn(view(x), cu_seqlens, normalize)
            return torch.cat([y, y.new_ones(len(y), 8)], dim=1)

        return call

    assert_parity(strided(op), strided(reference), [x])


@pools
@normalized
def test_expanded_gradient(op, reference, by_hand, normalize, device):
    x, cu_seqlens = make(torch.float32, device)
    assert_parity(
        lambda x: op(x, cu_seqlens, normalize).sum(),
        lambda x: reference(x, cu_seqlens, normalize).sum(),
        [x],
    )


@pools
def test_normalized_vectors_have_length_1_and_empty_ones_are_zero(op, reference, by_hand, device):
    x, cu_seqlens = make(torch.float32, device)
    y = op(x, cu_seqlens, normalize=True)
    torch.testing.assert_close(y.norm(dim=1), bounds(1, 0, 1, 1, 0).float().to(device))
    torch.testing.assert_close(y, F.normalize(op(x, cu_seqlens), dim=1))


@pools
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gradient_along_the_vector_is_taken_out(op, reference, by_hand, dtype, device):
    """What is left then is far smaller than the rounding of a 16-bit result."""
    x, cu_seqlens = make(dtype, device, C=128)
    unit = reference(x.double(), cu_seqlens, normalize=True)
    across = torch.randn(unit.shape, dtype=torch.float64, device=device)
    dy = (unit + 0.01 * across).float()

    def gradient(fn, x):
        y = fn(x.requires_grad_(), cu_seqlens, normalize=True)
        return torch.autograd.grad(y, x, dy.to(dtype).to(y.dtype))[0]

    ours, rounded, exact = (
        gradient(fn, x.detach().to(kind))
        for fn, kind in ((op, dtype), (reference, dtype), (reference, torch.float64))
    )
    assert_within_budget(ours, rounded, exact, "dx")


@pools
def test_a_zero_vector_stays_zero(op, reference, by_hand, device):
    x, cu_seqlens = make(torch.float32, device)
    x[:3] = 0
    x.requires_grad_()
    y = op(x, cu_seqlens, normalize=True)
    y.sum().backward()
    assert not y[0].any()
    assert x.grad.isfinite().all()


@pools
@normalized
def test_place_in_the_batch_changes_no_bit(op, reference, by_hand, normalize, device):
    document = torch.randn(2 * PART + 5, 40, device=device)
    alone = op(document, bounds(0, len(document)).to(device), normalize)
    for before in (1, PART - 3, PART + 9):
        x = torch.cat([torch.randn(before, 40, device=device), document])
        together = op(x, bounds(0, before, len(x)).to(device), normalize)
        assert torch.equal(alone[0], together[1])


@pools
@normalized
def test_the_same_bits_twice(op, reference, by_hand, normalize, device):
    x, cu_seqlens = make(torch.float32, device, MIXED)
    x.requires_grad_()
    y, again = (op(x, cu_seqlens, normalize) for _ in range(2))
    assert torch.equal(y, again)
    first, second = (
        torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True) for _ in range(2)
    )
    assert torch.equal(first[0], second[0])


def test_gradients_of_a_mean_sum_to_the_gradient(device):
    x, cu_seqlens = make(torch.float32, device)
    x.requires_grad_()
    dy = torch.randn(len(LENGTHS), 5, device=device)
    nk.mean_pool(x, cu_seqlens).backward(dy)
    sums = torch.stack([part.sum(0) for part in x.grad.split(LENGTHS)])
    torch.testing.assert_close(sums, dy.masked_fill((cu_seqlens.diff() == 0)[:, None], 0))


@pools
@normalized
def test_autocast_changes_nothing(op, reference, by_hand, normalize, device):
    x, cu_seqlens = make(torch.float32, device)
    with torch.autocast(device.type, torch.bfloat16):
        y = op(x, cu_seqlens, normalize)
    assert torch.equal(y, op(x, cu_seqlens, normalize))


@pools
@normalized
def test_a_dynamic_number_of_tokens_compiles_once(op, reference, by_hand, normalize, device):
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.compiler.set_stance("default"):
        compare(compiled, reference, *make(torch.float32, device), normalize)
    with torch.compiler.set_stance("fail_on_recompile"):
        for lengths in ((4, 9), (0, 2, 3, 30)):
            compare(compiled, reference, *make(torch.float32, device, lengths), normalize)


@runs_kernel
@pytest.mark.parametrize("mean", [True, False], ids=["mean", "first"])
@normalized
def test_registration(mean, normalize, device):
    for dtype in (torch.float32, torch.bfloat16):
        x, cu_seqlens = make(dtype, device)
        torch.library.opcheck(module._forward, (x, cu_seqlens, mean, normalize))
        y, unit, norm = module._forward(x, cu_seqlens, mean, normalize)
        kept = y if normalize and dtype == torch.float32 else unit
        args = (torch.randn_like(y), kept, norm, cu_seqlens, len(x), mean, normalize)
        torch.library.opcheck(module._backward, args)


@runs_kernel
@pools
def test_tokens_past_the_last_document_get_no_gradient(op, reference, by_hand, device, monkeypatch):
    monkeypatch.setattr(module, "_check_arguments", lambda *_: None)  # a GPU cannot look
    x, _ = make(torch.float32, device)
    x.requires_grad_()
    op(x, bounds(0, 3, 5).to(device)).sum().backward()
    assert x.grad[:5].any()
    assert not x.grad[5:].any()


@pytest.mark.skipif(not CUDA, reason="needs a GPU: captures a CUDA graph")
@pools
@normalized
def test_a_cuda_graph_replays_the_step(op, reference, by_hand, normalize, device):
    x, cu_seqlens = make(torch.bfloat16, device, MIXED)
    x.requires_grad_()

    def step():
        y = op(x, cu_seqlens, normalize)
        return y, *torch.autograd.grad(y.float().square().sum(), x)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.neg_()
    graph.replay()
    assert all(map(torch.equal, captured, step()))


@pytest.mark.skipif(not CUDA, reason="needs 15 GB of GPU memory")
@pools
def test_more_than_two_to_the_31_elements(op, reference, by_hand, device):
    T, C = 2**31 // 768 + 3, 768
    x = torch.randn(T, C, device=device, dtype=torch.bfloat16).requires_grad_()
    y = op(x, bounds(0, T - 3, T).to(device))
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    last = bounds(0, 3).to(device)
    ones = [torch.ones_like(y[-1:])]
    tail = x.detach()[-3:]
    rounded = outputs_and_gradients(lambda x: reference(x, last), [tail], ones)
    exact = outputs_and_gradients(lambda x: reference(x, last), [tail.double()], ones)
    for actual, r, e in zip((y.detach()[-1:], dx[-3:]), rounded, exact, strict=True):
        assert_within_budget(actual, r, e)


def bounds(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


@pools
@pytest.mark.parametrize(
    ("x", "cu_seqlens", "message"),
    [
        (torch.ones(3), bounds(0, 3), "x: expected 2 dimensions"),
        (torch.ones(3, 2).double(), bounds(0, 3), "x: expected dtype float32 or"),
        (
            torch.ones(3, 2),
            bounds(0, 3, dtype=torch.int64),
            "cu_seqlens: expected dtype int32, got",
        ),
        (torch.ones(3, 2), bounds(1, 3), "cu_seqlens: expected a first element of 0, got 1"),
        (torch.ones(3, 2), bounds(0, 2), "equal to the number of tokens .3., got 2"),
        (torch.ones(3, 2), bounds(0, 4, 3), "never fall, got 4 then 3 at index 1"),
        (torch.ones(3, 2), bounds(), "cu_seqlens: expected at least one element"),
        (torch.ones(3, 2), [0, 3], "cu_seqlens: expected a torch.Tensor, got list"),
    ],
)
def test_rejects(op, reference, by_hand, x, cu_seqlens, message):
    with pytest.raises(ValueError, match=message):
        op(x, cu_seqlens)
