"""Gated linear units on one packed projection: ``y = act(g) * b`` with ``x = [g, b]``.

The first half of the last axis is activated: by ``silu(g) = g * sigmoid(g)`` in `swiglu`, by the
erf form of GELU, ``g * Phi(g)``, in `geglu`. Arithmetic is float32; each result is rounded once.

The backward is ``dx = [dy * b * act'(g), dy * act(g)]`` with ``silu'(g) = p * (1 + g * (1 - p))``
for ``p = sigmoid(g)``, and ``gelu'(g) = Phi(g) + g * phi(g)`` for the normal density ``phi``. The
activation is recomputed, so the forward saves only its input.

Source: Shazeer 2020, arXiv:2002.05202, section 2.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neobert_kernels import _check, _runtime
from neobert_kernels._triton import tl, triton


def _gated(activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    g, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return (activation(g) * b).to(x.dtype)


def swiglu_reference(x: Tensor) -> Tensor:
    """The contract of `swiglu` in plain PyTorch: the CPU path and, in float64, the oracle."""
    return _gated(torch.nn.functional.silu, x)


def geglu_reference(x: Tensor) -> Tensor:
    """The contract of `geglu` in plain PyTorch: the CPU path and, in float64, the oracle."""
    return _gated(torch.nn.functional.gelu, x)


@triton.jit
def _tile(rows, F: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """The program's rows as 64-bit ``[ROWS, 1]``, its columns ``[1, COLUMNS]``, and their mask.

    Neighbouring programs take neighbouring columns, then the next rows.
    """
    BLOCKS: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    row = program // BLOCKS * ROWS + tl.arange(0, ROWS)[:, None]
    column = program % BLOCKS * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    inside = row < rows
    if F % COLUMNS != 0:
        inside = inside & (column < F)
    return row.to(tl.int64), column, inside


@triton.jit
def _activate(g, GELU: tl.constexpr):
    """``act(g)`` and ``act'(g)``; both stay finite for every finite ``g``."""
    if GELU:
        p = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)
        slope = p + g * (tl.exp(-0.5 * g * g) * 0.3989422804014327)
    else:
        p = 1.0 / (1.0 + tl.exp(-g))
        slope = p * (1.0 + g * (1.0 - p))
    return g * p, slope


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr, y_ptr, rows, x_stride,
    F: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    row, column, inside = _tile(rows, F, COLUMNS, ROWS)
    # Read once: what stays in the cache is the result, which the next product reads.
    g_ptr = x_ptr + row * x_stride + column
    g = tl.load(g_ptr, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    b = tl.load(g_ptr + F, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    activated, _ = _activate(g, GELU)
    y = (activated * b).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * F + column, y, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    dy_ptr, x_ptr, dx_ptr, rows, dy_stride, x_stride,
    F: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    row, column, inside = _tile(rows, F, COLUMNS, ROWS)
    g_ptr = x_ptr + row * x_stride + column
    dy_ptr += row * dy_stride + column
    g = tl.load(g_ptr, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    b = tl.load(g_ptr + F, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    dy = tl.load(dy_ptr, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    activated, slope = _activate(g, GELU)
    dx_ptr += row * (2 * F) + column
    tl.store(dx_ptr, (dy * b * slope).to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + F, (dy * activated).to(dx_ptr.dtype.element_ty), mask=inside)


@dataclass(frozen=True)
class Choice:
    """A program of ``warps`` warps computes ``rows`` rows by ``columns`` columns of the result."""

    columns: int
    rows: int
    warps: int = 4

    def constexprs(self, F: int, gelu: bool) -> dict[str, Any]:
        return {"F": F, "COLUMNS": self.columns, "ROWS": self.rows, "GELU": gelu}


@functools.cache
def choice(F: int, itemsize: int) -> Choice:
    """The widest block up to 1,024 columns that idles the fewest lanes; two vectors for each lane.

    A lane has 16 bytes of gate and of value on their way twice, so a program of four warps 8 KiB.
    At 48 registers ten of them are resident on a multiprocessor, at the 72 of the GELU's backward,
    with 12 KiB each, seven: 80 KiB, where an H200 needs about 64. Blocks of 128 bytes and more fill
    whole cache lines. Unmeasured.
    """
    widths = [128 // itemsize << i for i in range(5)]
    columns = min((w for w in widths if w <= 1024), key=lambda w: (-(-F // w) * w, -w))
    return Choice(columns, 2 * 128 * (16 // itemsize) // columns)


def _launch(
    kernel: Any,
    x: Tensor,
    gelu: bool,
    F: int,
    tensors: tuple[Tensor, ...],
    strides: tuple[int, ...],
) -> None:
    """Run ``kernel`` over the rows of ``x``; ``tensors`` and ``strides`` are its arguments."""
    tile = choice(F, x.element_size())
    rows = x.shape[0]
    if rows:
        kernel[(triton.cdiv(rows, tile.rows) * triton.cdiv(F, tile.columns),)](
            *tensors, rows, *strides, **tile.constexprs(F, gelu), num_warps=tile.warps,
            **_runtime.FP_FUSION,
        )  # fmt: skip


def _launch_forward(x: Tensor, gelu: bool) -> Tensor:
    y = _fake_forward(x, gelu)
    x = _runtime.as_rows(x)
    _launch(_forward_kernel, x, gelu, y.shape[-1], (x, y), (x.stride(0),))
    return y


def _launch_backward(dy: Tensor, x: Tensor, gelu: bool) -> Tensor:
    dx = _fake_backward(dy, x, gelu)
    dy, x = _runtime.as_rows(dy), _runtime.as_rows(x)
    _launch(_backward_kernel, x, gelu, dy.shape[-1], (dy, x, dx), (dy.stride(0), x.stride(0)))
    return dx


def _fake_forward(x: Tensor, gelu: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _fake_backward(dy: Tensor, x: Tensor, gelu: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_forward = _runtime.register(
    "gated_unit(Tensor x, bool gelu) -> Tensor", _launch_forward, _fake_forward
)
_backward = _runtime.register(
    "gated_unit_backward(Tensor dy, Tensor x, bool gelu) -> Tensor",
    _launch_backward,
    _fake_backward,
)


class _GatedUnit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gelu: bool) -> Tensor:
        ctx.save_for_backward(x)
        ctx.gelu = gelu
        return _forward(x, gelu)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return _backward(dy, *ctx.saved_tensors, ctx.gelu), None


def _check_arguments(x: Tensor) -> None:
    _check.tensor("x", x, least_ndim=1)
    _check.dtype("x", x)
    if x.shape[-1] == 0 or x.shape[-1] % 2:
        raise _check.error("x", "an even number of channels (gate, then value)", x.shape[-1])


def swiglu(x: Tensor) -> Tensor:
    """``silu(first half) * second half`` of the last axis.

    Args:
        x: ``[..., 2F]``; float32, float16 or bfloat16; any strides.

    Returns:
        ``[..., F]`` in ``x.dtype``, contiguous on a GPU; differentiable once. ``x`` is not
        overwritten.

    Raises:
        ValueError: A shape or dtype breaks the rules above.
    """
    _check_arguments(x)
    if not _runtime.use_kernel(x):
        return swiglu_reference(x)
    return _GatedUnit.apply(x, False)


def geglu(x: Tensor) -> Tensor:
    """``gelu(first half) * second half`` of the last axis, with the erf form of GELU.

    Args:
        x: ``[..., 2F]``; float32, float16 or bfloat16; any strides.

    Returns:
        ``[..., F]`` in ``x.dtype``, contiguous on a GPU; differentiable once. ``x`` is not
        overwritten.

    Raises:
        ValueError: A shape or dtype breaks the rules above.
    """
    _check_arguments(x)
    if not _runtime.use_kernel(x):
        return geglu_reference(x)
    return _GatedUnit.apply(x, True)


WIDTHS = (1152, 2048, 3072)


def _launches(name: str, gelu: bool) -> Iterator[_runtime.Launch]:
    cases = [(torch.bfloat16, F) for F in WIDTHS]
    for dtype, F in [*cases, (torch.float16, 2048), (torch.float32, 2048)]:
        tile = choice(F, dtype.itemsize)
        for kernel, direction in ((_forward_kernel, "forward"), (_backward_kernel, "backward")):
            signature = _runtime.signature(kernel, dtype)
            yield _runtime.Launch(
                kernel=kernel,
                name=f"{name}_{direction}",
                case=f"F={F} {_runtime.TRITON_TYPES[dtype]}",
                signature=signature,
                constexprs=tile.constexprs(F, gelu),
                num_warps=tile.warps,
                aligned=tuple(n for n in signature if n.endswith(("_ptr", "_stride"))),
            )


KERNELS = (_forward_kernel, _backward_kernel)
_runtime.operator(swiglu, swiglu_reference, KERNELS, lambda sm: _launches("swiglu", gelu=False))
_runtime.operator(geglu, geglu_reference, KERNELS, lambda sm: _launches("geglu", gelu=True))
