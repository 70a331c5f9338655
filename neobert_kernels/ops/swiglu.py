"""Gated linear units: ``y = act(g) * b`` of one packed projection ``[g, b]``, or of two.

`swiglu` and `geglu` take both halves in one tensor, `silu_mul` and `gelu_mul` in two. The gate is
activated by ``silu(g) = g * sigmoid(g)`` or by the erf form of GELU, ``g * Phi(g)``. Arithmetic is
float32; each result is rounded once.

The backward is ``dg = dy * b * act'(g)``, ``db = dy * act(g)`` with ``silu'(g) = p * (1 + g * (1 -
p))`` for ``p = sigmoid(g)``, and ``gelu'(g) = Phi(g) + g * phi(g)`` for the normal density ``phi``.
The activation is recomputed, so the forward saves only its input. A packed input has one packed
gradient, of which the kernels write both halves in place.

Source: Shazeer 2020, arXiv:2002.05202, section 2.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neobert_kernels import _check, _runtime
from neobert_kernels._launch import MOST_PREPARED, Prepared, Ready, Rows
from neobert_kernels._triton import tl, triton


def _gated(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    wide = torch.promote_types(gate.dtype, torch.float32)
    y, up = activation(gate.to(wide)), up.to(wide)
    recorded = torch.is_grad_enabled() and (y.requires_grad or up.requires_grad)
    # Without a graph the product goes where the activation was: no second large tensor.
    return (y * up if recorded else y.mul_(up)).to(gate.dtype)


def swiglu_reference(x: Tensor) -> Tensor:
    """The contract of `swiglu` in plain PyTorch: the CPU path and, in float64, the oracle."""
    return silu_mul_reference(*x.chunk(2, dim=-1))


def geglu_reference(x: Tensor) -> Tensor:
    """The contract of `geglu` in plain PyTorch: the CPU path and, in float64, the oracle."""
    return gelu_mul_reference(*x.chunk(2, dim=-1))


def silu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The contract of `silu_mul` in plain PyTorch: the CPU path and, in float64, the oracle."""
    return _gated(torch.nn.functional.silu, gate, up)


def gelu_mul_reference(gate: Tensor, up: Tensor) -> Tensor:
    """The contract of `gelu_mul` in plain PyTorch: the CPU path and, in float64, the oracle."""
    return _gated(torch.nn.functional.gelu, gate, up)


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
def activate(g, GELU: tl.constexpr):
    """``act(g)`` and ``act'(g)``; both stay finite for every finite ``g``."""
    if GELU:
        p = 0.5 + 0.5 * tl.erf(g * 0.7071067811865476)
        slope = p + g * (tl.exp(-0.5 * g * g) * 0.3989422804014327)
    else:
        p = 1.0 / (1.0 + tl.exp(-g))
        slope = p * (1.0 + g * (1.0 - p))
    return g * p, slope


