"""Root-mean-square normalization: ``y = weight * n`` with ``n = x * rsqrt(mean(x**2) + eps)``.

`add_rms_norm` first forms ``h = x + residual`` and normalizes ``h`` as it is stored, so that
``add_rms_norm(x, r)`` is ``rms_norm(x + r)`` bit for bit. Means run over the last axis. All
arithmetic is float32; each result is rounded once.

With ``g = dy * weight`` and ``s = rsqrt(...)`` the backward is ``dx = s * (g - n * mean(g * n))``
(plus ``dh`` where ``h`` itself was used) and ``dweight = sum(dy * n)`` over rows; ``n`` is
recomputed, so the forward saves only its input.

Source: Zhang and Sennrich 2019, arXiv:1910.07467, section 4.
"""

from typing import Any

import torch
from torch import Tensor

from neobert_kernels import _check, _runtime
from neobert_kernels.ops import _norms


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """The contract of `rms_norm` in plain PyTorch: the CPU path and, in float64, the oracle."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    n = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight.to(wide.dtype) * n).to(x.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """The contract of `add_rms_norm`. PyTorch adds 16-bit floats in float32 and rounds once."""
    h = x + residual
    return rms_norm_reference(h, weight, eps), h


def _launch_forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norms.forward(x, None, weight, None, eps, centered=False)[0]


def _launch_add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _norms.forward(x, residual, weight, None, eps, centered=False)


def _launch_backward(
    dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _norms.backward(dy, dh, x, weight, None, eps, centered=False)[:2]


def _fake_forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _fake_forward(x, weight, eps), _fake_forward(x, weight, eps)


def _fake_backward(
    dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return _fake_forward(x, weight, eps), _fake_forward(weight, weight, eps)


_forward = _runtime.register(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _launch_forward, _fake_forward
)
_add_forward = _runtime.register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor)",
    _launch_add_forward,
    _fake_add_forward,
    extension=True,
)
_backward = _runtime.register(
    "rms_norm_backward(Tensor dy, Tensor? dh, Tensor x, Tensor weight, float eps)"
    " -> (Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        return _forward(x, weight, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_backward(dy, None, *ctx.saved_tensors, ctx.eps), None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        y, h = _add_forward(x, residual, weight, eps)
        ctx.save_for_backward(h, weight)
        ctx.eps = eps
        ctx.set_materialize_grads(False)  # a post-norm block leaves h unused: no zeros to read
        return y, h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dh: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return dh, dh, None, None
        dx, dweight = _backward(dy, dh, *ctx.saved_tensors, ctx.eps)
        return dx, dx, dweight, None


_apply = _runtime.differentiable(_RMSNorm, _forward)
_apply_add = _runtime.differentiable(_AddRMSNorm, _add_forward)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """Scale each row of ``x`` to unit root mean square, then multiply by ``weight``.

    Args:
        x: ``[..., C]`` with ``C <= 16384``; float32, float16 or bfloat16; any strides.
        weight: ``[C]`` on the device of ``x``; its dtype may differ.
        eps: Added to the mean square, so in the squared unit of ``x``.

    Returns:
        ``[..., C]`` in ``x.dtype``, contiguous on a GPU. Differentiable once in both tensors.

    Raises:
        ValueError: A shape, dtype, device or ``eps`` breaks the rules above.
    """
    _check.channels("x", x, "weight", weight, _norms.MAX_CHANNELS)
    _check.positive("eps", eps, zero=True)
    if not _runtime.use_kernel(x):
        return rms_norm_reference(x, weight, eps)
    return _apply(x, weight, eps)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Add, then normalize: ``h = x + residual``, ``y = rms_norm(h, weight, eps)``, in one pass.

    Args:
        x: ``[..., C]`` as in `rms_norm`.
        residual: The shape, dtype and device of ``x``.
        weight: ``[C]`` on the device of ``x``; its dtype may differ.
        eps: Added to the mean square of ``h``.

    Returns:
        ``(y, h)``, both ``[..., C]`` in ``x.dtype``; ``h`` is the next residual.

    Raises:
        ValueError: A shape, dtype, device or ``eps`` breaks the rules above.
    """
    _check.channels("x", x, "weight", weight, _norms.MAX_CHANNELS)
    _check.like("residual", residual, "x", x)
    _check.positive("eps", eps, zero=True)
    if not _runtime.use_kernel(x):
        return add_rms_norm_reference(x, residual, weight, eps)
    return _apply_add(x, residual, weight, eps)


_runtime.operator(
    rms_norm,
    rms_norm_reference,
    _norms.KERNELS,
    lambda sm: _norms.launches("rms_norm", added=False, centered=False),
)
_runtime.operator(
    add_rms_norm,
    add_rms_norm_reference,
    _norms.KERNELS,
    lambda sm: _norms.launches("add_rms_norm", added=True, centered=False),
)
