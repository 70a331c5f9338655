"""mean_pool and first_pool against loops over the documents."""

import pytest
import torch
from parity import assert_parity, assert_within_budget

import neobert_kernels as nk

LENGTHS = (3, 0, 1, 7, 0)


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


def test_16_bit_means_are_summed_in_float32(device):
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
