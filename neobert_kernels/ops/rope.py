"""Rotary position embedding: pair i of a head turns by ``position * theta**(-2i / D)``.

Pairs are ``(i, i + D/2)``, the half-split layout, or ``(2i, 2i + 1)``, interleaved. Angles, cosines
and sines are float32 whatever the model's dtype; the rotation is float32 and rounded once. The
backward is the rotation by the opposite angle.

`turn` is attention's entrance: queries and keys in one launch, results in half-split order.

Source: Su et al. 2021, arXiv:2104.09864, section 3.4.2; polynomials of sine and cosine: Moshier,
Cephes mathematical library, single precision.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neobert_kernels import _check, _runtime
from neobert_kernels._launch import MOST_PREPARED, Prepared, Ready
from neobert_kernels._triton import tl, triton
from neobert_kernels.ops._rounding import rounded


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
    if not interleaved and not (torch.is_grad_enabled() and x.requires_grad):
        turned = wide * torch.cat([cos, cos], dim=-1)  # the same sums in place, in fewer passes
        first, second = turned.chunk(2, dim=-1)
        first.addcmul_(b, sin, value=-1)
        second.addcmul_(a, sin)
        return turned.to(x.dtype)
    pair = (torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin))
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return turned.to(x.dtype)


def check_table(cos: Tensor, sin: Tensor, tokens: int, dim: int, where: torch.device) -> None:
    """``cos`` and ``sin`` must be float32 ``[T, D / 2]`` on the device of the rotated tensor."""
    if dim < 2 or dim % 2:
        raise _check.error("x", "an even head size, at least 2", dim)
    for name, table in (("cos", cos), ("sin", sin)):
        _check.exactly(name, table, (tokens, dim // 2), torch.float32, where)
        if table.requires_grad and torch.is_grad_enabled():
            raise _check.error(name, "a table without gradient", "one that requires it")


@triton.jit
def rotate(a, b, cos, sin):
    """The pair ``(a, b)`` turned by the angle; all float32.

    Fused here, where a compiler may choose another product for every layout, and so other bits.
    """
    return tl.fma(a, cos, -(b * sin)), tl.fma(a, sin, b * cos)


@triton.jit
def load_pair(
    ptr, row, stride, inside, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    """Both members of the pairs of some rows, ``[rows, HALF]`` each, zero where not inside.

    ``HALF`` is ``D / 2`` rounded up to a power of two. Interleaved rows are read whole and parted
    in registers: every second element would be half of each sector read.
    """
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)
        mask = inside[:, None]
        if 2 * HALF > D:
            mask = mask & (column < D)[None, :]
        x = tl.load(ptr + row[:, None] * stride + column[None, :], mask=mask, other=0.0)
        a, b = tl.split(tl.reshape(x, (row.shape[0], HALF, 2)))
    else:
        column = tl.arange(0, HALF)
        mask = inside[:, None]
        if 2 * HALF > D:
            mask = mask & (column < D // 2)[None, :]
        at = ptr + row[:, None] * stride + column[None, :]
        a = tl.load(at, mask=mask, other=0.0)
        b = tl.load(at + D // 2, mask=mask, other=0.0)
    return a, b


@triton.jit
def store_pair(
    ptr, row, stride, inside, a, b, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    """The inverse of `load_pair`; rounds to the type that ``ptr`` points to."""
    dtype: tl.constexpr = ptr.dtype.element_ty
    a, b = rounded(a, dtype), rounded(b, dtype)
    mask = inside[:, None]
    if INTERLEAVED:
        column = tl.arange(0, 2 * HALF)
        if 2 * HALF > D:
            mask = mask & (column < D)[None, :]
        x = tl.reshape(tl.join(a, b), (row.shape[0], 2 * HALF))
        tl.store(ptr + row[:, None] * stride + column[None, :], x, mask=mask)
    else:
        column = tl.arange(0, HALF)
        if 2 * HALF > D:
            mask = mask & (column < D // 2)[None, :]
        at = ptr + row[:, None] * stride + column[None, :]
        tl.store(at, a, mask=mask)
        tl.store(at + D // 2, b, mask=mask)


@triton.jit
def load_angles(ptr, row, inside, D: tl.constexpr, HALF: tl.constexpr):
    """Rows of a ``[T, D / 2]`` table as ``[rows, HALF]``, zero where not inside."""
    column = tl.arange(0, HALF)
    mask = inside[:, None]
    if 2 * HALF > D:
        mask = mask & (column < D // 2)[None, :]
    return tl.load(ptr + row[:, None] * (D // 2) + column[None, :], mask=mask, other=0.0)


@triton.jit
def _turn_heads(
    x_ptr, y_ptr, cos, sin, row, tokens, first, heads, x_stride_t, x_stride_h, y_stride_t,
    y_stride_h, D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr, OUT_INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Heads ``first ... first + HEADS`` of some rows."""
    for i in tl.static_range(HEADS):
        head = (first + i).to(tl.int64)
        here = row < tl.where(first + i < heads, tokens, 0)
        a, b = load_pair(x_ptr + head * x_stride_h, row, x_stride_t, here, D, HALF, INTERLEAVED)
        a, b = rotate(a.to(tl.float32), b.to(tl.float32), cos, sin)
        y = y_ptr + head * y_stride_h
        store_pair(y, row, y_stride_t, here, a, b, D, HALF, OUT_INTERLEAVED)


