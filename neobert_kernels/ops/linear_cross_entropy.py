"""Cross-entropy of a linear layer at the labelled rows only: the loss of masked language models.

``logits = x @ weight.T + bias`` is formed for rows whose label is not ``ignore_index``; ignored
rows cost nothing and get a gradient of zero. Logits and loss are float32.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from neobert_kernels import _check, _runtime

REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy_reference(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    rows: Tensor | None = None,
) -> Tensor:
    """The contract of `linear_cross_entropy`: the CPU path and, in float64, the oracle."""
    wide = torch.promote_types(x.dtype, torch.float32)
    if rows is None:
        rows = (labels != ignore_index).nonzero().squeeze(1)
    bias = None if bias is None else bias.to(wide)
    logits = F.linear(x[rows].to(wide), weight.to(wide), bias)
    losses = F.cross_entropy(logits, labels[rows], ignore_index=ignore_index, reduction="none")
    if reduction == "none":
        return losses.new_zeros(len(x)).index_copy(0, rows, losses)
    total = losses.sum()
    if reduction == "sum":
        return total
    return total / (labels[rows] != ignore_index).sum().clamp(min=1)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    rows: Tensor | None = None,
) -> Tensor:
    """Cross-entropy of ``x @ weight.T + bias`` against ``labels``, without ``[T, V]`` logits.

    Args:
        x: ``[T, C]``; float32, float16 or bfloat16.
        weight: ``[V, C]`` on the device of ``x``.
        labels: ``[T]`` int64, each in ``0 .. V - 1`` or equal to ``ignore_index``.
        bias: ``[V]``, optional.
        ignore_index: The label of rows that do not count.
        reduction: "mean" over the labelled rows (0 when there are none), "sum", or "none".
        rows: ``[R]`` int64, distinct indices that include every labelled row, when the caller
            knows them: then a GPU is never asked for their number.

    Returns:
        Scalar float32, or ``[T]`` float32 for "none" (zero at ignored rows).

    Raises:
        ValueError: A shape, dtype, device, reduction or (on CPU) label breaks the rules above.
    """
    _check.tensor("x", x, ndim=2)
    _check.dtype("x", x)
    _check.tensor("weight", weight, ndim=2)
    _check.dtype("weight", weight)
    _check.device("weight", weight, x.device)
    if weight.shape[1] != x.shape[1] or not len(weight):
        raise _check.error("weight", f"shape (V, {x.shape[1]})", tuple(weight.shape))
    if bias is not None:
        _check.vector("bias", bias, len(weight), x.device)
    _check.tensor("labels", labels)
    _check.dtype("labels", labels, (torch.int64,))
    _check.shape("labels", labels, x.shape[:1])
    _check.device("labels", labels, x.device)
    if reduction not in REDUCTIONS:
        raise _check.error("reduction", f"one of {', '.join(REDUCTIONS)}", repr(reduction))
    if rows is not None:
        _check.tensor("rows", rows, ndim=1)
        _check.dtype("rows", rows, (torch.int64,))
        _check.device("rows", rows, x.device)
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(labels, rows, len(weight), ignore_index)
    return linear_cross_entropy_reference(x, weight, labels, bias, ignore_index, reduction, rows)


def _check_values(labels: Tensor, rows: Tensor | None, vocabulary: int, ignore_index: int) -> None:
    wrong = labels[((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)]
    if len(wrong):
        rule = f"values in 0..{vocabulary - 1} or {ignore_index}"
        raise _check.error("labels", rule, int(wrong[0]))
    if rows is not None and len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(labels):
        outside = rows.min() if rows.min() < 0 else rows.max()
        raise _check.error("rows", f"values in 0..{len(labels) - 1}", int(outside))


_runtime.operator(linear_cross_entropy, linear_cross_entropy_reference)
