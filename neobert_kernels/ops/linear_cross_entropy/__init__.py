"""Cross-entropy of a linear layer at the labelled rows only: the loss of masked language models.

``logits = x @ weight.T + bias`` is formed for rows whose label is not ``ignore_index``; ignored
rows cost nothing and get a gradient of zero. With ``p = softmax(logits)`` and the weight ``g`` of a
row in the loss, ``dlogits = g * (p - onehot(label))``, ``dx = dlogits @ weight``,
``dweight = dlogits.T @ x``, ``dbias = sum(dlogits)``.

The matrix products are PyTorch's; between them one kernel turns a step of float32 logits into
losses and into ``dlogits``, rounded once to the dtype of the products. For a mean or a sum that
happens in the forward, where every row has the same weight: logits are formed once, three
products in all, and the backward only scales. With ``reduction="none"`` the weights arrive with
the backward, which forms the logits again: four products. Without gradients it is one.

Memory, beyond inputs and returned gradients, for R labelled rows in a dtype of s bytes, with V'
for V rounded up to 64: ``4 * step * V' + s * R * C`` bytes for the loss alone, with gradients
``(4 * step + s * chunk) * V' + 4 * V * C + (s + 4) * R * C``. `kernels.plan` chooses the rows of a
step and a chunk: ``4 * step * V' <= 32 MiB`` and ``s * chunk * V' <= 72 MiB``, except that a step
has at least 128 rows and a chunk 512. Inputs that are cast are copied first.
"""

from typing import Any

import torch
from torch import Tensor

from neobert_kernels import _check, _runtime
from neobert_kernels.ops.linear_cross_entropy import kernels
from neobert_kernels.ops.linear_cross_entropy.reference import (
    Stats,
    linear_cross_entropy_reference,
    linear_cross_entropy_with_stats_reference,
    reduced,
    row_indices,
)

REDUCTIONS = ("mean", "sum", "none")

_losses_and_gradients = _runtime.register(
    "linear_cross_entropy(Tensor x, Tensor weight, Tensor labels, Tensor? bias, Tensor rows,"
    " Tensor? upstream, int ignore_index, ScalarType dtype, bool x_gradient, bool weight_gradient,"
    " bool bias_gradient) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    kernels.launch,
    kernels.fake,
)
_scale = _runtime.register(
    "linear_cross_entropy_scale(Tensor gradient, Tensor scale, Tensor? rows, SymInt T,"
    " ScalarType dtype) -> Tensor",
    kernels.launch_scale,
    kernels.fake_scale,
)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, rows: Tensor,
        ignore_index: int, reduction: str, dtype: torch.dtype, wanted: tuple[bool, bool, bool],
    ) -> Stats:  # fmt: skip
        ctx.reduction, ctx.wanted, ctx.T = reduction, wanted, x.shape[0]
        ctx.dtypes = (x.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype)
        ctx.options = (ignore_index, dtype)
        late = reduction == "none"
        losses, correct, count, *gradients = _losses_and_gradients(
            x, weight, labels, bias, rows, None, ignore_index, dtype,
            *((False, False, False) if late else wanted),
        )  # fmt: skip
        if late:
            ctx.save_for_backward(x, weight, labels, bias, rows)
        else:
            ctx.save_for_backward(count, rows, *gradients)
        loss = losses.clone() if late else reduced(losses, count, reduction)
        ctx.mark_non_differentiable(losses, correct)
        return loss, losses, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor, *_: Any) -> tuple[Any, ...]:
        if ctx.reduction == "none":
            x, weight, labels, bias, rows = ctx.saved_tensors
            # What arrives at an ignored row (0 / 0 of the caller's, say) changes nothing.
            counted = dloss.where(labels != ctx.options[0], 0.0)
            # Weights of at most 1 keep 16-bit dlogits from overflowing under a loss scale.
            scale = counted.abs().amax().clamp(min=1e-30) if len(dloss) else counted.sum()
            upstream = (counted / scale).contiguous()
            dx, dweight, dbias = _losses_and_gradients(
                x, weight, labels, bias, rows, upstream, *ctx.options, *ctx.wanted
            )[3:]
        else:
            count, rows, dx, dweight, dbias = ctx.saved_tensors
            scale = dloss / count.clamp(min=1) if ctx.reduction == "mean" else dloss.contiguous()
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        return (
            _scale(dx, scale, rows, ctx.T, x_dtype) if ctx.wanted[0] else None,
            _scale(dweight, scale, None, dweight.shape[0], weight_dtype) if ctx.wanted[1] else None,
            (dbias * scale).to(bias_dtype) if ctx.wanted[2] else None,
            *(None,) * 6,
        )


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    rows: Tensor | int | None = None,
) -> Tensor:
    """Cross-entropy of ``x @ weight.T + bias`` against ``labels``, without ``[T, V]`` logits.

    Logits and loss are float32 for every input dtype. The products run in the dtype of ``x`` and
    ``weight``, in float32 if these two differ, and under autocast in autocast's dtype, to which
    both are then cast. Sums are float32, and a gradient is rounded once, to its tensor's dtype.
    The memory used is stated at the top of this module.

    Args:
        x: ``[T, C]``; float32, float16 or bfloat16; any strides.
        weight: ``[V, C]`` on the device of ``x``.
        labels: ``[T]`` int64, each in ``0 .. V - 1`` or equal to ``ignore_index``. On a GPU, where
            looking would cost a synchronization, another label makes the loss NaN.
        bias: ``[V]``, optional.
        ignore_index: The label of rows that do not count.
        reduction: "mean" over the labelled rows (0 when there are none), "sum", or "none".
        rows: ``[R]`` int64, distinct indices that include every labelled row, or an int, at least
            the number of labelled rows. With either a GPU is never waited for, and a compiled or
            captured graph has fixed shapes; without, one synchronization counts the labels. On a
            GPU labelled rows that are left out do not count.

    Returns:
        Scalar float32, or ``[T]`` float32 for "none" (zero at ignored rows). Differentiable once
        on a GPU; the gradient of "none" costs one more product, and no gradient costs nothing.

    Raises:
        ValueError: A shape, dtype, device, reduction or (on CPU) label or row breaks the rules.
    """
    return _dispatch(x, weight, labels, bias, ignore_index, reduction, rows)[0]


