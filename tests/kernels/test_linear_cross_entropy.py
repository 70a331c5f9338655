"""linear_cross_entropy against the dense loss, and against rows that must not count."""

import pytest
import torch
from covering import covering, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_cases import (
    CUDA,
    DTYPES,
    LABELLED,
    T,
    V,
    every_dtype,
    every_reduction,
    make,
    random,
    runs_kernel,
)
from parity import assert_parity, long_sums
from torch.nn import functional as F

import neobert_kernels as nk
from neobert_kernels.ops import linear_cross_entropy as module
from neobert_kernels.ops.linear_cross_entropy import kernels


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


def compare(tensors, labels, **options):
    def of(fn):
        return lambda *tensors: fn(*tensors[:2], labels, *tensors[2:], **options)

    ops = of(nk.linear_cross_entropy), of(nk.linear_cross_entropy_reference)
    assert_parity(*ops, tensors, long_sums(tensors[0].dtype))


@covering(dtype=DTYPES, reduction=module.REDUCTIONS, V=[63, 65, 198], bias=[True, False])
def test_vocabulary_of_several_blocks(dtype, reduction, V, bias, device, monkeypatch):
    monkeypatch.setitem(kernels.SOFTMAX, "BLOCK", 64)
    tensors, labels = random(7, 24, V, dtype, device)
    labels[:2] = torch.tensor([0, V - 1])
    compare(tensors[: 2 + bias], labels, reduction=reduction)


@covering(dtype=DTYPES, reduction=module.REDUCTIONS, labelled=[8, 9, 17, 23])
def test_rows_in_chunks_and_steps(dtype, reduction, labelled, small_chunks, device):
    tensors, labels = random(23, 40, 70, dtype, device, share=1)
    labels[labelled:] = -100
    compare(tensors, labels, reduction=reduction)


@settings(max_examples=examples(15), deadline=None, derandomize=True)
@given(
    T=st.integers(0, 40),
    C=st.integers(1, 90),
    V=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    share=st.sampled_from([0.0, 0.2, 1.0]),
)
def test_any_shape(T, C, V, dtype, reduction, share):
    torch.manual_seed(0)
    compare(*random(T, C, V, dtype, "cuda" if CUDA else "cpu", share), reduction=reduction)


@pytest.mark.parametrize("C", [760, 768, 1152])
def test_common_widths(C, device):
    compare(*random(9, C, 37, torch.float32, device))


@covering(
    dtypes=[(DTYPES[0], low) for low in DTYPES[1:]], swapped=[False, True],
    reduction=module.REDUCTIONS,
)  # fmt: skip
def test_mixed_dtypes_are_computed_in_float32(dtypes, swapped, reduction, device):
    x, weight = reversed(dtypes) if swapped else dtypes
    compare(*random(9, 24, 37, x, device, weight=weight), reduction=reduction)


@every_dtype
def test_strided_arguments(dtype, device):
    tensors, labels = random(24, 32, 37, dtype, device)
    views = [tensors[0].t().contiguous(), tensors[1].t().contiguous(), tensors[2].repeat(2, 1).t()]
    rows = (labels != -100).nonzero().expand(-1, 2)[:, 0]
    labels = torch.stack([labels, labels], 1)[:, 0]

    def strided(fn):
        def call(x, weight, bias):
            return fn(x.t()[:, ::2], weight.t()[:, ::2], labels, bias[:, 0], rows=rows)

        return call

    assert_parity(
        strided(nk.linear_cross_entropy), strided(nk.linear_cross_entropy_reference), views
    )


@pytest.mark.parametrize("extra", [0, 3])
def test_a_number_of_rows_is_enough(extra, device):
    (x, weight, bias), labels = make(torch.float32, device)
    number = len(LABELLED) + extra
    for reduction in ("mean", "none"):
        compare([x, weight, bias], labels, reduction=reduction, rows=number)
        torch.testing.assert_close(
            nk.linear_cross_entropy(x, weight, labels, bias, -100, reduction, number),
            nk.linear_cross_entropy(x, weight, labels, bias, -100, reduction),
        )


def test_nan_in_ignored_rows_reaches_no_gradient(device):
    """Not even where the caller names them."""
    tensors, labels = make(torch.float32, device)
    tensors[0][labels == -100] = float("nan")
    leaves = [t.requires_grad_() for t in tensors]
    rows = torch.arange(T, device=device)
    nk.linear_cross_entropy(leaves[0], leaves[1], labels, leaves[2], rows=rows).backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


