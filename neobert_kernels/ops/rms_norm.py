"""Root-mean-square normalization: ``y = weight * n`` with ``n = x * rsqrt(mean(x**2) + eps)``.

`add_rms_norm` first forms ``h = x + residual`` and normalizes ``h`` as it is stored, so that
``add_rms_norm(x, r)`` is ``rms_norm(x + r)`` bit for bit. Means run over the last axis. All
arithmetic is float32; each result is rounded once.

With ``g = dy * weight`` and ``s = rsqrt(...)`` the backward is ``dx = s * (g - n * mean(g * n))``
(plus ``dh`` where ``h`` itself was used) and ``dweight = sum(dy * n)`` over rows; ``n`` is
recomputed, so the forward saves only its input.

Source: Zhang and Sennrich 2019, arXiv:1910.07467, section 4.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neobert_kernels import _check, _runtime
from neobert_kernels._triton import tl, triton

MAX_CHANNELS = 16384  # a program keeps whole rows in registers


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


@triton.jit
def _tile(
    start, rows, stride, j: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Offsets and mask of columns ``j * CHUNK ...`` of ``ROWS`` rows from ``start``."""
    row = start + tl.arange(0, ROWS)
    column = j * CHUNK + tl.arange(0, CHUNK)
    inside = (row < rows)[:, None]
    if (j + 1) * CHUNK > C:
        inside = inside & (column < C)[None, :]
    return row.to(tl.int64)[:, None] * stride + column[None, :], inside


@triton.jit
def _past_the_end(start, rows, ROWS: tl.constexpr):
    """1 for rows that do not exist: with an eps of 0 their scale would be infinite, dweight NaN."""
    return (start + tl.arange(0, ROWS) >= rows).to(tl.float32)