@triton.jit(do_not_specialize=["tokens", "heads", "other_heads"])
def _rope_kernel(
    x_ptr, y_ptr, other_ptr, other_y_ptr, cos_ptr, sin_ptr, tokens, heads, other_heads,
    x_stride_t, x_stride_h, y_stride_t, y_stride_h, other_stride_t, other_stride_h,
    other_y_stride_t, other_y_stride_h,
    D: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr, OUT_INTERLEAVED: tl.constexpr, INVERSE: tl.constexpr,
    HAS_OTHER: tl.constexpr,
):  # fmt: skip
    """Program (i, j) turns ``TOKENS`` tokens of ``HEADS`` heads of x, or, past them, of other.

    A program reads all it writes before it writes, so y may be x.
    """
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = row < tokens
    cos = load_angles(cos_ptr, row, inside, D, HALF)
    sin = load_angles(sin_ptr, row, inside, D, HALF)
    if INVERSE:
        sin = -sin
    group = tl.program_id(1)
    groups = tl.cdiv(heads, HEADS)
    if HAS_OTHER:
        if group < groups:
            _turn_heads(
                x_ptr, y_ptr, cos, sin, row, tokens, group * HEADS, heads, x_stride_t, x_stride_h,
                y_stride_t, y_stride_h, D, HALF, HEADS, INTERLEAVED, OUT_INTERLEAVED,
            )  # fmt: skip
        else:
            _turn_heads(
                other_ptr, other_y_ptr, cos, sin, row, tokens, (group - groups) * HEADS,
                other_heads, other_stride_t, other_stride_h, other_y_stride_t, other_y_stride_h,
                D, HALF, HEADS, INTERLEAVED, OUT_INTERLEAVED,
            )  # fmt: skip
    else:
        _turn_heads(
            x_ptr, y_ptr, cos, sin, row, tokens, group * HEADS, heads, x_stride_t, x_stride_h,
            y_stride_t, y_stride_h, D, HALF, HEADS, INTERLEAVED, OUT_INTERLEAVED,
        )  # fmt: skip