@pytest.mark.parametrize("arrives", [float("inf"), float("nan"), 1e30])
def test_a_gradient_that_arrives_at_an_ignored_row_changes_nothing(arrives, device):
    """A caller's 0 / 0 there, say, or a number beside which all others would vanish."""
    tensors, labels = make(torch.float16, device)
    found = []
    for at_ignored in (0.0, arrives):
        leaves = [t.clone().requires_grad_() for t in tensors]
        losses = nk.linear_cross_entropy(*leaves[:2], labels, leaves[2], reduction="none")
        losses.backward(torch.ones_like(losses).masked_fill(labels == -100, at_ignored))
        found.append([leaf.grad for leaf in leaves])
    assert all(map(torch.equal, *found))
    assert found[0][0].any()


@every_dtype
def test_gradients_of_logits_sum_to_zero(dtype, device):
    """With one row, dweight is dlogits times x, and with one channel of 1 it is dlogits."""
    tensors, labels = random(5, 1, 300, dtype, device, share=1)
    tensors[0].fill_(1)
    leaves = [t.requires_grad_() for t in tensors]
    nk.linear_cross_entropy(leaves[0], leaves[1], labels, leaves[2], reduction="sum").backward()
    for gradient in (leaves[1].grad, leaves[2].grad):
        rounding = torch.finfo(dtype).eps * gradient.double().abs().sum()
        assert gradient.double().sum().abs() <= rounding


@every_dtype
def test_a_constant_added_to_all_logits_changes_nothing(dtype, device):
    (x, weight, bias), labels = make(dtype, device)
    bias = bias.round()  # so that adding 2 is exact
    before, after = (nk.linear_cross_entropy(x, weight, labels, b) for b in (bias, bias + 2))
    torch.testing.assert_close(before, after)


def test_a_small_loss_is_not_lost_in_large_logits(device):
    """1 + 1e-7 is not a float32 far from 0: the loss must not be a difference of logits."""
    x = torch.tensor([[1.0]], device=device)
    weight = torch.tensor([[1000.0], [985.0]], device=device)
    loss = nk.linear_cross_entropy(x, weight, torch.zeros(1, dtype=torch.long, device=device))
    assert loss.item() == pytest.approx(3.059e-07, rel=0.2)  # log1p(exp(-15)), in float32 sums


def test_logits_of_minus_infinity(device):
    """A whole block of the vocabulary may be ruled out by its bias."""
    block = kernels.SOFTMAX["BLOCK"]
    (x, weight, bias), labels = random(3, 8, block + 9, torch.float32, device, share=1)
    bias[:block] = float("-inf")
    labels.fill_(block + 3)
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    loss = nk.linear_cross_entropy(x, weight, labels, bias)
    loss.backward()
    expected = F.cross_entropy(x @ weight.t() + bias, labels)
    torch.testing.assert_close(loss, expected)
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


def test_a_loss_scale_does_not_overflow_float16(device):
    tensors, labels = make(torch.float16, device)
    leaves = [t.requires_grad_() for t in tensors]
    losses = nk.linear_cross_entropy(leaves[0], leaves[1], labels, leaves[2], reduction="none")
    (losses * 2.0**17 * 1e-3).sum().backward()
    assert all(leaf.grad.isfinite().all() for leaf in leaves)


@every_reduction
def test_stats_come_from_the_same_pass(reduction, device):
    (x, weight, bias), labels = make(torch.float32, device)
    x.requires_grad_()
    args = (x, weight, labels, bias, -100, reduction)
    loss, losses, correct = nk.linear_cross_entropy_with_stats(*args)
    assert torch.equal(loss, nk.linear_cross_entropy(*args))
    torch.testing.assert_close(losses, dense(x, weight, bias, labels, "none").detach())
    right = (x @ weight.t() + bias).argmax(1) == labels
    assert torch.equal(correct, right)
    assert (losses.requires_grad, correct.requires_grad) == (False, False)
    loss.sum().backward()
    assert x.grad.any()


def test_stats_know_a_right_answer(device):
    x = torch.eye(4, device=device)
    labels = torch.tensor([0, 1, 3, -100], device=device)
    _, losses, correct = nk.linear_cross_entropy_with_stats(x, x, labels)
    assert correct.tolist() == [True, True, False, False]
    assert losses[3] == 0