def linear_cross_entropy_with_stats(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    rows: Tensor | int | None = None,
) -> Stats:
    """`linear_cross_entropy` with what a training log shows, from the same pass.

    Args, raises: as `linear_cross_entropy`.

    Returns:
        ``(loss, losses, correct)``: the loss; ``[T]`` float32 losses of the rows, zero where
        ignored; ``[T]`` bool, true at labelled rows of which no logit is larger than the label's.
        Only the loss is differentiable.
    """
    return _dispatch(x, weight, labels, bias, ignore_index, reduction, rows)


def _dispatch(
    x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, ignore_index: int,
    reduction: str, rows: Tensor | int | None,
) -> Stats:  # fmt: skip
    _check_arguments(x, weight, labels, bias, ignore_index, reduction, rows)
    if isinstance(rows, int):
        rows = min(rows, len(labels))
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(labels, rows, len(weight), ignore_index)
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    else:
        dtype = x.dtype if x.dtype == weight.dtype else torch.float32
    if not _runtime.use_kernel(x):
        if torch.is_autocast_enabled(kind):
            x, weight = x.to(dtype), weight.to(dtype)
        return linear_cross_entropy_with_stats_reference(
            x, weight, labels, bias, ignore_index, reduction, rows
        )
    tensors = (x, weight, bias)
    needs = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]
    found = row_indices(labels, rows, ignore_index)
    return _LinearCrossEntropy.apply(
        x, weight, bias, labels, found, ignore_index, reduction, dtype, tuple(needs)
    )


def _check_arguments(
    x: Any, weight: Any, labels: Any, bias: Any, ignore_index: Any, reduction: str, rows: Any
) -> None:
    _check.tensor("x", x, ndim=2)
    _check.dtype("x", x)
    _check.tensor("weight", weight, ndim=2)
    _check.dtype("weight", weight)
    _check.device("weight", weight, x.device)
    if not x.shape[1]:
        raise _check.error("x", "at least one channel", tuple(x.shape))
    if weight.shape[1] != x.shape[1] or not len(weight):
        raise _check.error("weight", f"shape (V, {x.shape[1]})", tuple(weight.shape))
    if bias is not None:
        _check.vector("bias", bias, len(weight), x.device)
    _check.tensor("labels", labels)
    _check.dtype("labels", labels, (torch.int64,))
    _check.shape("labels", labels, x.shape[:1])
    _check.device("labels", labels, x.device)
    _check.label("ignore_index", ignore_index)
    if reduction not in REDUCTIONS:
        raise _check.error("reduction", f"one of {', '.join(REDUCTIONS)}", repr(reduction))
    if isinstance(rows, int) and not isinstance(rows, bool):
        if rows < 0:
            raise _check.error("rows", "a number of rows, at least 0", rows)
    elif rows is not None:
        if not isinstance(rows, Tensor):
            raise _check.error("rows", "a torch.Tensor, an int or None", repr(rows))
        _check.tensor("rows", rows, ndim=1)
        _check.dtype("rows", rows, (torch.int64,))
        _check.device("rows", rows, x.device)


def _check_values(
    labels: Tensor, rows: Tensor | int | None, vocabulary: int, ignore_index: int
) -> None:
    _check.within("labels", labels, vocabulary, ignore_index)
    if rows is None:
        return
    labelled = labels != ignore_index
    wanted = int(labelled.sum())
    if isinstance(rows, int):
        if rows < wanted:
            raise _check.error("rows", f"at least the {wanted} labelled rows", rows)
        return
    if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < len(labels):
        outside = rows.min() if rows.min() < 0 else rows.max()
        raise _check.error("rows", f"values in 0..{len(labels) - 1}", int(outside))
    if len(rows.unique()) < len(rows):
        raise _check.error("rows", "distinct values", "one of them twice")
    if int(labelled[rows].sum()) < wanted:
        rule = f"every labelled row ({wanted}) among them"
        raise _check.error("rows", rule, int(labelled[rows].sum()))


_runtime.operator(
    linear_cross_entropy, linear_cross_entropy_reference, kernels.KERNELS, kernels.launches
)
