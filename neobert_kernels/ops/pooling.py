"""From packed token vectors to one vector a document: the mean, or the first token.

A document of length 0 gives zeros. Sums are float32: a document is cut into parts of `PART` tokens,
counted from its own start, and the parts are added in order. So its bits depend neither on the
other documents nor on its place in the batch, and a long document is the work of many programs.
With ``normalize`` the pooled float32 vector ``m`` becomes ``y = m / max(|m|, 1e-12)`` before its
one rounding.

Backward, with u the unrounded y: ``dm = (dy - u (u . dy)) / |m|`` where normalized, else ``dy``.
Every token gets ``dm / length`` of its document (mean), or the first one gets ``dm``.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neobert_kernels import _check, _runtime
from neobert_kernels._packed import document_of_token
from neobert_kernels._triton import tl, triton

EPS = 1e-12  # the shortest vector that still gets length 1, as in torch.nn.functional.normalize


def mean_pool_reference(x: Tensor, cu_seqlens: Tensor, normalize: bool = False) -> Tensor:
    """The contract of `mean_pool` in plain PyTorch: the CPU path and, in float64, the oracle."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    lengths = cu_seqlens.diff()
    sums = wide.new_zeros(len(lengths), x.shape[1])
    sums = sums.index_add(0, document_of_token(cu_seqlens, len(x)), wide)
    return _finished(sums / lengths.clamp(min=1)[:, None], normalize, x.dtype)


def first_pool_reference(x: Tensor, cu_seqlens: Tensor, normalize: bool = False) -> Tensor:
    """The contract of `first_pool` in plain PyTorch: the CPU path and, in float64, the oracle."""
    if not len(x):  # zeros that still belong to the graph of x
        return x.sum(0).expand(len(cu_seqlens) - 1, -1)
    first = x[cu_seqlens[:-1].long().clamp(max=len(x) - 1)]
    first = first.masked_fill((cu_seqlens.diff() == 0)[:, None], 0.0)
    wide = first.to(torch.promote_types(x.dtype, torch.float32))
    return _finished(wide, normalize, x.dtype)


def _finished(pooled: Tensor, normalize: bool, dtype: torch.dtype) -> Tensor:
    return (F.normalize(pooled, dim=-1, eps=EPS) if normalize else pooled).to(dtype)


@triton.jit
def _document_of_part(number, cu_seqlens_ptr, B, PART: tl.constexpr):
    """The last document b whose key ``cu_seqlens[b] // PART + b`` is at most ``number``.

    Keys of neighbours differ by at least the parts of the first, so part p of document b can own
    number ``key(b) + p`` below ``T // PART + B``: no prefix sum, no synchronization.
    """
    low = number * 0
    high = low + B
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(cu_seqlens_ptr + middle) // PART + middle <= number
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def _document_of_token(token, first, cu_seqlens_ptr, B):
    """The document of neighbouring tokens from ``first``; B past the end of the last one."""
    low = first * 0
    high = low + B + 1
    while high - low > 1:
        middle = (low + high) // 2
        below = tl.load(cu_seqlens_ptr + middle) <= first
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    document = token * 0 + low
    # The others are in the same document or in one of the next: as many steps as documents end.
    ended = _ended(token, document, cu_seqlens_ptr, B)
    while tl.max(ended, axis=0) > 0:
        document += ended
        ended = _ended(token, document, cu_seqlens_ptr, B)
    return document


@triton.jit
def _ended(token, document, cu_seqlens_ptr, B):
    end = tl.load(cu_seqlens_ptr + document + 1, mask=document < B, other=2147483647)
    return (end <= token).to(tl.int32)