@triton.jit
def _load_row(ptr, j: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr):
    """Columns ``j * CHUNK ...`` of a ``[C]`` vector in float32, zero past its end."""
    column = j * CHUNK + tl.arange(0, CHUNK)
    if (j + 1) * CHUNK > C:
        return tl.load(ptr + column, mask=column < C, other=0.0).to(tl.float32)
    return tl.load(ptr + column).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _forward_kernel(
    x_ptr, residual_ptr, weight_ptr, y_ptr, h_ptr, rows, x_stride, residual_stride, eps,
    C: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """One program per ``ROWS`` rows, each read once and kept in registers as chunks."""
    CHUNKS: tl.constexpr = (C + CHUNK - 1) // CHUNK
    start = tl.program_id(0) * ROWS
    chunks = ()
    square_sum = _past_the_end(start, rows, ROWS)
    for j in tl.static_range(CHUNKS):
        offset, inside = _tile(start, rows, x_stride, j, C, CHUNK, ROWS)
        x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
        if HAS_RESIDUAL:
            offset, inside = _tile(start, rows, residual_stride, j, C, CHUNK, ROWS)
            x += tl.load(residual_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            offset, inside = _tile(start, rows, C, j, C, CHUNK, ROWS)
            h = x.to(h_ptr.dtype.element_ty)
            tl.store(h_ptr + offset, h, mask=inside)
            x = h.to(tl.float32)
        chunks = chunks + (x,)  # noqa: RUF005  (Triton has no unpacking)
        square_sum += tl.sum(x * x, axis=1)
    scale = tl.rsqrt(square_sum / C + eps)[:, None]
    for j in tl.static_range(CHUNKS):
        offset, inside = _tile(start, rows, C, j, C, CHUNK, ROWS)
        y = _load_row(weight_ptr, j, C, CHUNK)[None, :] * (chunks[j] * scale)
        tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _backward_kernel(
    dy_ptr, dh_ptr, x_ptr, weight_ptr, dx_ptr, partial_ptr, rows, dy_stride, dh_stride, x_stride,
    eps, C: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, HAS_DH: tl.constexpr,
):  # fmt: skip
    """Program p takes every P-th group of rows and owns row p of ``partial``: no atomics."""
    CHUNKS: tl.constexpr = (C + CHUNK - 1) // CHUNK
    dweight = ()
    for _ in tl.static_range(CHUNKS):
        dweight = dweight + (tl.zeros((ROWS, CHUNK), tl.float32),)  # noqa: RUF005
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        xs, dys = (), ()
        square_sum = _past_the_end(start, rows, ROWS)
        gx_sum = tl.zeros((ROWS,), tl.float32)
        for j in tl.static_range(CHUNKS):
            offset, inside = _tile(start, rows, x_stride, j, C, CHUNK, ROWS)
            x = tl.load(x_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            offset, inside = _tile(start, rows, dy_stride, j, C, CHUNK, ROWS)
            dy = tl.load(dy_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            g = dy * _load_row(weight_ptr, j, C, CHUNK)[None, :]
            square_sum += tl.sum(x * x, axis=1)
            gx_sum += tl.sum(g * x, axis=1)
            xs, dys = xs + (x,), dys + (dy,)  # noqa: RUF005
        scale = tl.rsqrt(square_sum / C + eps)
        gn_mean = (gx_sum * scale / C)[:, None]
        scale = scale[:, None]
        sums = ()
        for j in tl.static_range(CHUNKS):
            n = xs[j] * scale
            g = dys[j] * _load_row(weight_ptr, j, C, CHUNK)[None, :]
            dx = scale * (g - n * gn_mean)
            if HAS_DH:
                offset, inside = _tile(start, rows, dh_stride, j, C, CHUNK, ROWS)
                dx += tl.load(dh_ptr + offset, mask=inside, other=0.0).to(tl.float32)
            offset, inside = _tile(start, rows, C, j, C, CHUNK, ROWS)
            tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            sums = sums + (dweight[j] + dys[j] * n,)  # noqa: RUF005
        dweight = sums
    for j in tl.static_range(CHUNKS):
        column = j * CHUNK + tl.arange(0, CHUNK)
        offset = tl.program_id(0).to(tl.int64) * C + column
        tl.store(partial_ptr + offset, tl.sum(dweight[j], axis=0), mask=column < C)


@dataclass(frozen=True)
class Choice:
    """How one kernel cuts its work. A lane moves 16 neighbouring bytes at a time.

    ``chunk`` columns are handled at once; a row is ``ceil(C / chunk)`` chunks, all in registers;
    ``rows`` rows share a program of ``warps`` warps.
    """

    chunk: int
    rows: int
    warps: int

    def constexprs(self, C: int, **flags: bool) -> dict[str, Any]:
        return {"C": C, "CHUNK": self.chunk, "ROWS": self.rows, **flags}


PROGRAMS_PER_SM = 4  # of 4 warps, in the backward; unmeasured


@functools.cache
def choice(C: int, itemsize: int, backward: bool) -> Choice:
    """The chunk that idles the fewest lanes, then the one nearest to a row for each warp.

    Unmeasured. A lane holds at most 72 elements of a row forward (x) and 40 backward (x, dy and the
    weight gradient), which the ahead-of-time report shows to fit into registers without a spill.
    """
    vector = 16 // itemsize
    warp = 32 * vector

    def cost(chunk: int) -> tuple[int, int]:
        return -(-C // chunk) * chunk, abs(chunk - warp)

    most = 40 if backward else 72
    chunks = [warp // 2 << i for i in range(8)]
    chunk = min((c for c in chunks if -(-C // c) * vector <= most), key=cost)
    warps = max(4, chunk // warp)
    return Choice(chunk=chunk, rows=warps * warp // chunk, warps=warps)


def _rows(x: Tensor) -> Tensor:
    """``x`` as ``[rows, C]`` with neighbouring channels; a copy only where no view exists."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = y if residual is None else torch.empty_like(y)
    C = x.shape[-1]
    x = _rows(x)
    residual = x if residual is None else _rows(residual)
    rows = x.shape[0]
    if rows:
        tile = choice(C, x.element_size(), backward=False)
        _forward_kernel[(triton.cdiv(rows, tile.rows),)](
            x, residual, weight.contiguous(), y, h, rows, x.stride(0), residual.stride(0), eps,
            **tile.constexprs(C, HAS_RESIDUAL=h is not y), num_warps=tile.warps,
            **_runtime.FP_FUSION,
        )  # fmt: skip
    return y, h


def _launch_forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _launch(x, None, weight, eps)[0]


def _launch_add_forward(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    y, h = _launch(x, residual, weight, eps)
    return y, h


def _launch_backward(
    dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    C = x.shape[-1]
    dy, x = _rows(dy), _rows(x)
    other = dy if dh is None else _rows(dh)
    rows = x.shape[0]
    if not rows:
        return dx, torch.zeros_like(weight)
    tile = choice(C, x.element_size(), backward=True)
    programs = min(triton.cdiv(rows, tile.rows), _runtime.resident_programs(x, PROGRAMS_PER_SM))
    partial = x.new_empty((programs, C), dtype=torch.float32)
    _backward_kernel[(programs,)](
        dy, other, x, weight.contiguous(), dx, partial, rows, dy.stride(0), other.stride(0),
        x.stride(0), eps, **tile.constexprs(C, HAS_DH=dh is not None), num_warps=tile.warps,
        **_runtime.FP_FUSION,
    )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)


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
        return y, h

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor, dh: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        dx, dweight = _backward(dy, dh, *ctx.saved_tensors, ctx.eps)
        return dx, dx, dweight, None


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
    _check.channels("x", x, "weight", weight, MAX_CHANNELS)
    _check.positive("eps", eps, zero=True)
    if not _runtime.use_kernel(x):
        return rms_norm_reference(x, weight, eps)
    return _RMSNorm.apply(x, weight, eps)


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
    _check.channels("x", x, "weight", weight, MAX_CHANNELS)
    _check.like("residual", residual, "x", x)
    _check.positive("eps", eps, zero=True)
    if not _runtime.use_kernel(x):
        return add_rms_norm_reference(x, residual, weight, eps)
    return _AddRMSNorm.apply(x, residual, weight, eps)


WIDTHS = (256, 384, 760, 768, 1024, 1152, 1792, 2304, 4096)


def _launches(kernel: Any, backward: bool, flag: str, on: bool) -> Iterator[_runtime.Launch]:
    for dtype in _check.DTYPES:
        # Both 16-bit types move the same bytes through the same choices: one width shows it.
        for C in (768,) if dtype == torch.float16 else WIDTHS:
            tile = choice(C, dtype.itemsize, backward)
            signature = _runtime.signature(kernel, dtype, eps="fp32", partial_ptr="*fp32")
            yield _runtime.Launch(
                kernel=kernel,
                name=f"{'add_' * on}rms_norm_{'backward' if backward else 'forward'}",
                case=f"C={C} {_runtime.TRITON_TYPES[dtype]}",
                signature=signature,
                constexprs=tile.constexprs(C, **{flag: on}),
                num_warps=tile.warps,
                aligned=tuple(n for n in signature if n.endswith(("_ptr", "_stride"))),
            )


def _rms_norm_launches(sm: int) -> Iterator[_runtime.Launch]:
    yield from _launches(_forward_kernel, False, "HAS_RESIDUAL", False)
    yield from _launches(_backward_kernel, True, "HAS_DH", False)


def _add_rms_norm_launches(sm: int) -> Iterator[_runtime.Launch]:
    yield from _launches(_forward_kernel, False, "HAS_RESIDUAL", True)
    yield from _launches(_backward_kernel, True, "HAS_DH", True)


KERNELS = (_forward_kernel, _backward_kernel)
_runtime.operator(rms_norm, rms_norm_reference, KERNELS, _rms_norm_launches)
_runtime.operator(add_rms_norm, add_rms_norm_reference, KERNELS, _add_rms_norm_launches)
