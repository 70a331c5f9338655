"""The kernels behind `rms_norm` and `layer_norm`: a row is read once and stays in registers.

With the centre ``m`` (0 for `rms_norm`, the row's mean for `layer_norm`),
``s = rsqrt(mean((x - m)**2) + eps)`` and ``n = (x - m) * s``, the forward is
``y = weight * n + bias``. With ``g = dy * weight`` the backward is
``dx = s * (g - n * mean(g * n) - mean(g))``, the last term only where a mean was subtracted, plus
``dh`` where the input itself was used; ``dweight = sum(dy * n)`` and ``dbias = sum(dy)`` over rows.

A row is cut into chunks of ``CHUNK`` columns, 16 bytes for each lane, and a last one of ``TAIL``: a
half or a quarter of a chunk, so 8 or 4 bytes a lane, where that leaves no lane idle. 1,152 columns
of bfloat16 are four chunks of 256 and one of 128. Where a row belongs to one warp, as it does up to
about a thousand columns, its sums are shuffles and need no barrier.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neobert_kernels import _runtime
from neobert_kernels._launch import MOST_PREPARED, Prepared, Ready, Rows, row_step
from neobert_kernels._triton import tl, triton

MAX_CHANNELS = 16384  # a program keeps whole rows in registers


@triton.jit
def _columns(j: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr):
    """The columns of chunk ``j`` as ``[1, width]``."""
    WIDTH: tl.constexpr = CHUNK if (j + 1) * CHUNK <= C else TAIL
    return j * CHUNK + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _tile(
    row, rows, stride, j: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    """Offsets and mask of chunk ``j`` of the rows ``row [ROWS, 1]``."""
    column = _columns(j, C, CHUNK, TAIL)
    inside = row < rows
    if j * CHUNK + TAIL > C:
        inside = inside & (column < C)
    return row.to(tl.int64) * stride + column, inside


@triton.jit
def _load_vector(
    ptr, row, j: tl.constexpr, C: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr
):  # fmt: skip
    """Chunk ``j`` of a ``[C]`` vector in float32, repeated for each row, zero past its end.

    It is loaded as a whole tile, in the layout of the rows: one row would be laid out over all
    warps, and would pass through shared memory and a barrier before it meets the others.
    """
    column = _columns(j, C, CHUNK, TAIL) + row * 0
    if j * CHUNK + TAIL > C:
        return tl.load(ptr + column, mask=column < C, other=0.0).to(tl.float32)
    return tl.load(ptr + column).to(tl.float32)


@triton.jit
def _row_sums(tiles, C: tl.constexpr, CHUNK: tl.constexpr):
    """Sums of whole rows ``[ROWS, 1]``: whole chunks are added lane by lane, then once across."""
    total = tiles[0]
    for j in tl.static_range(1, C // CHUNK):
        total += tiles[j]
    sums = tl.sum(total, axis=1)[:, None]
    if C > CHUNK and C % CHUNK != 0:
        sums += tl.sum(tiles[C // CHUNK], axis=1)[:, None]
    return sums


@triton.jit
def _row_dots(xs, ys, C: tl.constexpr, CHUNK: tl.constexpr):
    """Inner products of whole rows ``[ROWS, 1]``, in the order of `_row_sums`."""
    total = xs[0] * ys[0]
    for j in tl.static_range(1, C // CHUNK):
        total += xs[j] * ys[j]
    sums = tl.sum(total, axis=1)[:, None]
    if C > CHUNK and C % CHUNK != 0:
        sums += tl.sum(xs[C // CHUNK] * ys[C // CHUNK], axis=1)[:, None]
    return sums


@triton.jit
def _center(xs, C: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr):
    """``x - mean(x)`` of every chunk; 0, not minus the mean, in columns past the end.

    `/` may be off by two units in the last place, which a large mean would leave in every ``x``.
    What the quotient lacks is added to it; `tl.div_rn` takes registers that the backward lacks.
    """
    sums = _row_sums(xs, C, CHUNK)
    SHARE: tl.constexpr = 1.0 / C
    mean = sums * SHARE
    mean = tl.fma(tl.fma(mean, -1.0 * C, sums), SHARE, mean)
    centered = ()
    for j in tl.static_range(len(xs)):
        x = xs[j] - mean
        if j * CHUNK + TAIL > C:
            x = tl.where(_columns(j, C, CHUNK, TAIL) < C, x, 0.0)
        centered = centered + (x,)  # noqa: RUF005  (Triton has no unpacking)
    return centered


@triton.jit
def _scale(xs, row, rows, eps, C: tl.constexpr, CHUNK: tl.constexpr):
    """``rsqrt(mean(x**2) + eps)``; finite past the last row, where an eps of 0 would give NaN."""
    return tl.rsqrt(_row_dots(xs, xs, C, CHUNK) / C + eps + (row >= rows).to(tl.float32))


@triton.jit(do_not_specialize=["rows"])
def norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, rows, x_stride, residual_stride, eps,
    C: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
    CENTERED: tl.constexpr,
):  # fmt: skip
    """One program per ``ROWS`` rows. ``residual_ptr`` (with ``h_ptr``) and ``bias_ptr`` or None."""
    CHUNKS: tl.constexpr = (C + CHUNK - 1) // CHUNK
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    # All loads stand before the first store, which none may pass: the two could overlap.
    xs = ()
    for j in tl.static_range(CHUNKS):
        offset, inside = _tile(row, rows, x_stride, j, C, CHUNK, TAIL)
        x = tl.load(x_ptr + offset, mask=inside, other=0.0)
        xs = xs + (x.to(tl.float32),)  # noqa: RUF005
    if residual_ptr is not None:
        sums = ()
        for j in tl.static_range(CHUNKS):
            offset, inside = _tile(row, rows, residual_stride, j, C, CHUNK, TAIL)
            r = tl.load(residual_ptr + offset, mask=inside, other=0.0)
            sums = sums + ((xs[j] + r.to(tl.float32)).to(h_ptr.dtype.element_ty),)  # noqa: RUF005
        xs = ()
        for j in tl.static_range(CHUNKS):
            offset, inside = _tile(row, rows, C, j, C, CHUNK, TAIL)
            tl.store(h_ptr + offset, sums[j], mask=inside)
            xs = xs + (sums[j].to(tl.float32),)  # noqa: RUF005
    if CENTERED:
        xs = _center(xs, C, CHUNK, TAIL)
    scale = _scale(xs, row, rows, eps, C, CHUNK)
    for j in tl.static_range(CHUNKS):
        y = _load_vector(weight_ptr, row, j, C, CHUNK, TAIL) * (xs[j] * scale)
        if bias_ptr is not None:
            y += _load_vector(bias_ptr, row, j, C, CHUNK, TAIL)
        offset, inside = _tile(row, rows, C, j, C, CHUNK, TAIL)
        tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def norm_backward_kernel(
    dy_ptr, dh_ptr, x_ptr, weight_ptr, dx_ptr, partial_ptr, rows, dy_stride, dh_stride, x_stride,
    eps, C: tl.constexpr, CHUNK: tl.constexpr, TAIL: tl.constexpr, ROWS: tl.constexpr,
    STAGES: tl.constexpr, CENTERED: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Program p takes every P-th group of rows and owns part p of ``partial``: no atomics."""
    CHUNKS: tl.constexpr = (C + CHUNK - 1) // CHUNK
    lane = tl.arange(0, ROWS)[:, None]
    weights, dweights, dbiases = (), (), ()
    for j in tl.static_range(CHUNKS):
        weights = weights + (_load_vector(weight_ptr, lane, j, C, CHUNK, TAIL),)  # noqa: RUF005
        dweights = dweights + (tl.zeros_like(weights[j]),)  # noqa: RUF005
        dbiases = dbiases + (tl.zeros_like(weights[j]),)  # noqa: RUF005
    first = tl.program_id(0) * ROWS
    for start in tl.range(first, rows, tl.num_programs(0) * ROWS, num_stages=STAGES):
        row = start + lane
        xs, dys, dhs = (), (), ()
        for j in tl.static_range(CHUNKS):
            offset, inside = _tile(row, rows, x_stride, j, C, CHUNK, TAIL)
            x = tl.load(x_ptr + offset, mask=inside, other=0.0)
            offset, inside = _tile(row, rows, dy_stride, j, C, CHUNK, TAIL)
            dy = tl.load(dy_ptr + offset, mask=inside, other=0.0)
            xs, dys = xs + (x.to(tl.float32),), dys + (dy.to(tl.float32),)  # noqa: RUF005
            if dh_ptr is not None:
                offset, inside = _tile(row, rows, dh_stride, j, C, CHUNK, TAIL)
                dhs = dhs + (tl.load(dh_ptr + offset, mask=inside, other=0.0),)  # noqa: RUF005
        if CENTERED:
            xs = _center(xs, C, CHUNK, TAIL)
        scale = _scale(xs, row, rows, eps, C, CHUNK)
        gs = ()
        for j in tl.static_range(CHUNKS):
            gs = gs + (dys[j] * weights[j],)  # noqa: RUF005
        gn_mean = _row_dots(gs, xs, C, CHUNK) * scale / C
        if CENTERED:
            g_mean = _row_sums(gs, C, CHUNK) / C
        next_dweights, next_dbiases = (), ()
        for j in tl.static_range(CHUNKS):
            n = xs[j] * scale
            dx = gs[j] - n * gn_mean
            if CENTERED:
                dx -= g_mean
            dx *= scale
            if dh_ptr is not None:
                dx += dhs[j].to(tl.float32)
            offset, inside = _tile(row, rows, C, j, C, CHUNK, TAIL)
            tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=inside)
            next_dweights = next_dweights + (dweights[j] + dys[j] * n,)  # noqa: RUF005
            next_dbiases = next_dbiases + (dbiases[j] + dys[j],)  # noqa: RUF005
        dweights = next_dweights
        if HAS_BIAS:
            dbiases = next_dbiases
    PARTS: tl.constexpr = 2 if HAS_BIAS else 1
    partial_ptr += tl.program_id(0).to(tl.int64) * (PARTS * C)
    for j in tl.static_range(CHUNKS):
        column = _columns(j, C, CHUNK, TAIL)
        total = tl.sum(dweights[j], axis=0)[None, :]
        tl.store(partial_ptr + column, total, mask=column < C)
        if HAS_BIAS:
            total = tl.sum(dbiases[j], axis=0)[None, :]
            tl.store(partial_ptr + C + column, total, mask=column < C)