@triton.jit(do_not_specialize=["B"])
def _pool_sum_kernel(
    x_ptr, cu_seqlens_ptr, partial_ptr, y_ptr, B, x_stride,
    C: tl.constexpr, CHUNK: tl.constexpr, ROWS: tl.constexpr, PART: tl.constexpr,
    KEEP: tl.constexpr,
):  # fmt: skip
    """The float32 sum of one part of a document; its mean, if that is all of the document."""
    number = tl.program_id(0)
    document = _document_of_part(number, cu_seqlens_ptr, B, PART)
    begin = tl.load(cu_seqlens_ptr + document)
    end = tl.load(cu_seqlens_ptr + document + 1)
    start = begin + (number - begin // PART - document) * PART
    column = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    total = tl.zeros((ROWS, CHUNK), tl.float32)
    for first in range(start, tl.minimum(end, start + PART), ROWS):
        token = first + tl.arange(0, ROWS)
        # A part is a multiple of ROWS, so the end of the document is the only end.
        mask = (token < end)[:, None] & (column < C)[None, :]
        offset = token.to(tl.int64)[:, None] * x_stride + column[None, :]
        total += tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
    sums = tl.sum(total, axis=0)
    inside = column < C
    # All of a document in one part; an empty one has its first part, too.
    if (start == begin) & (end - begin <= PART) & (not KEEP):
        mean = sums / tl.maximum(end - begin, 1).to(tl.float32)
        offset = document.to(tl.int64) * C + column
        tl.store(y_ptr + offset, mean.to(y_ptr.dtype.element_ty), mask=inside)
    elif start < end:
        tl.store(partial_ptr + number.to(tl.int64) * C + column, sums, mask=inside)


@triton.jit
def _pooled(
    source_ptr, first, count, length, column, stride, C: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Columns of one document's float32 vector: its parts added and divided, or its first token."""
    if MEAN:
        total = tl.zeros((ROWS, CHUNK), tl.float32)
        for part in range(0, count, ROWS):
            row = part + tl.arange(0, ROWS)
            mask = (row < count)[:, None] & (column < C)[None, :]
            offset = (first + row).to(tl.int64)[:, None] * stride + column[None, :]
            total += tl.load(source_ptr + offset, mask=mask, other=0.0)
        pooled = tl.sum(total, axis=0) / tl.maximum(length, 1).to(tl.float32)
    else:
        pooled = tl.zeros((CHUNK,), tl.float32)
        if length > 0:
            offset = first.to(tl.int64) * stride + column
            pooled = tl.load(source_ptr + offset, mask=column < C, other=0.0).to(tl.float32)
    return pooled


@triton.jit
def _pool_finish_kernel(
    source_ptr, cu_seqlens_ptr, y_ptr, unit_ptr, norm_ptr, stride, C: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr, PART: tl.constexpr,
    MEAN: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """One program per document, and per ``SPAN`` chunks of columns unless a norm needs them all."""
    CHUNKS: tl.constexpr = (C + CHUNK - 1) // CHUNK
    document = tl.program_id(0)
    begin = tl.load(cu_seqlens_ptr + document)
    length = tl.load(cu_seqlens_ptr + document + 1) - begin
    first = begin
    count = 1
    if MEAN:
        first = begin // PART + document
        count = tl.cdiv(length, PART)
    out_ptr = y_ptr + document.to(tl.int64) * C
    unit_ptr += document.to(tl.int64) * C
    norm = 1.0
    if NORMALIZE:
        squares = tl.zeros((CHUNK,), tl.float32)
        for start in range(0, C, CHUNK):
            column = start + tl.arange(0, CHUNK)
            m = _pooled(source_ptr, first, count, length, column, stride, C, CHUNK, ROWS, MEAN)
            squares += m * m
        norm = tl.sqrt(tl.sum(squares, axis=0))
        tl.store(norm_ptr + document, norm)
        norm = tl.maximum(norm, 1e-12)
    # Without a norm, the mean of a document of one part is written already.
    if NORMALIZE or not MEAN or count > 1:
        for group in range(tl.program_id(1) * SPAN, CHUNKS, tl.num_programs(1) * SPAN):
            for j in tl.static_range(SPAN):
                column = (group + j) * CHUNK + tl.arange(0, CHUNK)
                y = _pooled(source_ptr, first, count, length, column, stride, C, CHUNK, ROWS, MEAN)
                if NORMALIZE:
                    y = y / norm
                    if y_ptr.dtype.element_ty != tl.float32:
                        tl.store(unit_ptr + column, y, mask=column < C)
                tl.store(out_ptr + column, y.to(y_ptr.dtype.element_ty), mask=column < C)


@triton.jit
def _pool_project_kernel(
    dy_ptr, unit_ptr, norm_ptr, dm_ptr, dy_stride, C: tl.constexpr, CHUNK: tl.constexpr
):
    """The gradient of one pooled vector, back through its normalization, in float32.

    The direction that is taken out must be the unrounded one: along it dy can be all there is.
    """
    document = tl.program_id(0).to(tl.int64)
    dy_ptr += document * dy_stride
    unit_ptr += document * C
    dot = tl.zeros((CHUNK,), tl.float32)
    for start in range(0, C, CHUNK):
        column = start + tl.arange(0, CHUNK)
        dy = tl.load(dy_ptr + column, mask=column < C, other=0.0).to(tl.float32)
        dot += dy * tl.load(unit_ptr + column, mask=column < C, other=0.0)
    norm = tl.load(norm_ptr + document)
    # Below 1e-12 the vector was divided by a constant.
    along = tl.where(norm > 1e-12, tl.sum(dot, axis=0), 0.0)
    for start in range(0, C, CHUNK):
        column = start + tl.arange(0, CHUNK)
        dy = tl.load(dy_ptr + column, mask=column < C, other=0.0).to(tl.float32)
        unit = tl.load(unit_ptr + column, mask=column < C, other=0.0)
        dm = (dy - unit * along) / tl.maximum(norm, 1e-12)
        tl.store(dm_ptr + document * C + column, dm, mask=column < C)


@triton.jit(do_not_specialize=["T", "B"])
def _pool_backward_kernel(
    dm_ptr, cu_seqlens_ptr, dx_ptr, T, B, dm_stride, C: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, SPAN: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Every token looks up its document; every element of dx is written once."""
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(0) * ROWS
    document = _document_of_token(tl.minimum(token, T - 1), first, cu_seqlens_ptr, B)
    real = (token < T) & (document < B)
    begin = tl.load(cu_seqlens_ptr + document, mask=real, other=0)
    length = tl.load(cu_seqlens_ptr + document + 1, mask=real, other=1) - begin
    wanted = real if MEAN else real & (token == begin)
    for j in tl.static_range(SPAN):
        column = (tl.program_id(1) * SPAN + j) * CHUNK + tl.arange(0, CHUNK)
        mask = wanted[:, None] & (column < C)[None, :]
        offset = document.to(tl.int64)[:, None] * dm_stride + column[None, :]
        dx = tl.load(dm_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        if MEAN:
            dx = dx / length.to(tl.float32)[:, None]
        mask = (token < T)[:, None] & (column < C)[None, :]
        offset = token.to(tl.int64)[:, None] * C + column[None, :]
        tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=mask)


# All unmeasured.
PART = 128  # tokens of a document that one program adds; at width 768 in bfloat16, 64 KB a chunk
ROWS = 4  # that a warp adds at a time: as many 16-byte loads in flight in every lane
BACKWARD_ROWS = 8  # of a program in the backward: two of each warp
SPAN = 8  # most chunks of columns whose code is unrolled
WARPS = 4  # of the backward; sums take one warp, whose lanes own their columns


def tile(itemsize: int, backward: bool = False) -> dict[str, int]:
    """A warp moves 512 neighbouring bytes of one row, 16 a lane."""
    return {"CHUNK": 512 // itemsize, "ROWS": BACKWARD_ROWS if backward else ROWS}


def _chunks(C: int, itemsize: int) -> int:
    return -(-C * itemsize // 512)


def finish_span(chunks: int, mean: bool) -> int:
    """Chunks of columns side by side; of means none, which have many parts to add.

    Without a norm their columns are spread over programs; with one, three chunks and their float32
    copies spill a register on sm_80.
    """
    return 1 if mean else min(chunks, SPAN)


Outputs = tuple[Tensor, Tensor, Tensor]


def _launch(x: Tensor, cu_seqlens: Tensor, mean: bool, normalize: bool) -> Outputs:
    T, C, B = *x.shape, len(cu_seqlens) - 1
    y, unit, norm = outputs = _fake(x, cu_seqlens, mean, normalize)
    if not (T and C and B):
        for output in outputs:
            output.zero_()
        return outputs
    x, cu_seqlens = _runtime.neighbouring(x), cu_seqlens.contiguous()
    moves, size = tile(x.element_size()), x.element_size()
    source, stride = x, x.stride(0)
    chunks = _chunks(C, size)
    if mean:
        numbers = T // PART + B
        source, stride = x.new_empty((numbers, C), dtype=torch.float32), C
        _pool_sum_kernel[(numbers, chunks)](
            x, cu_seqlens, source, y, B, x.stride(0), C, PART=PART, KEEP=normalize,
            **moves, num_warps=1, **_runtime.FP_FUSION,
        )  # fmt: skip
    span = finish_span(chunks, mean)
    _pool_finish_kernel[(B, 1 if normalize else triton.cdiv(chunks, span))](
        source, cu_seqlens, y, unit, norm, stride, C, SPAN=span, PART=PART, MEAN=mean,
        NORMALIZE=normalize, **moves, num_warps=1, **_runtime.FP_FUSION,
    )  # fmt: skip
    return outputs


def _fake(x: Tensor, cu_seqlens: Tensor, mean: bool, normalize: bool) -> Outputs:
    """Pooled vectors; the same before they are rounded, where they are; lengths, if normalized."""
    B = cu_seqlens.shape[0] - 1
    rounded = normalize and x.dtype != torch.float32
    unit = x.new_empty((B if rounded else 0, x.shape[1]), dtype=torch.float32)
    norm = x.new_empty(B if normalize else 0, dtype=torch.float32)
    return x.new_empty((B, x.shape[1])), unit, norm


def _launch_backward(
    dy: Tensor, unit: Tensor, norm: Tensor, cu_seqlens: Tensor, T: int, mean: bool, normalize: bool
) -> Tensor:
    B, C = dy.shape
    dx = dy.new_empty((T, C))
    if not (T and C and B):
        return dx.zero_()
    dy, cu_seqlens = _runtime.neighbouring(dy), cu_seqlens.contiguous()
    dm = dy
    moves, size = tile(dy.element_size(), backward=True), dy.element_size()
    if normalize:
        dm = dy.new_empty((B, C), dtype=torch.float32)
        _pool_project_kernel[(B,)](
            dy, unit, norm, dm, dy.stride(0), C, moves["CHUNK"], num_warps=1, **_runtime.FP_FUSION,
        )  # fmt: skip
    span = min(_chunks(C, size), SPAN)
    _pool_backward_kernel[(triton.cdiv(T, moves["ROWS"]), triton.cdiv(_chunks(C, size), span))](
        dm, cu_seqlens, dx, T, B, dm.stride(0), C, SPAN=span, MEAN=mean,
        **moves, num_warps=WARPS, **_runtime.FP_FUSION,
    )  # fmt: skip
    return dx


def _fake_backward(
    dy: Tensor, unit: Tensor, norm: Tensor, cu_seqlens: Tensor, T: int, mean: bool, normalize: bool
) -> Tensor:
    return dy.new_empty((T, dy.shape[1]))


_forward = _runtime.register(
    "pool(Tensor x, Tensor cu_seqlens, bool mean, bool normalize) -> (Tensor, Tensor, Tensor)",
    _launch,
    _fake,
    extension=True,
)
_backward = _runtime.register(
    "pool_backward(Tensor dy, Tensor unit, Tensor norm, Tensor cu_seqlens, SymInt T, bool mean,"
    " bool normalize) -> Tensor",
    _launch_backward,
    _fake_backward,
)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cu_seqlens: Tensor, mean: bool, normalize: bool) -> Tensor:
        y, unit, norm = _forward(x, cu_seqlens, mean, normalize)
        # A float32 result is its own; without normalizing there are no elements to keep.
        kept = y if normalize and x.dtype == torch.float32 else unit
        ctx.save_for_backward(kept, norm, cu_seqlens)
        ctx.options = (x.shape[0], mean, normalize)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        return _backward(dy, *ctx.saved_tensors, *ctx.options), None, None, None


_apply = _runtime.differentiable(_Pool, _forward, first=True)


def _check_arguments(x: Tensor, cu_seqlens: Tensor, normalize: Any) -> None:
    _check.tensor("x", x, ndim=2)
    _check.dtype("x", x)
    _check.cu_seqlens(cu_seqlens, len(x), x.device)
    _check.flag("normalize", normalize)


def mean_pool(x: Tensor, cu_seqlens: Tensor, normalize: bool = False) -> Tensor:
    """Average the token vectors of each document.

    Args:
        x: ``[T, C]``; float32, float16 or bfloat16; any strides.
        cu_seqlens: ``[B + 1]`` int32 document boundaries.
        normalize: Divide each mean by its length before it is rounded, as an embedding needs it.

    Returns:
        ``[B, C]`` in ``x.dtype``, with or without autocast; zeros for an empty document.
        Differentiable once on a GPU.

    Raises:
        ValueError: A shape, dtype, device or (on CPU) boundary breaks the rules above.
    """
    _check_arguments(x, cu_seqlens, normalize)
    if not _runtime.use_kernel(x):
        return mean_pool_reference(x, cu_seqlens, normalize)
    return _apply(x, cu_seqlens, True, normalize)


def first_pool(x: Tensor, cu_seqlens: Tensor, normalize: bool = False) -> Tensor:
    """Take the first token vector of each document ([CLS] in BERT-class encoders).

    Args, returns, raises: as `mean_pool`.
    """
    _check_arguments(x, cu_seqlens, normalize)
    if not _runtime.use_kernel(x):
        return first_pool_reference(x, cu_seqlens, normalize)
    return _apply(x, cu_seqlens, False, normalize)


def _launches(mean: bool) -> Iterator[_runtime.Launch]:
    floats = dict.fromkeys(("partial_ptr", "unit_ptr", "norm_ptr"), "*fp32") | {
        "cu_seqlens_ptr": "*i32"
    }
    what = "mean" if mean else "first"

    def launch(
        kernel: Any, name: str, case: str, dtype: torch.dtype, warps: int = 1,
        types: dict[str, str] | None = None, **flags: int,
    ) -> _runtime.Launch:  # fmt: skip
        signature = _runtime.signature(kernel, dtype, **floats | (types or {}))
        span = min(_chunks(768, dtype.itemsize), SPAN)
        moves = tile(dtype.itemsize, backward=kernel is _pool_backward_kernel)
        constexprs = {"C": 768, **moves, "SPAN": span, "PART": PART, **flags}
        names = [p.name for p in kernel.params if p.is_constexpr]
        return _runtime.Launch(
            kernel, f"{what}_pool_{name}", f"C=768 {_runtime.TRITON_TYPES[dtype]}{case}", signature,
            {key: constexprs[key] for key in names}, warps,
            aligned=tuple(n for n in signature if n.endswith("_ptr") or n.endswith("stride")),
        )  # fmt: skip

    for dtype in _check.DTYPES:
        for normalize in (False, True) if dtype != torch.float16 else (False,):
            case = " normalized" * normalize
            if mean:
                yield launch(_pool_sum_kernel, "sum", case, dtype, KEEP=normalize)
            wide = {"source_ptr": "*fp32"} if mean else {}
            flags: dict[str, int] = {"MEAN": mean, "NORMALIZE": normalize}
            flags["SPAN"] = finish_span(_chunks(768, dtype.itemsize), mean)
            yield launch(_pool_finish_kernel, "finish", case, dtype, types=wide, **flags)
            wide = {"dm_ptr": "*fp32"} if normalize else {}
            yield launch(
                _pool_backward_kernel, "backward", case, dtype, WARPS, types=wide, MEAN=mean
            )
        wide = {"dm_ptr": "*fp32"}
        yield launch(_pool_project_kernel, "project", "", dtype, types=wide)


def _mean_pool_launches(sm: int) -> Iterator[_runtime.Launch]:
    yield from _launches(True)


def _first_pool_launches(sm: int) -> Iterator[_runtime.Launch]:
    yield from _launches(False)


_SHARED = (_pool_finish_kernel, _pool_project_kernel, _pool_backward_kernel)
_runtime.operator(mean_pool, mean_pool_reference, (_pool_sum_kernel, *_SHARED), _mean_pool_launches)
_runtime.operator(first_pool, first_pool_reference, _SHARED, _first_pool_launches)
