"""Rotary position embedding: pair i of a head turns by ``position * theta**(-2i / D)``.

Pairs are ``(i, i + D/2)``, the half-split layout, or ``(2i, 2i + 1)``, interleaved. Angles, cosines
and sines are float32 whatever the model's dtype; the rotation is float32 and rounded once.

Source: Su et al. 2021, arXiv:2104.09864, section 3.4.2.
"""

import torch
from torch import Tensor

from neobert_kernels import _check, _runtime


def rope_table_reference(
    positions: Tensor, dim: int, theta: float = 10000.0
) -> tuple[Tensor, Tensor]:
    """The contract of `rope_table` in plain PyTorch."""
    even = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32)
    angle = positions.float()[:, None] * (1.0 / theta ** (even / dim))
    return angle.cos(), angle.sin()


def rope_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """The contract of `rope` in plain PyTorch: the CPU path and, in float64, the oracle."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    cos, sin = cos.to(wide.dtype)[:, None], sin.to(wide.dtype)[:, None]
    a, b = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, dim=-1)
    pair = (a * cos - b * sin, a * sin + b * cos)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return turned.to(x.dtype)


def check_table(cos: Tensor, sin: Tensor, tokens: int, dim: int, where: torch.device) -> None:
    """``cos`` and ``sin`` must be float32 ``[T, D / 2]`` on the device of the rotated tensor."""
    if dim % 2:
        raise _check.error("x", "an even head size", dim)
    for name, table in (("cos", cos), ("sin", sin)):
        _check.tensor(name, table)
        _check.dtype(name, table, (torch.float32,))
        _check.shape(name, table, (tokens, dim // 2))
        _check.device(name, table, where)


def rope_table(positions: Tensor, dim: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines for `rope` and `attention`.

    Args:
        positions: ``[T]`` integers, one for each packed token.
        dim: Head size D, even.
        theta: Base of the wavelengths.

    Returns:
        ``(cos, sin)``, each ``[T, D / 2]`` float32.

    Raises:
        ValueError: ``positions`` is not an integer vector, ``dim`` not even, ``theta`` not over 0.
    """
    _check.tensor("positions", positions, ndim=1)
    _check.dtype("positions", positions, (torch.int64, torch.int32))
    if not isinstance(dim, int) or dim < 2 or dim % 2:
        raise _check.error("dim", "an even number, at least 2", dim)
    _check.positive("theta", theta)
    return rope_table_reference(positions, dim, theta)


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate every head of packed queries or keys by its token's angles.

    Args:
        x: ``[T, H, D]``; float32, float16 or bfloat16; any strides.
        cos, sin: ``[T, D / 2]`` float32, from `rope_table`.
        interleaved: True for pairs ``(2i, 2i + 1)`` (NeoBERT), False for ``(i, i + D / 2)``.

    Returns:
        ``[T, H, D]`` in ``x.dtype``.

    Raises:
        ValueError: A shape, dtype or device breaks the rules above.
    """
    _check.tensor("x", x, ndim=3)
    _check.dtype("x", x)
    check_table(cos, sin, x.shape[0], x.shape[2], x.device)
    return rope_reference(x, cos, sin, interleaved)


_runtime.operator(rope_table, rope_table_reference)
_runtime.operator(rope, rope_reference)
