"""info_nce against the sum written out."""

import math

import pytest
import torch
from parity import assert_parity

import neobert_kernels as nk


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
        ((ONES, ONES, 0.0), "temperature: expected a finite number over 0, got 0"),
        ((ONES, ONES, float("nan")), "temperature: expected a finite number over 0, got nan"),
        ((ONES, ONES, "1"), "temperature: expected a number, got str"),
    ],
)
def test_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        nk.info_nce(*arguments)
