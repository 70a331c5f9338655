"""Kernels, launch choices and launchers of linear_cross_entropy."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neobert_kernels import _check, _runtime
from neobert_kernels._triton import tl, triton


@triton.jit(do_not_specialize=["T", "R", "ignore_index"])
def _loss_gather_kernel(
    x_ptr, labels_ptr, rows_ptr, out_ptr, targets_ptr, T, R, V, ignore_index, x_stride,
    C: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Labelled rows of x end to end, and their labels: -1 for ignored rows (zeros), -2 if wrong."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(rows_ptr + i, mask=i < R, other=-1)
    inside = (row >= 0) & (row < T)
    label = tl.load(labels_ptr + row, mask=inside, other=0)
    counted = inside & (label != ignore_index)
    for j in tl.static_range(SPAN):
        column = (tl.program_id(1) * SPAN + j) * CHUNK + tl.arange(0, CHUNK)
        mask = counted[:, None] & (column < C)[None, :]
        x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0)
        mask = (i < R)[:, None] & (column < C)[None, :]
        offset = i.to(tl.int64)[:, None] * C + column[None, :]
        tl.store(out_ptr + offset, x.to(out_ptr.dtype.element_ty), mask=mask)
    if tl.program_id(1) == 0:
        target = tl.where((label >= 0) & (label < V), label, -2)
        target = tl.where(counted, target, -1).to(tl.int32)
        tl.store(targets_ptr + i, target, mask=i < R)


@triton.jit
def _logits(logits_ptr, bias_ptr, start, V, width, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """A block of one row; -inf past the vocabulary, where the buffer holds anything."""
    column = start + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + column, mask=column < width, other=0.0)
    if HAS_BIAS:
        x += tl.load(bias_ptr + column, mask=column < width, other=0.0)
    return tl.where(column < V, x, float("-inf")), column


@triton.jit
def _loss_softmax_kernel(
    logits_ptr, bias_ptr, targets_ptr, rows_ptr, upstream_ptr, losses_ptr, correct_ptr,
    gradient_ptr, V, width, HAS_BIAS: tl.constexpr, HAS_UPSTREAM: tl.constexpr,
    GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row of logits: its loss, and ``g * (p - onehot)`` from a second look."""
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * width
    target = tl.load(targets_ptr + row)
    counted = target != -1
    largest = float("-inf")
    total = 0.0
    for start in range(0, width, BLOCK):
        x, _ = _logits(logits_ptr, bias_ptr, start, V, width, HAS_BIAS, BLOCK)
        larger = tl.maximum(largest, tl.max(x, axis=0))
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        total = total * tl.exp(largest - shift) + tl.sum(tl.exp(x - shift), axis=0)
        largest = larger
    own = tl.load(logits_ptr + target, mask=target >= 0, other=float("nan"))
    if HAS_BIAS:
        own += tl.load(bias_ptr + target, mask=target >= 0, other=0.0)
    place = tl.load(rows_ptr + row)
    # Not log(total) + largest: a small loss would drown in the rounding of a large logit.
    tl.store(losses_ptr + place, (largest - own) + tl.log(total), mask=counted)
    tl.store(correct_ptr + place, own >= largest, mask=counted)
    if GRADIENT:
        gradient_ptr += row.to(tl.int64) * width
        scale = 1.0
        if HAS_UPSTREAM:
            scale = tl.load(upstream_ptr + place, mask=counted, other=0.0)
        scale = tl.where(counted, scale, 0.0)
        for start in range(0, width, BLOCK):
            x, column = _logits(logits_ptr, bias_ptr, start, V, width, HAS_BIAS, BLOCK)
            gradient = tl.exp(x - largest) * (scale / total)
            gradient -= tl.where(column == target, scale, 0.0)
            gradient = gradient.to(gradient_ptr.dtype.element_ty)
            tl.store(gradient_ptr + column, gradient, mask=column < width)


@triton.jit(do_not_specialize=["rows"])
def _loss_column_sum_kernel(
    gradient_ptr, total_ptr, rows, width, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):
    """Add the rows of a chunk to ``total``; a program owns its columns, so the order is fixed."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        offset = row.to(tl.int64)[:, None] * width + column[None, :]
        sums += tl.load(gradient_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    total = tl.load(total_ptr + column, mask=column < width, other=0.0) + tl.sum(sums, axis=0)
    tl.store(total_ptr + column, total, mask=column < width)


@triton.jit(do_not_specialize=["N", "T"])
def _loss_scale_kernel(
    in_ptr, scale_ptr, rows_ptr, out_ptr, N, T, C: tl.constexpr, CHUNK: tl.constexpr,
    SPAN: tl.constexpr, ROWS: tl.constexpr, HAS_ROWS: tl.constexpr,
):  # fmt: skip
    """``out[rows[i]] = scale * in[i]``, the only rounding of a gradient; rows may be all rows."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    place = i.to(tl.int64)
    mask = i < N
    if HAS_ROWS:
        place = tl.load(rows_ptr + i, mask=mask, other=-1)
        mask = (place >= 0) & (place < T)
    scale = tl.load(scale_ptr)
    for j in tl.static_range(SPAN):
        column = (tl.program_id(1) * SPAN + j) * CHUNK + tl.arange(0, CHUNK)
        here = mask[:, None] & (column < C)[None, :]
        offset = i.to(tl.int64)[:, None] * C + column[None, :]
        value = tl.load(in_ptr + offset, mask=here, other=0.0) * scale
        offset = place[:, None] * C + column[None, :]
        tl.store(out_ptr + offset, value.to(out_ptr.dtype.element_ty), mask=here)


