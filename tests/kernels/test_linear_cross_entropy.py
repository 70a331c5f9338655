"""linear_cross_entropy against the dense loss, and against rows that must not count."""

import pytest
import torch
from parity import assert_parity
from torch.nn import functional as F

import neobert_kernels as nk

T, C, V = 13, 8, 29
LABELS = torch.tensor([3, -100, 0, 28, -100, -100, 7, 7, 1, -100, 12, 28, -100])
LABELLED = (LABELS != -100).nonzero().squeeze(1)


def make(dtype, device):
    shapes = ((T, C), (V, C), (V,))
    return [torch.randn(s, device=device).to(dtype) for s in shapes], LABELS.to(device)


def dense(x, weight, bias, labels, reduction="mean"):
    return F.cross_entropy(x @ weight.t() + bias, labels, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("with_rows", [False, True])
def test_matches_the_dense_loss_and_its_gradients(reduction, with_rows, device):
    (x, weight, bias), labels = make(torch.float64, device)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    rows = LABELLED.to(device) if with_rows else None
    ours = nk.linear_cross_entropy_reference(x, weight, labels, bias, -100, reduction, rows)
    theirs = dense(x, weight, bias, labels, reduction)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    g = torch.rand_like(ours)
    mine, expected = (torch.autograd.grad(loss, leaves, g) for loss in (ours, theirs))
    torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)
    assert not mine[0][labels == -100].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_matches_the_reference(dtype, reduction, device):
    (x, weight, bias), labels = make(dtype, device)

    def of(fn):
        return lambda x, w, b: fn(x, w, labels, b, reduction=reduction)

    op, reference = of(nk.linear_cross_entropy), of(nk.linear_cross_entropy_reference)
    assert_parity(op, reference, [x, weight, bias])
    assert op(x, weight, bias).dtype == torch.float32


def test_ignored_rows_change_nothing(device):
    (x, weight, bias), labels = make(torch.float32, device)
    before = nk.linear_cross_entropy(x, weight, labels, bias)
    x[labels == -100] = float("nan")
    assert torch.equal(nk.linear_cross_entropy(x, weight, labels, bias), before)


def test_rows_given_by_the_caller_change_nothing(device):
    (x, weight, bias), labels = make(torch.float32, device)
    rows = LABELLED.to(device)
    before = nk.linear_cross_entropy(x, weight, labels, bias)
    assert torch.equal(nk.linear_cross_entropy(x, weight, labels, bias, rows=rows), before)
    more = torch.arange(T, device=device)
    torch.testing.assert_close(nk.linear_cross_entropy(x, weight, labels, bias, rows=more), before)


def test_another_ignore_index(device):
    (x, weight, bias), labels = make(torch.float32, device)
    other = labels.masked_fill(labels == -100, -1)
    before = nk.linear_cross_entropy(x, weight, labels, bias)
    after = nk.linear_cross_entropy(x, weight, other, bias, ignore_index=-1)
    assert torch.equal(before, after)


def test_nothing_labelled_gives_zero_loss_and_zero_gradients(device):
    (x, weight, bias), labels = make(torch.float32, device)
    x.requires_grad_()
    loss = nk.linear_cross_entropy(x, weight, torch.full_like(labels, -100), bias)
    loss.backward()
    assert loss.item() == 0.0
    assert not x.grad.any()


ARGUMENTS = {
    "x": torch.ones(3, 4),
    "weight": torch.ones(5, 4),
    "labels": torch.tensor([0, 4, -100]),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(4)}, "x: expected 2 dimensions"),
        (
            {"x": torch.ones(3, 4).int()},
            "x: expected dtype float32 or float16 or bfloat16, got int32",
        ),
        ({"weight": torch.ones(5, 3)}, r"weight: expected shape \(V, 4\), got \(5, 3\)"),
        ({"weight": torch.ones(0, 4)}, r"weight: expected shape \(V, 4\)"),
        ({"bias": torch.ones(4)}, r"bias: expected shape \(5,\), got \(4,\)"),
        ({"labels": torch.tensor([0, 1])}, r"labels: expected shape \(3,\), got \(2,\)"),
        ({"labels": torch.ones(3)}, "labels: expected dtype int64, got float32"),
        ({"labels": torch.tensor([0, 5, 1])}, r"labels: expected values in 0\.\.4 or -100, got 5"),
        (
            {"labels": torch.tensor([0, -1, 1])},
            r"labels: expected values in 0\.\.4 or -100, got -1",
        ),
        ({"reduction": "max"}, "reduction: expected one of mean, sum, none, got 'max'"),
        ({"rows": torch.tensor([3])}, r"rows: expected values in 0\.\.2, got 3"),
        ({"rows": torch.tensor([-1])}, r"rows: expected values in 0\.\.2, got -1"),
        ({"rows": torch.tensor([0.0])}, "rows: expected dtype int64"),
    ],
)
def test_rejects(changes, message):
    with pytest.raises(ValueError, match=message):
        nk.linear_cross_entropy(**(ARGUMENTS | changes))
