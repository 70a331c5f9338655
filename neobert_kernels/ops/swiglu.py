"""Gated linear units on one packed projection: ``y = act(g) * b`` with ``x = [g, b]``.

The first half of the last axis is activated: by ``silu(g) = g * sigmoid(g)`` in `swiglu`, by the
erf form of GELU in `geglu`. All arithmetic is float32; the result is rounded once.

Source: Shazeer 2020, arXiv:2002.05202, section 2.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from neobert_kernels import _check, _runtime


def _gated(activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    g, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return (activation(g) * b).to(x.dtype)


def swiglu_reference(x: Tensor) -> Tensor:
    """The contract of `swiglu` in plain PyTorch: the CPU path and, in float64, the oracle."""
    return _gated(torch.nn.functional.silu, x)


def geglu_reference(x: Tensor) -> Tensor:
    """The contract of `geglu` in plain PyTorch: the CPU path and, in float64, the oracle."""
    return _gated(torch.nn.functional.gelu, x)


def _check_arguments(x: Tensor) -> None:
    _check.tensor("x", x, least_ndim=1)
    _check.dtype("x", x)
    if x.shape[-1] == 0 or x.shape[-1] % 2:
        raise _check.error("x", "an even number of channels (gate, then value)", x.shape[-1])


def swiglu(x: Tensor) -> Tensor:
    """``silu(first half) * second half`` of the last axis.

    Args:
        x: ``[..., 2F]``; float32, float16 or bfloat16.

    Returns:
        ``[..., F]`` in ``x.dtype``; ``x`` is not overwritten.

    Raises:
        ValueError: A shape or dtype breaks the rules above.
    """
    _check_arguments(x)
    return swiglu_reference(x)


def geglu(x: Tensor) -> Tensor:
    """``gelu(first half) * second half`` of the last axis, with the erf form of GELU.

    Args:
        x: ``[..., 2F]``; float32, float16 or bfloat16.

    Returns:
        ``[..., F]`` in ``x.dtype``; ``x`` is not overwritten.

    Raises:
        ValueError: A shape or dtype breaks the rules above.
    """
    _check_arguments(x)
    return geglu_reference(x)


_runtime.operator(swiglu, swiglu_reference)
_runtime.operator(geglu, geglu_reference)