@triton.jit(do_not_specialize=["rows"])
def _gated_forward_kernel(
    g_ptr, b_ptr, y_ptr, rows, g_stride, b_stride,
    F: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    row, column, inside = _tile(rows, F, COLUMNS, ROWS)
    # Read once: what stays in the cache is the result, which the next product reads.
    g_ptr += row * g_stride + column
    b_ptr += row * b_stride + column
    g = tl.load(g_ptr, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    b = tl.load(b_ptr, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    activated, _ = activate(g, GELU)
    y = (activated * b).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + row * F + column, y, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _gated_backward_kernel(
    dy_ptr, g_ptr, b_ptr, dg_ptr, db_ptr, rows, dy_stride, g_stride, b_stride, d_stride,
    F: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    row, column, inside = _tile(rows, F, COLUMNS, ROWS)
    g_ptr += row * g_stride + column
    b_ptr += row * b_stride + column
    dy_ptr += row * dy_stride + column
    g = tl.load(g_ptr, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    b = tl.load(b_ptr, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    dy = tl.load(dy_ptr, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    activated, slope = activate(g, GELU)
    dg = (dy * b * slope).to(dg_ptr.dtype.element_ty)
    tl.store(dg_ptr + row * d_stride + column, dg, mask=inside)
    db = (dy * activated).to(db_ptr.dtype.element_ty)
    tl.store(db_ptr + row * d_stride + column, db, mask=inside)


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


def _ready(
    backward: bool, gelu: bool, F: int, tensors: tuple[Tensor, ...], strides: tuple[int, ...]
) -> Ready:
    """A kernel's launch over the rows of its first tensor; both tuples are its arguments."""
    tile = choice(F, tensors[0].element_size())
    T = tensors[0].shape[0]
    rows = Rows(at=len(tensors), block=tile.rows, columns=-(-F // tile.columns))
    prepared = _prepared(backward, tile, F, gelu)
    return Ready(prepared, (rows.programs(T), 1, 1), (*tensors, T, *strides), rows)


def _launch(
    backward: bool, gelu: bool, F: int, tensors: tuple[Tensor, ...], strides: tuple[int, ...]
) -> None:
    if len(tensors[0]):
        _ready(backward, gelu, F, tensors, strides).start()


def ready(g: Tensor, b: Tensor, y: Tensor, gelu: bool) -> Ready:
    """The forward's launch on rows ``[T, F]`` of gates and values, T over 0."""
    return _ready(False, gelu, y.shape[-1], (g, b, y), (g.stride(0), b.stride(0)))


@functools.lru_cache(MOST_PREPARED)
def _prepared(backward: bool, tile: Choice, F: int, gelu: bool) -> Prepared:
    kernel = _gated_backward_kernel if backward else _gated_forward_kernel
    return Prepared(kernel, tile.constexprs(F, gelu), num_warps=tile.warps, **_runtime.FP_FUSION)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Where both halves start, and how far their rows are apart: the first one as all of ``x``."""
    F = x.shape[-1] // 2
    return x, x.narrow(-1, F, F)


def _run_forward(g: Tensor, b: Tensor, y: Tensor, gelu: bool) -> Tensor:
    """Fill ``y`` from rows ``g`` and ``b``."""
    _launch(False, gelu, y.shape[-1], (g, b, y), (g.stride(0), b.stride(0)))
    return y


def _run_backward(
    dy: Tensor, g: Tensor, b: Tensor, dg: Tensor, db: Tensor, d_stride: int, gelu: bool
) -> None:
    """Fill ``dg`` and ``db``, both with rows ``d_stride`` apart."""
    dy = _runtime.as_rows(dy)
    strides = (dy.stride(0), g.stride(0), b.stride(0), d_stride)
    _launch(True, gelu, dy.shape[-1], (dy, g, b, dg, db), strides)


def _launch_forward(x: Tensor, gelu: bool) -> Tensor:
    return _run_forward(*_halves(_runtime.as_rows(x)), _fake_forward(x, gelu), gelu)


def _launch_backward(dy: Tensor, x: Tensor, gelu: bool) -> Tensor:
    dx = _fake_backward(dy, x, gelu)
    _run_backward(dy, *_halves(_runtime.as_rows(x)), *_halves(dx), dx.shape[-1], gelu)
    return dx


def _launch_pair_forward(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    y = _fake_pair_forward(gate, up, gelu)
    return _run_forward(_runtime.as_rows(gate), _runtime.as_rows(up), y, gelu)


def _launch_pair_backward(
    dy: Tensor, gate: Tensor, up: Tensor, gelu: bool
) -> tuple[Tensor, Tensor]:
    grads = _fake_pair_backward(dy, gate, up, gelu)
    g, b = _runtime.as_rows(gate), _runtime.as_rows(up)
    _run_backward(dy, g, b, *grads, gate.shape[-1], gelu)
    return grads


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_forward(x: Tensor, gelu: bool) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _fake_backward(dy: Tensor, x: Tensor, gelu: bool) -> Tensor:
    return _contiguous_like(x)


def _fake_pair_forward(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    return _contiguous_like(gate)


def _fake_pair_backward(dy: Tensor, gate: Tensor, up: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    return _contiguous_like(gate), _contiguous_like(up)


_forward = _runtime.register(
    "gated_unit(Tensor x, bool gelu) -> Tensor",
    _launch_forward,
    _fake_forward,
    extension=True,
)
_backward = _runtime.register(
    "gated_unit_backward(Tensor dy, Tensor x, bool gelu) -> Tensor",
    _launch_backward,
    _fake_backward,
)
_pair_forward = _runtime.register(
    "gated_pair(Tensor gate, Tensor up, bool gelu) -> Tensor",
    _launch_pair_forward,
    _fake_pair_forward,
)
_pair_backward = _runtime.register(
    "gated_pair_backward(Tensor dy, Tensor gate, Tensor up, bool gelu) -> (Tensor, Tensor)",
    _launch_pair_backward,
    _fake_pair_backward,
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


class _GatedPair(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return _pair_forward(gate, up, gelu)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_pair_backward(dy, *ctx.saved_tensors, ctx.gelu), None


_apply = _runtime.differentiable(_GatedUnit, _forward)
_apply_pair = _runtime.differentiable(_GatedPair, _pair_forward)


def _check_arguments(x: Tensor) -> None:
    _check.rows("x", x)
    F2 = x.shape[-1]
    if F2 == 0 or F2 % 2:
        raise _check.error("x", "an even number of channels (gate, then value)", F2)


def _check_pair(gate: Tensor, up: Tensor) -> None:
    _check.rows("gate", gate)
    if gate.shape[-1] == 0:
        raise _check.error("gate", "at least one channel", 0)
    _check.like("up", up, "gate", gate)


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
    return _apply(x, False)


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
    return _apply(x, True)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``: `swiglu` of two projections.

    Args:
        gate: ``[..., F]``; float32, float16 or bfloat16; any strides. No copy is made of one whose
            channels are neighbours and whose rows are evenly spaced, such as half of a projection.
        up: As ``gate``, in its shape and dtype, with strides of its own.

    Returns:
        ``[..., F]`` in ``gate.dtype``, contiguous on a GPU; differentiable once.

    Raises:
        ValueError: A shape, dtype or device breaks the rules above.
    """
    _check_pair(gate, up)
    if not _runtime.use_kernel(gate):
        return silu_mul_reference(gate, up)
    return _apply_pair(gate, up, False)


def silu_mul_over(gate: Tensor, up: Tensor) -> Tensor:
    """`silu_mul` of a ``gate`` that nobody needs any more: it may be overwritten.

    A CPU then needs no memory for a second large tensor, which a graph would keep anyway.
    """
    kept = torch.is_grad_enabled() or gate.dtype is not torch.float32 or _runtime.use_kernel(gate)
    if kept:
        return silu_mul(gate, up)
    _check_pair(gate, up)
    return torch.ops.aten.silu_(gate).mul_(up)


def gelu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """``gelu(gate) * up`` with the erf form of GELU: `geglu` of two projections.

    Args, returns, raises: as `silu_mul`.
    """
    _check_pair(gate, up)
    if not _runtime.use_kernel(gate):
        return gelu_mul_reference(gate, up)
    return _apply_pair(gate, up, True)


WIDTHS = (1152, 2048, 3072)


def _launches(name: str, gelu: bool) -> Iterator[_runtime.Launch]:
    cases = [(torch.bfloat16, F) for F in WIDTHS]
    for dtype, F in [*cases, (torch.float16, 2048), (torch.float32, 2048)]:
        tile = choice(F, dtype.itemsize)
        for kernel, direction in (
            (_gated_forward_kernel, "forward"),
            (_gated_backward_kernel, "backward"),
        ):
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


KERNELS = (_gated_forward_kernel, _gated_backward_kernel)
_runtime.operator(swiglu, swiglu_reference, KERNELS, lambda sm: _launches("swiglu", False))
_runtime.operator(geglu, geglu_reference, KERNELS, lambda sm: _launches("geglu", True))
_runtime.operator(silu_mul, silu_mul_reference, KERNELS, lambda sm: _launches("silu_mul", False))
_runtime.operator(gelu_mul, gelu_mul_reference, KERNELS, lambda sm: _launches("gelu_mul", True))
