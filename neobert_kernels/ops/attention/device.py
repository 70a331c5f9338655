"""What the attention kernels share: the work map, tiles in column parts, and their products."""

from neobert_kernels import _runtime
from neobert_kernels._triton import tl, triton
from neobert_kernels.ops._rounding import rounded
from neobert_kernels.ops.rope import load_angles, load_pair, rotate, store_pair

if _runtime.INTERPRET:

    @triton.jit
    def operand(x):
        """The interpreter multiplies bfloat16 bit patterns as integers, so it gets float32."""
        return x.to(tl.float32)

else:

    @triton.jit
    def operand(x):
        return x


@triton.jit
def locate(cu_seqlens_ptr, documents, slot, BLOCK: tl.constexpr, SEARCH: tl.constexpr):
    """``(first token, length)`` of the document that owns ``slot``, and its first row there.

    Document b owns the slots from ``s_b = cu_seqlens[b] // BLOCK + b`` up to ``s_(b + 1)``: enough
    for its tiles and at most one more, so a first row may lie past the length. ``s_b >= b`` bounds
    the search; whole vectors of boundaries cost one load's latency each.
    """
    document = 0
    for at in range(1, tl.minimum(documents, slot + 1), SEARCH):
        b = at + tl.arange(0, SEARCH)
        bound = tl.load(cu_seqlens_ptr + b, mask=b < documents, other=0x7FFFFFFF)
        document += tl.sum((bound // BLOCK + b <= slot).to(tl.int32), axis=0)
    start = tl.load(cu_seqlens_ptr + document)
    length = tl.load(cu_seqlens_ptr + document + 1) - start
    return start.to(tl.int64), length, (slot - document - start // BLOCK) * BLOCK


@triton.jit
def load_part(
    ptr, first, row, stride, length, D: tl.constexpr, AT: tl.constexpr, WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Columns ``AT ... AT + WIDTH`` of a tile of a document; zero past D and its length.

    The tile's rows are ``first + row``. Only ``first`` is widened: `launch` sees to it that 128
    rows span less than 2**31 elements, and narrow offsets take half the registers.
    """
    column = AT + tl.arange(0, WIDTH)
    at = ptr + tl.cast(first, tl.int64) * stride + (row[:, None] * stride + column[None, :])
    if MASKED:
        mask = (first + row < length)[:, None]
        if AT + WIDTH > D:
            mask = mask & (column < D)[None, :]
        return tl.load(at, mask=mask, other=0.0)
    elif AT + WIDTH > D:
        return tl.load(at, mask=(column < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def load_rows(
    ptr, first, row, stride, length, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Some rows of a document as a tuple of one or two column parts."""
    parts = (load_part(ptr, first, row, stride, length, D, 0, FIRST, MASKED),)
    if SECOND:
        parts = parts + (load_part(ptr, first, row, stride, length, D, FIRST, SECOND, MASKED),)  # noqa: RUF005
    return parts


@triton.jit
def bulk(
    ptr, length, stride, D: tl.constexpr, ROWS: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):  # fmt: skip
    """Descriptors for TMA copies of `load_rows`: they end with the document, zeros follow."""
    length = tl.maximum(length, 1)  # the hardware knows no empty matrix
    parts = (tl.make_tensor_descriptor(ptr, [length, D], [stride, 1], [ROWS, FIRST]),)
    if SECOND:
        parts = parts + (tl.make_tensor_descriptor(ptr, [length, D], [stride, 1], [ROWS, SECOND]),)  # noqa: RUF005
    return parts


@triton.jit
def load_bulk(parts, first, FIRST: tl.constexpr, SECOND: tl.constexpr):
    """`load_rows` by TMA: no lane computes an address or a mask."""
    out = (parts[0].load([first, 0]),)
    if SECOND:
        out = out + (parts[1].load([first, FIRST]),)  # noqa: RUF005
    return out


@triton.jit
def load_turned(
    ptr, cos_ptr, sin_ptr, first, row, stride, length, D: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr, PAIRS: tl.constexpr, TURN: tl.constexpr, INTERLEAVED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Some rows of q or k as column parts; as the two members of every pair where ``PAIRS``.

    ``TURN`` rotates them, in float32, and rounds. Without it they come turned already, and in
    half-split order. A product over channels does not care about their order.
    """
    if PAIRS:
        inside = first + row < length
        wide = tl.cast(first, tl.int64)
        a, b = load_pair(ptr + wide * stride, row, stride, inside, D, FIRST, INTERLEAVED and TURN)
        if TURN:
            cos = load_angles(cos_ptr + wide * (D // 2), row, inside, D, FIRST)
            sin = load_angles(sin_ptr + wide * (D // 2), row, inside, D, FIRST)
            dtype: tl.constexpr = a.dtype
            a, b = rotate(a.to(tl.float32), b.to(tl.float32), cos, sin)
            a, b = rounded(a, dtype), rounded(b, dtype)
        parts = (a, b)
    else:
        parts = load_rows(ptr, first, row, stride, length, D, FIRST, SECOND, MASKED)
    return parts


@triton.jit
def product(a, b, SECOND: tl.constexpr):
    """``a b^T`` of two tuples of column parts, in float32."""
    out = tl.dot(operand(a[0]), tl.trans(operand(b[0])), input_precision="ieee")
    if SECOND:
        out = tl.dot(operand(a[1]), tl.trans(operand(b[1])), out, input_precision="ieee")
    return out


@triton.jit
def accumulate(sums, weights, rows, SECOND: tl.constexpr):
    """``sums + weights rows`` for every column part of ``rows``."""
    weights = operand(weights)
    out = (tl.dot(weights, operand(rows[0]), sums[0], input_precision="ieee"),)
    if SECOND:
        out = out + (tl.dot(weights, operand(rows[1]), sums[1], input_precision="ieee"),)  # noqa: RUF005
    return out


@triton.jit
def zeros(ROWS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr):
    parts = (tl.zeros((ROWS, FIRST), tl.float32),)
    if SECOND:
        parts = parts + (tl.zeros((ROWS, SECOND), tl.float32),)  # noqa: RUF005
    return parts


@triton.jit
def scaled(parts, factor, SECOND: tl.constexpr):
    out = (parts[0] * factor,)
    if SECOND:
        out = out + (parts[1] * factor,)  # noqa: RUF005
    return out


@triton.jit
def store_part(
    ptr, first, row, stride, length, part, D: tl.constexpr, AT: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    column = AT + tl.arange(0, WIDTH)
    mask = (first + row < length)[:, None]
    if AT + WIDTH > D:
        mask = mask & (column < D)[None, :]
    at = ptr + tl.cast(first, tl.int64) * stride + (row[:, None] * stride + column[None, :])
    tl.store(at, rounded(part, ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_rows(
    ptr, first, row, stride, length, parts, D: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr,
):  # fmt: skip
    """The inverse of `load_rows`; rounds to the type that ``ptr`` points to."""
    store_part(ptr, first, row, stride, length, parts[0], D, 0, FIRST)
    if SECOND:
        store_part(ptr, first, row, stride, length, parts[1], D, FIRST, SECOND)


@triton.jit
def store_turned_back(
    ptr, cos_ptr, sin_ptr, first, row, stride, length, parts, D: tl.constexpr, FIRST: tl.constexpr,
    SECOND: tl.constexpr, PAIRS: tl.constexpr, INTERLEAVED: tl.constexpr,
):  # fmt: skip
    """Gradients of turned rows as gradients of the rows: the opposite rotation, one rounding."""
    if PAIRS:
        inside = first + row < length
        wide = tl.cast(first, tl.int64)
        cos = load_angles(cos_ptr + wide * (D // 2), row, inside, D, FIRST)
        sin = load_angles(sin_ptr + wide * (D // 2), row, inside, D, FIRST)
        a, b = rotate(parts[0], parts[1], cos, -sin)
        store_pair(ptr + wide * stride, row, stride, inside, a, b, D, FIRST, INTERLEAVED)
    else:
        store_rows(ptr, first, row, stride, length, parts, D, FIRST, SECOND)


@triton.jit
def within(i, j, window):
    """``|i - j| <= window``, by sums of vectors that the compiler makes once."""
    return (i <= j + window) & (i >= j - window)


@triton.jit
def visible(query, key, length, window, HAS_WINDOW: tl.constexpr):
    """Which of the pairs attend: keys inside the document and, with a window, inside it."""
    seen = (key < length) & (query >= 0)
    if HAS_WINDOW:
        seen = seen & within(query, key, window)
    return seen