# All unmeasured.
STEP_BYTES = 32 << 20  # float32 logits: what stays in a 50 MB L2 beside the weight's tiles
CHUNK_BYTES = 72 << 20  # dlogits: with these a 16k-token batch needs less than Liger's buffers
STEP_ROWS, CHUNK_ROWS = 128, 512  # the least of each; steps are multiples of the first
SOFTMAX = {"BLOCK": 4096, "num_warps": 8}
COLUMN_SUM = {"COLUMNS": 256, "ROWS": 32, "num_warps": 2}


@dataclass(frozen=True)
class Plan:
    """Rows per chunk (its dlogits exist whole) and per step of a chunk (its float32 logits)."""

    chunk: int
    step: int


def plan(R: int, width: int, itemsize: int) -> Plan:
    """Equal parts of R rows, within the bytes above; the only place that decides on memory."""
    chunk = _equal_parts(R, max(CHUNK_BYTES // (itemsize * width), CHUNK_ROWS))
    return Plan(chunk, _equal_parts(chunk, max(STEP_BYTES // (4 * width), STEP_ROWS)))


def _equal_parts(rows: int, most: int) -> int:
    parts = -(-rows // max(most // STEP_ROWS * STEP_ROWS, 1))
    each = -(-rows // max(parts, 1))
    return rows if parts <= 1 else -(-each // STEP_ROWS) * STEP_ROWS


def tile(C: int, itemsize: int) -> dict[str, int]:
    """A warp moves 512 neighbouring bytes of a row, up to 8 times; a program has 8 rows."""
    chunk = 512 // itemsize
    return {"CHUNK": chunk, "SPAN": min(-(-C // chunk), 8), "ROWS": 8}


def _grid(rows: int, C: int, moves: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(rows, moves["ROWS"]), triton.cdiv(C, moves["CHUNK"] * moves["SPAN"])


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> None:
    """``out = a @ b`` or ``out += a @ b``; out is float32, and so are the sums."""
    if a.dtype == torch.float32 or not a.is_cuda:  # on a CPU no product has another dtype
        torch.addmm(out, a.float(), b.float(), beta=int(add), out=out)
    elif add:
        torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def launch(
    x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, rows: Tensor,
    upstream: Tensor | None, ignore_index: int, dtype: torch.dtype,
    x_gradient: bool, weight_gradient: bool, bias_gradient: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Losses and hits of all rows, the number of labels, and float32 gradients not yet scaled."""
    T, C, V, R = *x.shape, len(weight), len(rows)
    width = -(-V // 64) * 64  # aligned rows for 16-byte accesses and tensor cores
    losses, correct, count, dx, dweight, dbias = outputs = _empty(
        x, weight, rows, x_gradient, weight_gradient, bias_gradient
    )
    losses.zero_()
    correct.zero_()
    if not R:
        for gradient in (count, dweight, dbias):
            gradient.zero_()
        return outputs
    weight = weight.to(dtype)
    rows = rows.contiguous()
    if x.stride(1) != 1:
        x = x.contiguous()
    gathered = x.new_empty((R, C), dtype=dtype)
    targets = x.new_empty(R, dtype=torch.int32)
    moves = tile(C, dtype.itemsize)
    _loss_gather_kernel[_grid(R, C, moves)](
        x, labels.contiguous(), rows, gathered, targets, T, R, V, ignore_index, x.stride(0), C,
        **moves, num_warps=4, **_runtime.FP_FUSION,
    )  # fmt: skip
    torch.sum(targets != -1, dim=0, out=count)

    backward = x_gradient or weight_gradient or bias_gradient
    sizes = plan(R, width, dtype.itemsize)
    logits = x.new_empty((sizes.step, width), dtype=torch.float32)
    dlogits = x.new_empty((sizes.chunk, width), dtype=dtype) if backward else logits
    padded = F.pad(bias.float(), (0, width - V)) if bias is not None else logits
    sums = x.new_zeros(width, dtype=torch.float32) if bias_gradient else logits
    for chunk in range(0, R, sizes.chunk):
        end = min(chunk + sizes.chunk, R)
        for step in range(chunk, end, sizes.step):
            here = slice(step, min(step + sizes.step, end))
            n = here.stop - step
            _product(gathered[here], weight.t(), logits[:n, :V])
            _loss_softmax_kernel[(n,)](
                logits, padded, targets[here], rows[here],
                targets if upstream is None else upstream, losses, correct,
                dlogits[step - chunk :] if backward else logits, V, width,
                HAS_BIAS=bias is not None, HAS_UPSTREAM=upstream is not None, GRADIENT=backward,
                **SOFTMAX, **_runtime.FP_FUSION,
            )  # fmt: skip
        part = dlogits[: end - chunk, :V]
        if x_gradient:
            _product(part, weight, dx[chunk:end])
        if weight_gradient:
            _product(part.t(), gathered[chunk:end], dweight, add=chunk > 0)
        if bias_gradient:
            _loss_column_sum_kernel[(triton.cdiv(width, COLUMN_SUM["COLUMNS"]),)](
                dlogits, sums, end - chunk, width, **COLUMN_SUM, **_runtime.FP_FUSION
            )
    if bias_gradient:
        dbias.copy_(sums[:V])
    return outputs


def _empty(
    x: Tensor, weight: Tensor, rows: Tensor, dx: bool, dweight: bool, dbias: bool
) -> tuple[Tensor, ...]:
    """The outputs of `launch`; a gradient that nobody asked for has no elements."""
    T, C, V, R = *x.shape, weight.shape[0], rows.shape[0]
    losses = x.new_empty(T, dtype=torch.float32)
    return (
        losses,
        x.new_empty(T, dtype=torch.bool),
        x.new_empty((), dtype=torch.int64),
        losses.new_empty((R, C) if dx else (0, 0)),
        losses.new_empty((V, C) if dweight else (0, 0)),
        losses.new_empty(V if dbias else 0),
    )


def fake(
    x: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, rows: Tensor,
    upstream: Tensor | None, ignore_index: int, dtype: torch.dtype,
    x_gradient: bool, weight_gradient: bool, bias_gradient: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _empty(x, weight, rows, x_gradient, weight_gradient, bias_gradient)


def launch_scale(
    gradient: Tensor, scale: Tensor, rows: Tensor | None, T: int, dtype: torch.dtype
) -> Tensor:
    N, C = gradient.shape
    # Rows that are not in `rows` get no gradient.
    out = gradient.new_zeros((T, C), dtype=dtype) if rows is not None else None
    out = gradient.new_empty((T, C), dtype=dtype) if out is None else out
    if N and C:
        moves = tile(C, dtype.itemsize)
        _loss_scale_kernel[_grid(N, C, moves)](
            gradient, scale, scale if rows is None else rows.contiguous(), out, N, T, C,
            HAS_ROWS=rows is not None, **moves, num_warps=4, **_runtime.FP_FUSION,
        )  # fmt: skip
    return out


def fake_scale(
    gradient: Tensor, scale: Tensor, rows: Tensor | None, T: int, dtype: torch.dtype
) -> Tensor:
    return gradient.new_empty((T, gradient.shape[1]), dtype=dtype)


def launches(sm: int) -> Iterator[_runtime.Launch]:
    int64s = {"labels_ptr": "*i64", "rows_ptr": "*i64", "targets_ptr": "*i32"}
    floats = ("logits_ptr", "bias_ptr", "upstream_ptr", "losses_ptr", "total_ptr", "in_ptr")
    types = int64s | dict.fromkeys((*floats, "scale_ptr"), "*fp32") | {"correct_ptr": "*i1"}

    def one(
        kernel: Any,
        name: str,
        case: str,
        dtype: torch.dtype,
        warps: int,
        constexprs: dict[str, Any],
    ) -> _runtime.Launch:
        signature = _runtime.signature(kernel, dtype, **types)
        aligned = (n for n in signature if n.endswith(("_ptr", "_stride")) or n == "width")
        return _runtime.Launch(
            kernel, name, f"{case} {_runtime.TRITON_TYPES[dtype]}", signature, constexprs, warps,
            aligned=tuple(aligned),
            # The loss alone stores two scalars a row, never 16 bytes.
            memory_bound=constexprs.get("GRADIENT", True),
        )  # fmt: skip

    for dtype in _check.DTYPES:
        for C in (768, 1024) if dtype == torch.bfloat16 else (768,):
            sizes = {"C": C, **tile(C, dtype.itemsize)}
            yield one(_loss_gather_kernel, "gather_rows", f"C={C}", dtype, 4, sizes)
            for on in (False, True):
                case = f"C={C} {'rows' if on else 'weight'}"
                yield one(
                    _loss_scale_kernel, "scale_gradient", case, dtype, 4, {**sizes, "HAS_ROWS": on}
                )
        block = {"BLOCK": SOFTMAX["BLOCK"], "HAS_BIAS": True}
        for gradient, upstream in ((True, False), (True, True), (False, False)):
            if gradient or dtype == torch.float32:
                case = "upstream" if upstream else "gradient" if gradient else "loss"
                flags = {**block, "GRADIENT": gradient, "HAS_UPSTREAM": upstream}
                warps = SOFTMAX["num_warps"]
                yield one(_loss_softmax_kernel, "softmax_rows", case, dtype, warps, flags)
        flags = {key: COLUMN_SUM[key] for key in ("COLUMNS", "ROWS")}
        warps = COLUMN_SUM["num_warps"]
        yield one(_loss_column_sum_kernel, "column_sum", "bias", dtype, warps, flags)


KERNELS = (_loss_gather_kernel, _loss_softmax_kernel, _loss_column_sum_kernel, _loss_scale_kernel)
