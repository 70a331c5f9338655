"""Layer normalization: ``y = weight * (x - mean(x)) * rsqrt(var(x) + eps) + bias``.

`add_layer_norm` first forms ``h = x + residual`` and normalizes ``h`` as it is stored. Mean and
(biased) variance run over the last axis. All arithmetic is float32; each result is rounded once.

The kernels are in `_norms`, with the derivative; the variance is that of the centered row, which is
in registers, so a large mean costs no accuracy. The forward saves only its input.

Source: Ba, Kiros and Hinton 2016, arXiv:1607.06450.
"""

from typing import Any

import torch
from torch import Tensor

from neobert_kernels import _check, _runtime
from neobert_kernels.ops import _norms


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


def _launch_forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return _norms.forward(x, None, weight, bias, eps, centered=True)[0]


def _launch_add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return _norms.forward(x, residual, weight, bias, eps, centered=True)


def _launch_backward(
    dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Without a bias, its gradient has no elements: an operator cannot return None."""
    dx, dweight, dbias = _norms.backward(dy, dh, x, weight, bias, eps, centered=True)
    return dx, dweight, weight.new_empty(0) if dbias is None else dbias


def _fake_forward(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    return _fake_forward(x, weight, bias, eps), _fake_forward(x, weight, bias, eps)


def _fake_backward(
    dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight))
    return dx, dweight, weight.new_empty(0) if bias is None else bias.new_empty(bias.shape)


_forward = _runtime.register(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor",
    _launch_forward,
    _fake_forward,
)
_add_forward = _runtime.register(
    "add_layer_norm(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor)",
    _launch_add_forward,
    _fake_add_forward,
    extension=True,
)
_backward = _runtime.register(
    "layer_norm_backward(Tensor dy, Tensor? dh, Tensor x, Tensor weight, Tensor? bias, float eps)"
    " -> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.eps = eps
        return _forward(x, weight, bias, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        dx, dweight, dbias = _backward(dy, None, x, weight, bias, ctx.eps)
        return dx, dweight, None if bias is None else dbias, None


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        y, h = _add_forward(x, residual, weight, bias, eps)
        ctx.save_for_backward(h, weight, bias)
        ctx.eps = eps
        ctx.set_materialize_grads(False)  # a post-norm block leaves h unused: no zeros to read
        return y, h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return dh, dh, None, None, None
        h, weight, bias = ctx.saved_tensors
        dx, dweight, dbias = _backward(dy, dh, h, weight, bias, ctx.eps)
        return dx, dx, dweight, None if bias is None else dbias, None


def _check_arguments(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> None:
    _check.channels("x", x, "weight", weight, _norms.MAX_CHANNELS)
    if bias is not None:
        _check.vector("bias", bias, x.shape[-1], x.device)
    _check.positive("eps", eps, zero=True)


_apply = _runtime.differentiable(_LayerNorm, _forward)
_apply_add = _runtime.differentiable(_AddLayerNorm, _add_forward)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """Shift each row of ``x`` to zero mean, scale it to unit variance, then apply weight and bias.

    Args:
        x: ``[..., C]`` with ``C <= 16384``; float32, float16 or bfloat16; any strides.
        weight, bias: ``[C]`` on the device of ``x``, in any of these dtypes; no bias means zero.
        eps: Added to the variance, so in the squared unit of ``x``.

    Returns:
        ``[..., C]`` in ``x.dtype``, contiguous on a GPU. Differentiable once in every tensor.

    Raises:
        ValueError: A shape, dtype, device or ``eps`` breaks the rules above.
    """
    _check_arguments(x, weight, bias, eps)
    if not _runtime.use_kernel(x):
        return layer_norm_reference(x, weight, bias, eps)
    return _apply(x, weight, bias, eps)


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
    if not _runtime.use_kernel(x):
        return add_layer_norm_reference(x, residual, weight, bias, eps)
    return _apply_add(x, residual, weight, bias, eps)


_runtime.operator(
    layer_norm,
    layer_norm_reference,
    _norms.KERNELS,
    lambda sm: _norms.launches("layer_norm", added=False, centered=True),
)
_runtime.operator(
    add_layer_norm,
    add_layer_norm_reference,
    _norms.KERNELS,
    lambda sm: _norms.launches("add_layer_norm", added=True, centered=True),
)
