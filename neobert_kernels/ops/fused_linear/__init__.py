"""A Linear layer for few rows, with the norm before it and the activation behind it.

``h = x + residual``, ``u = norm(h)``, ``z = u @ weight.T + bias``, ``y = act(z)``: one launch. The
norm is `rms_norm` or `layer_norm`; ``act`` is the erf form of GELU or, over the halves of ``z``,
the gated unit of `swiglu` or `geglu`. Each part may be missing.

Few rows keep no GPU busy: a product's time is that of its weights' way from memory, and of the
launches around it. So every program normalizes the rows again, which it finds in L2, and reads its
columns' weights before it looks at them. A sum over K has a slice for each warp, and the slices are
added in order, so a row's bits do not depend on the rows beside it. The kernel takes any number of
rows and reads all weights once for every 16.

Rounding: ``h`` and ``u`` are rounded as by `add_rms_norm` and `add_layer_norm`; products are exact,
sums, bias and activation float32, and ``y`` is rounded once. float32 inputs are multiplied as IEEE
float32, never as TF32. There is no gradient.

Source: the parts are those of `rms_norm`, `layer_norm`, `swiglu` and ``F.linear``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neobert_kernels import _check, _runtime
from neobert_kernels.ops.fused_linear import launch
from neobert_kernels.ops.fused_linear.kernel import fused_linear_kernel
from neobert_kernels.ops.fused_linear.launch import GATED
from neobert_kernels.ops.layer_norm import layer_norm_reference
from neobert_kernels.ops.rms_norm import rms_norm_reference
from neobert_kernels.ops.swiglu import geglu_reference, swiglu_reference

NORMS = ("rms_norm", "layer_norm")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "swiglu": swiglu_reference,
    "geglu": geglu_reference,
}


def fused_linear_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The contract of `fused_linear` in plain PyTorch: the CPU path and, in float64, the oracle."""
    h = x if residual is None else x + residual
    u = h
    if norm_weight is not None:
        if norm == "layer_norm":
            u = layer_norm_reference(h, norm_weight, norm_bias, eps)
        else:
            u = rms_norm_reference(h, norm_weight, eps)
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        z = F.linear(u.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    y = z if activation is None else ACTIVATIONS[activation](z)
    return y.to(x.dtype), h, u


def _launch(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    weight: Tensor, bias: Tensor | None, eps: float, activation: str | None, centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y, h, u = _fake(
        x, residual, norm_weight, norm_bias, weight, bias, eps, activation, centered
    )  # fmt: skip
    if not x.numel():
        return y, h, u
    launch.ready(
        _runtime.as_rows(x), None if residual is None else _runtime.as_rows(residual),
        None if norm_weight is None else norm_weight.contiguous(),
        None if norm_bias is None else norm_bias.contiguous(),
        _runtime.neighbouring(weight), None if bias is None else bias.contiguous(),
        y.view(-1, y.shape[-1]), None if residual is None else h,
        None if norm_weight is None else u, eps, activation, centered,
    ).start()  # fmt: skip
    return y, h, u


def _fake(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    weight: Tensor, bias: Tensor | None, eps: float, activation: str | None, centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """An empty tensor stands for ``h`` or ``u`` where it is nothing new."""
    outputs = weight.shape[0] // (2 if activation in GATED else 1)
    return (
        x.new_empty((*x.shape[:-1], outputs)),
        x.new_empty((0,) if residual is None else x.shape),
        x.new_empty((0,) if norm_weight is None else x.shape),
    )


_forward = _runtime.register(
    "fused_linear(Tensor x, Tensor? residual, Tensor? norm_weight, Tensor? norm_bias,"
    " Tensor weight, Tensor? bias, float eps, str? activation, bool centered)"
    " -> (Tensor, Tensor, Tensor)",
    _launch,
    _fake,
)


def fused_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    norm: str | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``act(norm(x + residual) @ weight.T + bias)``, made for few rows: at most some dozens.

    It takes any number of them, and PyTorch's product is faster for many. It follows no autocast.

    Args:
        x: ``[..., K]``; float32, float16 or bfloat16; any strides.
        weight: ``[N, K]`` in the dtype of ``x``, N at most 524,280 where a kernel runs. A copy is
            made of one whose channels are no neighbours in memory.
        bias: ``[N]`` in the dtype of ``x``, optional.
        residual: The shape, dtype and device of ``x``, optional.
        norm: "rms_norm", "layer_norm" or None. Where a kernel runs, with one or with a residual,
            K is at most 1,024, in float32 384.
        norm_weight: ``[K]``; needed with a norm, its dtype may differ.
        norm_bias: ``[K]``, of "layer_norm" only, optional.
        eps: Of the norm.
        activation: "gelu" (erf), or "swiglu" or "geglu", whose gate is made by the first half of
            the weights' rows; None: none.

    Returns:
        ``(y, h, u)``: ``[..., N]``, of a gated unit ``[..., N / 2]``; ``x + residual``, which is
        ``x`` without one; and its norm, which is ``h`` without one. All in ``x.dtype``, without
        gradient.

    Raises:
        ValueError: A shape, dtype, device or name breaks the rules above, or a gradient would be
            recorded.
    """
    _check_arguments(x, weight, bias, residual, norm, norm_weight, norm_bias, eps, activation)
    if not _runtime.use_kernel(x):
        return fused_linear_reference(
            x, weight, bias, residual=residual, norm=norm, norm_weight=norm_weight,
            norm_bias=norm_bias, eps=eps, activation=activation,
        )  # fmt: skip
    y, h, u = _forward(
        x, residual, norm_weight, norm_bias, weight, bias, float(eps), activation,
        norm == "layer_norm",
    )  # fmt: skip
    h = x if residual is None else h
    return y, h, h if norm is None else u


def _check_arguments(
    x: Any, weight: Any, bias: Any, residual: Any, norm: Any, norm_weight: Any, norm_bias: Any,
    eps: Any, activation: Any,
) -> None:  # fmt: skip
    _check.product(x, weight, bias)
    K = x.shape[-1]
    if activation is not None and activation not in tuple(ACTIVATIONS):
        raise _check.error("activation", f"None or one of {', '.join(ACTIVATIONS)}", activation)
    if activation in GATED and len(weight) % 2:
        rule = f"an even number of rows with activation={activation!r}"
        raise _check.error("weight", rule, len(weight))
    if residual is not None:
        _check.like("residual", residual, "x", x)
    if norm is not None and norm not in NORMS:
        raise _check.error("norm", f"None or one of {', '.join(NORMS)}", norm)
    if (norm is None) != (norm_weight is None):
        rule = "None without a norm" if norm is None else f"a tensor with norm={norm!r}"
        raise _check.error("norm_weight", rule, "one" if norm is None else None)
    if norm_weight is not None:
        _check.vector("norm_weight", norm_weight, K, x.device)
    if norm_bias is not None:
        if norm != "layer_norm":
            raise _check.error("norm_bias", "None without norm='layer_norm'", "one")
        _check.vector("norm_bias", norm_bias, K, x.device)
    _check.positive("eps", eps, zero=True)
    if len(weight) > launch.MOST_OUTPUTS and _runtime.use_kernel(x):
        raise _check.error(
            "weight", f"at most {launch.MOST_OUTPUTS} rows where kernels run", len(weight)
        )
    held = residual is not None or norm is not None
    if held and not launch.takes(K, x.element_size()) and _runtime.use_kernel(x):
        most = (
            f"at most {launch.MOST_CHANNELS[x.element_size()]} channels of {_check.plain(x.dtype)}"
        )
        raise _check.error("x", f"{most} with a norm or a residual, where kernels run", K)
    _check.no_gradient(
        x=x, weight=weight, bias=bias, residual=residual, norm_weight=norm_weight,
        norm_bias=norm_bias,
    )  # fmt: skip


_runtime.operator(fused_linear, fused_linear_reference, (fused_linear_kernel,), launch.launches)