@triton.jit(do_not_specialize=["parts"])
def norm_total_kernel(
    partial_ptr, dweight_ptr, dbias_ptr, parts, C: tl.constexpr, COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    """Add the parts of ``COLUMNS`` columns, in order; ``dbias_ptr`` or None."""
    KINDS: tl.constexpr = 1 if dbias_ptr is None else 2
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    partial_ptr += tl.program_id(1) * C
    total = tl.zeros((PARTS, COLUMNS), tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)[:, None]
        inside = (part < parts) & (column < C)
        total += tl.load(partial_ptr + part * (KINDS * C) + column, mask=inside, other=0.0)
    total = tl.sum(total, axis=0)[None, :]
    if tl.program_id(1) == 0:
        tl.store(dweight_ptr + column, total.to(dweight_ptr.dtype.element_ty), mask=column < C)
    elif dbias_ptr is not None:
        tl.store(dbias_ptr + column, total.to(dbias_ptr.dtype.element_ty), mask=column < C)


TOTAL_TILE = {"COLUMNS": 32, "PARTS": 128}  # 16 KiB in flight for each of 4 warps; unmeasured


@dataclass(frozen=True)
class Choice:
    """How a row is cut, and ``rows`` rows for each program of ``warps`` warps."""

    chunk: int
    tail: int
    rows: int
    warps: int
    per_lane: int  # elements of a row

    def constexprs(self, C: int) -> dict[str, Any]:
        return {"C": C, "CHUNK": self.chunk, "TAIL": self.tail, "ROWS": self.rows}


@functools.cache
def choice(C: int, itemsize: int, per_lane: int) -> Choice:
    """The cut that idles the fewest lanes with the least work across warps, unmeasured.

    ``per_lane`` bounds the elements of a row that a lane may hold, so the registers.
    """
    vector = 16 // itemsize
    warp = 32 * vector
    cuts = []
    for chunk in (warp // 2 << i for i in range(7)):
        whole, rest = divmod(C, chunk)
        tail = next((t for t in (chunk // 4, chunk // 2) if whole and rest <= t), chunk)
        held = (whole * chunk + (tail if rest else 0)) * vector // chunk
        if held <= per_lane:
            padded = whole * chunk + (tail if rest else 0)
            warps = max(4, chunk // warp)
            cut = Choice(chunk, tail if rest else chunk, warps * warp // chunk, warps, held)
            cuts.append(((padded, abs(chunk - warp)), cut))
    return min(cuts, key=lambda pair: pair[0])[1]


@dataclass(frozen=True)
class Plan:
    """A launch: a cut, the registers a thread may have, and, in the backward, what is resident."""

    tile: Choice
    registers: int | None
    programs_per_sm: int = 1
    stages: int = 1


@functools.cache
def forward_plan(C: int, itemsize: int) -> Plan:
    """At 768 columns 40 to 56 registers: 36 to 48 warps and rows on a multiprocessor. Unmeasured.

    Those are 54 to 72 KiB of bfloat16 on their way in, where an H200 needs about 64 KiB of reads
    and writes. The bound is explicit because Triton 3.6's assembler, left alone, spills a little to
    save some registers.
    """
    tile = choice(C, itemsize, per_lane=32)
    return Plan(tile, registers=-(-(32 + 3 * tile.per_lane // 2) // 8) * 8)


@functools.cache
def backward_plan(C: int, itemsize: int, tensors: int, sums: int) -> Plan:
    """As many programs as have registers for ``tensors``, weight and ``sums`` sums. Unmeasured.

    The ahead-of-time report shows about 48 registers beside these, 16 more for a half tail and 80
    more for a quarter, which have addresses of their own: 12 warps at 768 columns, too few to hide
    memory by themselves. So the loads of ``tensors`` tensors run one or two iterations ahead,
    through shared memory: at 768 columns of bfloat16 two, three programs of four rows of x and dy,
    are 72 KiB that are on their way at all times. 160 KiB are an A100's shared memory, and 96 KiB
    what a program may use on every GPU.
    """
    tile = choice(C, itemsize, per_lane=28)
    threads = 32 * tile.warps
    beside = 48 + {1: 0, 2: 16, 4: 80}[tile.chunk // tile.tail]
    programs = max(1, 65536 // (threads * (beside + (1 + tensors + sums) * tile.per_lane)))
    size = tile.rows * C * itemsize * tensors
    ahead = min(2, (160 << 10) // (size * programs), (96 << 10) // size)
    return Plan(tile, None, programs, 1 + ahead)


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch the forward kernel: ``(y, h)``, where ``h`` is ``y`` without a residual."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = None if residual is None else torch.empty_like(y)
    x = _runtime.as_rows(x)
    residual = None if residual is None else _runtime.as_rows(residual)
    if len(x):
        bias = None if bias is None else bias.contiguous()
        ready(x, residual, weight.contiguous(), bias, eps, y, h, centered).start()
    return y, y if h is None else h


def ready(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, y: Tensor,
    h: Tensor | None, centered: bool,
) -> Ready:  # fmt: skip
    """The forward kernel's launch on rows ``[T, C]`` with neighbouring channels, T over 0.

    There is an ``h``, for the sum, where there is a residual. It and ``y`` are contiguous.
    """
    T, C = x.shape
    plan = forward_plan(C, x.element_size())
    rows = Rows(at=6, block=plan.tile.rows)
    return Ready(
        _prepared_forward(plan, C, centered),
        (rows.programs(T), 1, 1),
        (
            x, residual, weight, bias, y, h, T, row_step(x), row_step(residual), float(eps),
        ),
        rows,
    )  # fmt: skip


@functools.lru_cache(MOST_PREPARED)
def _prepared_forward(plan: Plan, C: int, centered: bool) -> Prepared:
    return Prepared(
        norm_forward_kernel, plan.tile.constexprs(C) | {"CENTERED": centered},
        num_warps=plan.tile.warps, maxnreg=plan.registers, **_runtime.FP_FUSION,
    )  # fmt: skip


def backward(
    dy: Tensor, dh: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Launch the backward kernels: ``(dx, dweight, dbias)``."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    dweight = torch.empty_like(weight, memory_format=torch.contiguous_format)
    dbias = None if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format)
    C = x.shape[-1]
    dy, x = _runtime.as_rows(dy), _runtime.as_rows(x)
    dh = None if dh is None else _runtime.as_rows(dh)
    rows = x.shape[0]
    if not rows:
        return dx, dweight.zero_(), None if dbias is None else dbias.zero_()
    kinds = 1 if bias is None else 2
    plan = backward_plan(C, x.element_size(), 2 + (dh is not None), kinds)
    resident = _runtime.resident_programs(x, plan.programs_per_sm)
    programs = min(triton.cdiv(rows, plan.tile.rows), resident)
    partial = x.new_empty((programs, kinds, C), dtype=torch.float32)
    _prepared_backward(plan, C, centered, bias is not None)(
        (programs, 1, 1), dy, dh, x, weight.contiguous(), dx, partial, rows, dy.stride(0),
        0 if dh is None else dh.stride(0), x.stride(0), float(eps),
    )  # fmt: skip
    _prepared_total(C, **TOTAL_TILE)(
        (-(-C // TOTAL_TILE["COLUMNS"]), kinds, 1), partial, dweight, dbias, programs
    )
    return dx, dweight, dbias


@functools.lru_cache(MOST_PREPARED)
def _prepared_backward(plan: Plan, C: int, centered: bool, with_bias: bool) -> Prepared:
    flags = {"STAGES": plan.stages, "CENTERED": centered, "HAS_BIAS": with_bias}
    return Prepared(
        norm_backward_kernel, plan.tile.constexprs(C) | flags,
        num_warps=plan.tile.warps, maxnreg=plan.registers, **_runtime.FP_FUSION,
    )  # fmt: skip


@functools.lru_cache(MOST_PREPARED)
def _prepared_total(C: int, **tile: int) -> Prepared:
    return Prepared(norm_total_kernel, {"C": C, **tile}, num_warps=4, **_runtime.FP_FUSION)


WIDTHS = (256, 384, 760, 768, 1024, 1152, 1792, 2304, 4096)


def launches(name: str, added: bool, centered: bool) -> Iterator[_runtime.Launch]:
    """What users get: both directions of one operator, with a bias where it has a centre."""
    cases = [(torch.bfloat16, C, "bf16") for C in WIDTHS]
    cases += [(torch.float32, C, "fp32") for C in (768, 1024, 4096)]
    # Half and bfloat16 move the same bytes through the same choices: one width shows it.
    cases += [(torch.float16, 768, "fp16"), (torch.bfloat16, 768, "fp32")]
    for dtype, C, weight in cases:
        case = f"C={C} {_runtime.TRITON_TYPES[dtype]}"
        case += f", weight {weight}" * (weight != _runtime.TRITON_TYPES[dtype])
        missing = () if added else ("residual_ptr", "h_ptr", "dh_ptr", "residual_stride")
        missing += () if centered else ("bias_ptr",)
        types = dict.fromkeys(("weight_ptr", "bias_ptr"), f"*{weight}") | {"partial_ptr": "*fp32"}
        back = backward_plan(C, dtype.itemsize, 2 + added, 1 + centered)
        for kernel, plan, more in (
            (norm_forward_kernel, forward_plan(C, dtype.itemsize), {}),
            (norm_backward_kernel, back, {"STAGES": back.stages, "HAS_BIAS": centered}),
        ):
            names = [p.name for p in kernel.params]
            absent = {n: None for n in missing if n in names and n.endswith("_ptr")}
            signature = _runtime.signature(
                kernel, dtype, eps="fp32", **types | dict.fromkeys(absent, "constexpr")
            )
            yield _runtime.Launch(
                kernel=kernel,
                name=f"{name}_{'backward' if more else 'forward'}",
                case=case,
                signature=signature,
                constexprs=plan.tile.constexprs(C) | {"CENTERED": centered} | more | absent,
                num_warps=plan.tile.warps,
                maxnreg=plan.registers,
                # A program's partial sums: a chunk's columns over all its lanes.
                narrow_once=(1 + centered) * triton.cdiv(C, plan.tile.chunk) if more else 0,
                aligned=tuple(
                    n for n, kind in signature.items()
                    if n.endswith(("_ptr", "_stride")) and kind != "constexpr"
                ),
            )  # fmt: skip
    yield total_launch(name, centered)


def total_launch(name: str, with_bias: bool) -> _runtime.Launch:
    types = {"partial_ptr": "*fp32"} | ({} if with_bias else {"dbias_ptr": "constexpr"})
    signature = _runtime.signature(norm_total_kernel, torch.bfloat16, **types)
    return _runtime.Launch(
        kernel=norm_total_kernel,
        name=f"{name}_total",
        case="C=768 bf16",
        signature=signature,
        constexprs={"C": 768} | TOTAL_TILE | ({} if with_bias else {"dbias_ptr": None}),
        narrow_once=1 + with_bias,
        aligned=tuple(n for n in signature if n.endswith("_ptr") and signature[n] != "constexpr"),
    )


KERNELS = (norm_forward_kernel, norm_backward_kernel, norm_total_kernel)