@every_reduction
def test_backward_gives_the_same_bits_twice(reduction, small_chunks, device):
    tensors, labels = random(23, 40, 70, torch.float32, device)
    leaves = [t.requires_grad_() for t in tensors]
    loss = nk.linear_cross_entropy(
        leaves[0], leaves[1], labels, leaves[2], reduction=reduction
    ).sum()
    first, again = (torch.autograd.grad(loss, leaves, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("reduction", ["mean", "none"])  # a sum is a mean without a division
@pytest.mark.parametrize("wanted", range(3))
def test_only_the_gradients_that_are_asked_for(reduction, wanted, device):
    tensors, labels = make(torch.float32, device)
    leaves = [t.requires_grad_(i == wanted) for i, t in enumerate(tensors)]
    nk.linear_cross_entropy(
        leaves[0], leaves[1], labels, leaves[2], reduction=reduction
    ).sum().backward()
    assert [t.grad is not None for t in leaves] == [i == wanted for i in range(3)]


@runs_kernel
@pytest.mark.parametrize("gradients", [False, True])
def test_no_gradient_costs_no_buffer(gradients, monkeypatch, device):
    """One product without gradients, three with them."""
    products = []
    product = kernels._product
    monkeypatch.setattr(
        kernels, "_product", lambda *args, **kw: (products.append(1), product(*args, **kw))
    )
    tensors, labels = make(torch.float32, device)
    leaves = [t.requires_grad_() for t in tensors]
    with torch.set_grad_enabled(gradients):
        nk.linear_cross_entropy(leaves[0], leaves[1], labels, leaves[2])
    assert len(products) == (3 if gradients else 1)


@runs_kernel
@pytest.mark.parametrize("wrong", [V, -1, 2**40])
def test_a_wrong_label_makes_the_loss_nan(wrong, device, monkeypatch):
    monkeypatch.setattr(module, "_check_values", lambda *_: None)  # a GPU cannot look
    (x, weight, bias), labels = make(torch.float32, device)
    labels[4] = wrong
    losses = nk.linear_cross_entropy(x, weight, labels, bias, reduction="none")
    assert losses.isnan().nonzero().tolist() == [[4]]
    assert nk.linear_cross_entropy(x, weight, labels, bias).isnan()


@runs_kernel
def test_rows_outside_are_skipped(device, monkeypatch):
    monkeypatch.setattr(module, "_check_values", lambda *_: None)
    (x, weight, bias), labels = make(torch.float32, device)
    x.requires_grad_()
    rows = torch.cat([LABELLED.to(device), torch.tensor([-1, -7, T, 10**9], device=device)])
    loss = nk.linear_cross_entropy(x, weight, labels, bias, rows=rows)
    assert torch.equal(loss, nk.linear_cross_entropy(x, weight, labels, bias))
    loss.backward()
    assert x.grad.isfinite().all()


@every_reduction
def test_autocast_multiplies_in_its_dtype(reduction, device):
    """As a linear layer would; losses and gradients stay float32."""
    tensors, labels = make(torch.float32, device)
    low = [tensors[0].half(), tensors[1].half(), tensors[2]]
    with torch.autocast(device.type, torch.float16):
        leaves = [t.clone().requires_grad_() for t in tensors]
        loss = nk.linear_cross_entropy(leaves[0], leaves[1], labels, leaves[2], reduction=reduction)
    expected = nk.linear_cross_entropy(low[0], low[1], labels, low[2], reduction=reduction)
    assert torch.equal(loss, expected)
    loss.sum().backward()
    assert all(leaf.grad.dtype == torch.float32 for leaf in leaves)


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
        ({"rows": -1}, "rows: expected a number of rows, at least 0, got -1"),
        ({"rows": 1}, "rows: expected at least the 2 labelled rows, got 1"),
        ({"rows": True}, "rows: expected a torch.Tensor, an int or None, got True"),
        ({"rows": [0, 1]}, r"rows: expected a torch.Tensor, an int or None, got \[0, 1\]"),
        ({"x": torch.ones(3, 0)}, r"x: expected at least one channel, got \(3, 0\)"),
        ({"ignore_index": None}, "ignore_index: expected an int, got None"),
        ({"ignore_index": -100.0}, "ignore_index: expected an int, got -100.0"),
        ({"ignore_index": True}, "ignore_index: expected an int, got True"),
        ({"ignore_index": 2**63}, "ignore_index: expected an int of 64 bits, got 9223372036"),
        ({"rows": torch.tensor([0, 1, 1])}, "rows: expected distinct values"),
        ({"rows": torch.tensor([0, 2])}, r"rows: expected every labelled row \(2\) .*, got 1"),
    ],
)
def test_rejects(changes, message):
    for op in (nk.linear_cross_entropy, nk.linear_cross_entropy_with_stats):
        with pytest.raises(ValueError, match=message):
            op(**(ARGUMENTS | changes))


def test_a_number_of_rows_without_tokens(device):
    x, weight = torch.zeros(0, 4, device=device), torch.zeros(5, 4, device=device)
    labels = torch.zeros(0, dtype=torch.int64, device=device)
    assert nk.linear_cross_entropy(x, weight, labels, rows=4) == 0
