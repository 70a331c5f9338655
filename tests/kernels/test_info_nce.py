"""info_nce against the sum written out."""

import math

import pytest
import torch
from covering import covering, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_parity, long_sums
from torch.nn import functional as F

import neobert_kernels as nk
from neobert_kernels import _runtime
from neobert_kernels.ops import info_nce as module

CUDA = torch.cuda.is_available()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
runs_kernel = pytest.mark.skipif(
    not CUDA and not _runtime.INTERPRET, reason="no kernel runs on the CPU"
)


def by_hand(queries, documents, temperature):
    losses = []
    for i, q in enumerate(queries):
        scores = [float(q @ d / (q.norm() * d.norm())) / temperature for d in documents]
        losses.append(math.log(sum(map(math.exp, scores))) - scores[i])
    return sum(losses) / len(losses)


def make(N, M, C, device, dtype=torch.float32):
    return [torch.randn(n, C, device=device).to(dtype) for n in (N, M)]


@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 5, 8), (3, 9, 4)], ids=str)
@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_matches_the_sum_written_out(shape, temperature, device):
    q, d = (x.double() for x in make(*shape, device))
    reference = nk.info_nce_reference(q, d, temperature)
    assert reference.item() == pytest.approx(by_hand(q, d, temperature), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_matches_the_reference_and_its_gradients(dtype, device):
    inputs = make(6, 11, 16, device, dtype)

    def exact_in_float32(q, d):
        # The loss is float32 whatever the inputs; in float64 the oracle's is float64.
        return nk.info_nce_reference(q, d, 0.07)

    assert_parity(lambda q, d: nk.info_nce(q, d, 0.07), exact_in_float32, inputs)
    assert nk.info_nce(*inputs, 0.07).dtype == torch.float32


def test_length_of_a_vector_does_not_matter(device):
    q, d = make(4, 4, 8, device)
    scales = torch.rand(4, 1, device=device) * 9 + 1
    torch.testing.assert_close(nk.info_nce(q * scales, d / scales, 0.1), nk.info_nce(q, d, 0.1))


def test_the_own_document_is_row_i(device):
    d = torch.eye(4, device=device)
    assert nk.info_nce(d, d, 0.05) < 1e-6
    assert nk.info_nce(d.roll(1, 0), d, 0.05) > 10


def test_a_zero_vector_stays_finite(device):
    q, d = make(3, 3, 8, device)
    q[1] = 0
    q.requires_grad_()
    loss = nk.info_nce(q, d, 0.07)
    loss.backward()
    assert loss.isfinite()
    assert q.grad.isfinite().all()


def compare(q, d, temperature=0.07):
    assert_parity(
        lambda q, d: nk.info_nce(q, d, temperature),
        lambda q, d: nk.info_nce_reference(q, d, temperature),
        [q, d],
        long_sums(q.dtype),
    )


@every_dtype
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (1, 300, 40), (33, 65, 96), (130, 257, 24), (64, 128, 64)], ids=str
)
def test_tiles_and_their_edges(shape, dtype, device):
    compare(*make(*shape, device, dtype))


@pytest.mark.parametrize(("C", "dtype"), list(zip((760, 768, 1152), DTYPES, strict=True)), ids=str)
def test_common_widths(C, dtype, device):
    compare(*make(5, 9, C, device, dtype))


@every_dtype
@pytest.mark.parametrize("temperature", [0.01, 0.05, 1.0, 20])
def test_every_temperature(temperature, dtype, device):
    compare(*make(9, 40, 64, device, dtype), temperature)


@every_dtype
@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_stays_finite_at_the_ends_of_the_range(temperature, dtype, device):
    q, d = (x.requires_grad_() for x in make(9, 40, 64, device, dtype))
    loss = nk.info_nce(q, d, temperature)
    loss.backward()
    assert all(x.isfinite().all() for x in (loss, q.grad, d.grad))


@covering(temperature=[0.01, 0.02, 0.07, 1.0], seed=range(2), common=[0.0, 1.5])
def test_a_low_temperature_magnifies_no_rounding(common, seed, temperature, device):
    """Also where all vectors share a direction, as an encoder's do, and cosines are near 1."""
    torch.manual_seed(seed)
    shared = common * torch.randn(384, device=device)
    compare(*(x + shared for x in make(5, 9, 384, device)), temperature)


@pytest.mark.parametrize("C", [16, 40])
def test_few_channels_at_a_low_temperature(C, device):
    """With one block of float32 products, seed 11 leaves the budget at 16 channels."""
    for seed in (11, 12):
        torch.manual_seed(seed)
        compare(*make(5, 9, C, device), 0.01)


def alike(seed, device):
    """Vectors that share most of their direction: cosines of 0.7 and differences of 0.05."""
    torch.manual_seed(seed)
    shared = 1.5 * torch.randn(768, device=device)
    return [x + shared for x in make(5, 9, 768, device)]


