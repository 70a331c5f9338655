"""Layer normalization: ``y = weight * (x - mean(x)) * rsqrt(var(x) + eps) + bias``.

`add_layer_norm` first forms ``h = x + residual`` and normalizes ``h`` as it is stored. Mean and
(biased) variance run over the last axis. All arithmetic is float32; each result is rounded once.

Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450.
"""

import torch
from torch import Tensor

from neobert_kernels import _check, _runtime

MAX_CHANNELS = 16384


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """The contract of `layer_norm` in plain PyTorch: the CPU path and, in float64, the oracle."""
    wide = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(wide)
    y = torch.nn.functional.layer_norm(x.to(wide), x.shape[-1:], weight.to(wide), bias, eps)
    return y.to(x.dtype)


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The contract of `add_layer_norm`. PyTorch adds 16-bit floats in float32, rounding once."""
    h = x + residual
    return layer_norm_reference(h, weight, bias, eps), h


def _check_arguments(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    _check.channels("x", x, "weight", weight, MAX_CHANNELS)
    if bias is not None:
        _check.vector("bias", bias, x.shape[-1], x.device)
    _check.positive("eps", eps, zero=True)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Shift each row of ``x`` to zero mean, scale it to unit variance, then apply weight and bias.

    Args:
        x: ``[..., C]`` with ``C <= 16384``; float32, float16 or bfloat16.
        weight, bias: ``[C]`` on the device of ``x``, in any of these dtypes; no bias means zero.
        eps: Added to the variance, so in the squared unit of ``x``.

    Returns:
        ``[..., C]`` in ``x.dtype``.

    Raises:
        ValueError: A shape, dtype, device or ``eps`` breaks the rules above.
    """
    _check_arguments(x, weight, bias, eps)
    return layer_norm_reference(x, weight, bias, eps)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Add, then normalize: ``h = x + residual``, ``y = layer_norm(h, weight, bias, eps)``.

    Args:
        x: ``[..., C]`` as in `layer_norm`.
        residual: The shape, dtype and device of ``x``.
        weight, bias, eps: As in `layer_norm`.

    Returns:
        ``(y, h)``, both ``[..., C]`` in ``x.dtype``; ``h`` is a pre-norm block's next residual.

    Raises:
        ValueError: A shape, dtype, device or ``eps`` breaks the rules above.
    """
    _check_arguments(x, weight, bias, eps)
    _check.like("residual", residual, "x", x)
    return add_layer_norm_reference(x, residual, weight, bias, eps)


_runtime.operator(layer_norm, layer_norm_reference)
_runtime.operator(add_layer_norm, add_layer_norm_reference)