@triton.jit
def _cos_sin(angle):
    """Cosine and sine of float32 angles under 2**30, to float32.

    Quarter turns are taken off in float64, which is exact to 1e-12 here; the rest, at most pi / 4,
    goes into the Cephes polynomials. The library's functions keep a table on the stack for angles
    that no position has.
    """
    quarters = tl.floor(angle.to(tl.float64) * 0.6366197723675814 + 0.5)
    x = (angle.to(tl.float64) - quarters * 1.5707963267948966).to(tl.float32)
    z = x * x
    sin = x + x * z * ((-1.9515295891e-4 * z + 8.3321608736e-3) * z - 1.6666654611e-1)
    cos = (2.443315711809948e-5 * z - 1.388731625493765e-3) * z + 4.166664568298827e-2
    cos = 1.0 - 0.5 * z + z * z * cos
    quadrant = quarters.to(tl.int32) & 3
    swap = (quadrant & 1) == 1
    a, b = tl.where(swap, sin, cos), tl.where(swap, cos, sin)
    a = tl.where((quadrant == 1) | (quadrant == 2), -a, a)
    b = tl.where(quadrant >= 2, -b, b)
    return a, b


@triton.jit(do_not_specialize=["tokens"])
def _rope_table_kernel(
    positions_ptr, cos_ptr, sin_ptr, tokens, theta,
    D: tl.constexpr, HALF: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Frequencies in float64, rounded to float32 once: the angle multiplies what they are off."""
    pair = tl.arange(0, HALF)
    exponent = pair.to(tl.float64) * (-2.0 / D)
    frequency = tl.exp2(exponent * tl.log2(tl.zeros_like(exponent) + theta)).to(tl.float32)
    row = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = row < tokens
    position = tl.load(positions_ptr + row, mask=inside, other=0).to(tl.float32)
    angle = position[:, None] * frequency[None, :]
    mask = inside[:, None]
    if 2 * HALF > D:
        mask = mask & (pair < D // 2)[None, :]
    offset = row[:, None] * (D // 2) + pair[None, :]
    cos, sin = _cos_sin(angle)
    tl.store(cos_ptr + offset, cos, mask=mask)
    tl.store(sin_ptr + offset, sin, mask=mask)


@dataclass(frozen=True)
class Choice:
    """How `_rope_kernel` cuts its work: ``tokens`` by ``heads`` heads of ``2 * half`` channels."""

    half: int
    tokens: int
    heads: int = 2  # share cosines and sines, and keep several loads in flight; unmeasured
    warps: int = 4  # unmeasured


@functools.cache
def choice(D: int, itemsize: int) -> Choice:
    """Every lane of 4 warps has one 16-byte vector of pairs' first members a head. Unmeasured."""
    half = triton.next_power_of_2(D // 2)
    return Choice(half, max(1, 128 * 16 // itemsize // half))


Pairs = list[tuple[Tensor, Tensor]]


def _run(
    pairs: Pairs, cos: Tensor, sin: Tensor, interleaved: bool, out_interleaved: bool, inverse: bool
) -> None:
    """Turn each ``x`` into its ``y``, both ``[T, heads, D]`` with neighbouring channels."""
    if len(pairs[0][0]):
        _ready(pairs, cos, sin, interleaved, out_interleaved, inverse).start()


def _ready(
    pairs: Pairs, cos: Tensor, sin: Tensor, interleaved: bool, out_interleaved: bool, inverse: bool
) -> Ready:
    """The launch of `_run` on one pair or two, T over 0."""
    (x, y), (other, other_y) = pairs[0], pairs[-1]
    T, H, D = x.shape
    tile = choice(D, x.element_size())
    groups = sum(-(-a.shape[1] // tile.heads) for a, _ in pairs)
    return Ready(
        _prepared(tile, D, interleaved, out_interleaved, inverse, len(pairs) > 1),
        (-(-T // tile.tokens), groups, 1),
        (
            x, y, other, other_y, cos.contiguous(), sin.contiguous(), T, H, other.shape[1],
            x.stride(0), x.stride(1), y.stride(0), y.stride(1), other.stride(0), other.stride(1),
            other_y.stride(0), other_y.stride(1),
        ),
    )  # fmt: skip


@functools.lru_cache(MOST_PREPARED)
def _prepared(
    tile: Choice, D: int, interleaved: bool, out_interleaved: bool, inverse: bool, both: bool
) -> Prepared:
    constexprs = {
        "D": D, "HALF": tile.half, "TOKENS": tile.tokens, "HEADS": tile.heads,
        "INTERLEAVED": interleaved, "OUT_INTERLEAVED": out_interleaved, "INVERSE": inverse,
        "HAS_OTHER": both,
    }  # fmt: skip
    return Prepared(_rope_kernel, constexprs, num_warps=tile.warps, **_runtime.FP_FUSION)


def turn(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool
) -> tuple[Tensor, Tensor]:
    """Rotated q and k in half-split order, whatever the order they come in; one launch."""
    if q.is_cuda and _runtime.extension_runs("rope"):
        both = _pair(q, k, cos, sin, interleaved)
    else:
        both = _launch_pair(q, k, cos, sin, interleaved)
    return both[:, : q.shape[1]], both[:, q.shape[1] :]


def _launch_pair(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    both = _fake_pair(q, k)
    if len(q):
        ready_pair(q, k, cos, sin, interleaved, both).start()
    return both


def ready_pair(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, both: Tensor
) -> Ready:
    """The launch of `turn`, T over 0: ``both`` ``[T, heads of q and k, D]`` is written."""
    H = q.shape[1]
    pairs = [(q, both[:, :H]), (k, both[:, H:])]
    return _ready(pairs, cos, sin, interleaved, False, inverse=False)


def _launch(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, inverse: bool) -> Tensor:
    if not _runtime.use_kernel(x):
        return rope_reference(x, cos, -sin if inverse else sin, interleaved).contiguous()
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _run([(_runtime.neighbouring(x), y)], cos, sin, interleaved, interleaved, inverse)
    return y


def _launch_into(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, out: Tensor) -> None:
    if _runtime.use_kernel(x) and out.stride(-1) == 1:
        _run([(_runtime.neighbouring(x), out)], cos, sin, interleaved, interleaved, inverse=False)
    else:
        out.copy_(_launch(x, cos, sin, interleaved, False))


def _launch_table(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    T = len(positions)
    cos, sin = _fake_table(positions, dim, theta)
    if T:
        tile = choice(dim, 4)
        grid = triton.cdiv(T, tile.tokens), 1, 1
        _prepared_table(tile, dim)(grid, positions.contiguous(), cos, sin, T, float(theta))
    return cos, sin


@functools.lru_cache(MOST_PREPARED)
def _prepared_table(tile: Choice, dim: int) -> Prepared:
    constexprs = {"D": dim, "HALF": tile.half, "TOKENS": tile.tokens}
    return Prepared(_rope_table_kernel, constexprs, num_warps=tile.warps, **_runtime.FP_FUSION)


def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _fake_pair(q: Tensor, k: Tensor, *_: Any) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1] + k.shape[1], q.shape[2]))


def _fake_into(*_: Any) -> None:
    return None


def _fake_table(positions: Tensor, dim: int, theta: float) -> tuple[Tensor, Tensor]:
    shape = (positions.shape[0], dim // 2)
    cos, sin = (positions.new_empty(shape, dtype=torch.float32) for _ in range(2))
    return cos, sin


_rotation = _runtime.register(
    "rope(Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse) -> Tensor",
    _launch,
    _fake,
    extension=True,
)
_rotation_into = _runtime.register(
    "rope_into(Tensor x, Tensor cos, Tensor sin, bool interleaved, Tensor(a!) out) -> ()",
    _launch_into,
    _fake_into,
    extension=True,
)
# Attention's, without a public function: one launch for heads of both, as `turn` needs them.
_pair = _runtime.register(
    "rope_pair(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    _launch_pair,
    _fake_pair,
    extension=True,
)
_table = _runtime.register(
    "rope_table(Tensor positions, int dim, float theta) -> (Tensor, Tensor)",
    _launch_table,
    _fake_table,
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return _rotation(x, cos, sin, interleaved, False)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        return _rotation(dy, *ctx.saved_tensors, ctx.interleaved, True), None, None, None


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
    if not _runtime.use_kernel(positions):
        return rope_table_reference(positions, dim, theta)
    return _table(positions, dim, float(theta))


def rope(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, *, out: Tensor | None = None
) -> Tensor:
    """Rotate every head of packed queries or keys by its token's angles.

    Args:
        x: ``[T, H, D]``; float32, float16 or bfloat16; any strides.
        cos, sin: ``[T, D / 2]`` float32, from `rope_table`; constants, without a gradient.
        interleaved: True for pairs ``(2i, 2i + 1)`` (NeoBERT), False for ``(i, i + D / 2)``.
        out: Receives the result; the shape, dtype and device of ``x``, any strides with which
            no two elements share memory. It may be ``x`` itself (in place) and otherwise shares
            none with it, and in no case with ``cos`` or ``sin``. Not differentiable, as
            everywhere in PyTorch.

    Returns:
        ``[T, H, D]`` in ``x.dtype``; ``out`` where it was given.

    Raises:
        ValueError: A shape, dtype, device or (not under torch.compile) an overlap breaks the rules.
    """
    _check.tensor("x", x, ndim=3)
    _check.dtype("x", x)
    check_table(cos, sin, x.shape[0], x.shape[2], x.device)
    _check.flag("interleaved", interleaved)
    if out is not None:
        _check.like("out", out, "x", x)
        _check.output("out", out, "x", x)
        for name, table in (("cos", cos), ("sin", sin)):
            _check.apart("out", out, name, table)
        if torch.is_grad_enabled() and (x.requires_grad or out.requires_grad):
            raise _check.error("out", "None where a gradient is recorded", "a tensor")
        _rotation_into(x, cos, sin, interleaved, out)
        return out
    if not _runtime.use_kernel(x):
        return rope_reference(x, cos, sin, interleaved)
    return _Rope.apply(x, cos, sin, interleaved)


DIMS = (64, 96, 128)


def _rope_launches(sm: int) -> Iterator[_runtime.Launch]:
    for dtype in _check.DTYPES:
        # Both 16-bit types move the same bytes through the same choices: one size shows it.
        for D in (64,) if dtype != torch.bfloat16 else DIMS:
            for interleaved, both in ((True, True), (False, False)):
                tile = choice(D, dtype.itemsize)
                signature = _runtime.signature(
                    _rope_kernel, dtype, cos_ptr="*fp32", sin_ptr="*fp32"
                )
                yield _runtime.Launch(
                    kernel=_rope_kernel,
                    name="rope",
                    case=f"D={D} {_runtime.TRITON_TYPES[dtype]}"
                    + " interleaved" * interleaved
                    + " q and k" * both,
                    signature=signature,
                    constexprs={
                        "D": D, "HALF": tile.half, "TOKENS": tile.tokens, "HEADS": tile.heads,
                        "INTERLEAVED": interleaved, "OUT_INTERLEAVED": interleaved and not both,
                        "INVERSE": False, "HAS_OTHER": both,
                    },
                    num_warps=tile.warps,
                    aligned=tuple(n for n in signature if n.endswith("_ptr") or "_stride_" in n),
                )  # fmt: skip


def _table_launches(sm: int) -> Iterator[_runtime.Launch]:
    for D in (64, 128):
        tile = choice(D, 4)
        signature = _runtime.signature(
            _rope_table_kernel, torch.float32, positions_ptr="*i64", theta="fp32"
        )
        yield _runtime.Launch(
            kernel=_rope_table_kernel,
            name="rope_table",
            case=f"D={D}",
            signature=signature,
            constexprs={"D": D, "HALF": tile.half, "TOKENS": tile.tokens},
            num_warps=tile.warps,
            aligned=tuple(name for name in signature if name.endswith("_ptr")),
            memory_bound=False,  # a row's one load is its position
        )


_runtime.operator(rope_table, rope_table_reference, (_rope_table_kernel,), _table_launches)
_runtime.operator(rope, rope_reference, (_rope_kernel,), _rope_launches)