@runs_kernel
def test_float32_gradients_are_nearer_than_the_reference(device):
    """With what sums, lengths and differences lack: here 0.2 of its error, without one 0.4."""
    for seed in range(2):
        inputs = alike(seed, device)
        exact = gradients(nk.info_nce_reference, [x.double() for x in inputs])
        ours, theirs = (
            max((g - e).abs().max() for g, e in zip(gradients(loss, inputs), exact, strict=True))
            for loss in (nk.info_nce, nk.info_nce_reference)
        )
        assert ours < theirs / 3


@runs_kernel
def test_float32_losses_are_nearer_than_the_reference(device):
    """Summed over seeds 0.2 of its error; 0.6 where the own similarity lacks something."""
    ours = theirs = 0.0
    for seed in range(6):
        q, d = alike(seed, device)
        exact = nk.info_nce_reference(q.double(), d.double(), 0.01)
        ours += (nk.info_nce(q, d, 0.01) - exact).abs()
        theirs += (nk.info_nce_reference(q, d, 0.01) - exact).abs()
    assert ours < theirs / 3


def gradients(loss, inputs):
    leaves = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(loss(*leaves, 0.01), leaves)


def test_one_document_costs_nothing(device):
    """A loss of exactly 0, though the own similarity is not the rounded largest."""
    for seed in range(20):
        torch.manual_seed(seed)
        q, d = (x.requires_grad_() for x in make(1, 1, 40, device))
        loss = nk.info_nce(q, d, 0.01)
        assert not loss
        assert not any(g.any() for g in torch.autograd.grad(loss, (q, d)))


@settings(max_examples=examples(15), deadline=None, derandomize=True)
@given(
    N=st.integers(1, 70),
    extra=st.integers(0, 90),
    C=st.integers(8, 150),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(N, extra, C, dtype):
    torch.manual_seed(0)
    compare(*make(N, N + extra, C, "cuda" if CUDA else "cpu", dtype))


@runs_kernel
@pytest.mark.parametrize("shares", [1, 2, 5])
def test_documents_are_shared_out_in_any_number(shares, device, monkeypatch):
    monkeypatch.setattr(_runtime, "resident_programs", lambda *_: shares)
    compare(*make(5, 333, 24, device))


@every_dtype
def test_trained_vectors_have_a_small_loss(dtype, device):
    """Far below the rounding of a similarity of 100: it must not be a difference of two."""
    d = F.normalize(torch.randn(20, 64, device=device), dim=1)
    q = d + 0.02 * torch.randn_like(d)
    compare(q.to(dtype), d.to(dtype), 0.05)


@every_dtype
def test_all_similarities_far_below_zero(dtype, device):
    """exp(0 - largest) is infinite there: what lies past the last row must not be 0 times it."""
    q, d = make(5, 9, 16, device)
    q, d = q.abs() + 3, -d.abs() - 3
    compare(q.to(dtype), d.to(dtype), 0.01)


VIEWS = {
    "transposed": lambda x: x.t(),
    "every second channel": lambda x: x[:, ::2],
    "every second row": lambda x: x[::2],
    "slice of wider rows": lambda x: x[:, 8:-8],
}


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_vectors(name, dtype, device):
    view = VIEWS[name]

    def strided(fn):
        return lambda q, d: fn(view(q), view(d), 0.07)

    inputs = make(32, 32, 32, device, dtype)
    assert_parity(strided(nk.info_nce), strided(nk.info_nce_reference), inputs)


def test_a_vector_larger_than_a_float16_square(device):
    compare(*(x * 3e3 for x in make(5, 9, 64, device, torch.float16)))


@pytest.mark.parametrize("wanted", [0, 1])
def test_only_the_gradients_that_are_asked_for(wanted, device):
    leaves = [x.requires_grad_(i == wanted) for i, x in enumerate(make(5, 9, 16, device))]
    nk.info_nce(*leaves, 0.07).backward()
    assert [x.grad is not None for x in leaves] == [i == wanted for i in range(2)]


def test_gradients_are_tangent_and_sum_to_zero_over_classes(device):
    """Longer vectors lose nothing; and at equal documents all weights cancel."""
    q, d = (x.requires_grad_() for x in make(7, 12, 16, device))
    dq, dd = torch.autograd.grad(nk.info_nce(q, d, 0.07), (q, d))
    for x, dx in ((q, dq), (d, dd)):
        rounding = 16 * torch.finfo(torch.float32).eps * x.norm(dim=1) * dx.norm(dim=1).max()
        assert ((x * dx).sum(1).abs() <= rounding).all()
    same = d.detach()[:1].expand(12, -1)
    (dq,) = torch.autograd.grad(nk.info_nce(q, same, 0.07), q)
    assert dq.abs().max() < 1e-5


def test_the_same_bits_twice(device):
    inputs = [x.requires_grad_() for x in make(40, 70, 32, device)]
    loss, again = (nk.info_nce(*inputs, 0.07) for _ in range(2))
    assert torch.equal(loss, again)
    first, second = (torch.autograd.grad(loss, inputs, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_gradients_in_two_passes_are_those_of_one(device):
    """GradCache: vectors without a graph, the loss's gradients, then chunks with a graph."""
    texts = torch.randn(12, 8, device=device)
    encoder = torch.nn.Linear(8, 16, device=device)

    def direct():
        loss = nk.info_nce(encoder(texts[:5]), encoder(texts), 0.07)
        return torch.autograd.grad(loss, list(encoder.parameters()))

    with torch.no_grad():
        vectors = encoder(texts)
    q, d = vectors[:5].clone().requires_grad_(), vectors.clone().requires_grad_()
    nk.info_nce(q, d, 0.07).backward()
    cached = d.grad.clone()
    cached[:5] += q.grad
    encoder.zero_grad()
    for part, gradient in zip(texts.split(4), cached.split(4), strict=True):
        encoder(part).backward(gradient)
    for expected, parameter in zip(direct(), encoder.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected)


def test_autocast_changes_nothing(device):
    inputs = make(6, 11, 16, device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = nk.info_nce(*inputs, 0.07)
    assert torch.equal(loss, nk.info_nce(*inputs, 0.07))


def test_a_dynamic_number_of_rows_compiles_once(device):
    torch.compiler.reset()
    compiled = torch.compile(nk.info_nce, fullgraph=True, dynamic=True, backend="aot_eager")

    def check(N, M):
        assert_parity(
            lambda q, d: compiled(q, d, 0.07),
            lambda q, d: nk.info_nce_reference(q, d, 0.07),
            make(N, M, 24, device),
        )

    with torch.compiler.set_stance("default"):
        check(5, 9)
    with torch.compiler.set_stance("fail_on_recompile"):
        check(7, 40)
        check(33, 50)


@runs_kernel
@every_dtype
def test_registration(dtype, device):
    q, d = make(5, 9, 24, device, dtype)
    torch.library.opcheck(module._forward, (q, d, 0.07))
    _, *saved = module._forward(q, d, 0.07)
    for of_queries in (True, False):
        args = (torch.ones((), device=device), q, d, *saved, 0.07, of_queries)
        torch.library.opcheck(module._backward, args)


@pytest.mark.parametrize("chunk", [32, 128])
@pytest.mark.parametrize("C", [1, 128, 384, 768, 1000, 1024, 4096])
def test_accumulators_cover_every_column_once(C, chunk):
    count = module.chunks(C, chunk)
    assert 1 <= count <= module.MOST_CHUNKS
    programs = -(-C // (count * chunk))
    assert (programs - 1) * count * chunk < C <= programs * count * chunk


@pytest.mark.skipif(not CUDA, reason="needs a GPU: captures a CUDA graph")
def test_a_cuda_graph_replays_the_step(device):
    inputs = [x.requires_grad_() for x in make(40, 70, 64, device, torch.bfloat16)]

    def step():
        loss = nk.info_nce(*inputs, 0.07)
        return loss, *torch.autograd.grad(loss, inputs)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        inputs[0].neg_()
    graph.replay()
    assert all(map(torch.equal, captured, step()))


@pytest.mark.skipif(not CUDA, reason="needs 10 GB of GPU memory")
def test_more_than_two_to_the_31_elements(device):
    """The last document of very many is the query's; the first is its own, as are all others."""
    M, C = 2**31 // 768 + 3, 768
    d = torch.zeros(M, C, device=device, dtype=torch.bfloat16)
    d[:, 0] = 1
    d[-1, :2] = torch.tensor([0.0, 1.0])
    q = d[-1:].clone().requires_grad_()
    nk.info_nce(q, d, 0.07).backward()
    near, far = math.exp(1 / 0.07), M - 1
    expected = torch.zeros(1, C)
    expected[0, 0] = (far / (near + far) - 1) / 0.07
    # Tensor cores cut off what a sum has no digits for: of 40,000 equal parts in a row, 3 %.
    torch.testing.assert_close(q.grad.cpu().float(), expected, rtol=5e-2, atol=1e-3)


def test_compiles_to_one_graph(device):
    q, d = make(4, 6, 8, device)
    compiled = torch.compile(nk.info_nce, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, d, 0.1), nk.info_nce(q, d, 0.1))


ONES = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ONES[0], ONES, 1.0), "queries: expected 2 dimensions"),
        ((ONES, ONES.double(), 1.0), "documents: expected dtype float32, got float64"),
        ((ONES, ONES[:1], 1.0), r"documents: expected shape \(M, 3\) with M >= 2, got \(1, 3\)"),
        ((ONES, ONES[:, :2], 1.0), r"documents: expected shape \(M, 3\)"),
        ((ONES[:0], ONES, 1.0), "queries: expected at least one row, got 0"),
        ((ONES[:, :0], ONES[:, :0], 1.0), r"queries: expected at least one channel, got \(2, 0\)"),
        ((ONES, ONES, 0.0), "temperature: expected a number from 1e-06 to 1e\\+06, got 0"),
        ((ONES, ONES, 10**400), "temperature: expected a number from"),
        ((ONES, ONES, float("nan")), "temperature: expected a number from .*, got nan"),
        ((ONES, ONES, "1"), "temperature: expected a number, got str"),
    ],
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        nk.info_nce(*arguments)
