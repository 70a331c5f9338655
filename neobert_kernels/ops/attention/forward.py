"""The forward kernel: one program per query tile and head, softmax online over the key tiles."""

from neobert_kernels._triton import tl, triton
from neobert_kernels.ops._rounding import rounded
from neobert_kernels.ops.attention.device import (
    accumulate,
    bulk,
    load_bulk,
    load_rows,
    load_turned,
    locate,
    product,
    scaled,
    store_rows,
    visible,
    zeros,
)


@triton.jit
def _attend(
    q, sums, largest, total, k_ptr, v_ptr, cos_ptr, sin_ptr, query, at, length, window, exponent,
    k_stride_t, v_stride_t, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    V_FIRST: tl.constexpr, V_SECOND: tl.constexpr, INNER: tl.constexpr, TURN: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_WINDOW: tl.constexpr, TMA: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """One key tile more: rescale what is there to the new largest score, then add.

    ``k_ptr`` and ``v_ptr`` are TMA descriptors where ``TMA``.
    """
    row = tl.arange(0, INNER)
    key = at + row
    if TMA:
        k = load_bulk(k_ptr, at, FIRST, SECOND)
    else:
        k = load_turned(
            k_ptr, cos_ptr, sin_ptr, at, row, k_stride_t, length, D, FIRST, SECOND, TURN, TURN,
            INTERLEAVED, MASKED,
        )  # fmt: skip
    scores = product(q, k, SECOND)
    if MASKED:
        seen = visible(query[:, None], key[None, :], length, window, HAS_WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    # `largest * exponent` is finite, so a row that has seen no key yet makes exp2(-inf), never NaN.
    new = tl.maximum(largest, tl.max(scores, axis=1))
    p = tl.exp2(scores * exponent - (new * exponent)[:, None])
    rescale = tl.exp2((largest - new) * exponent)
    total = total * rescale + tl.sum(p, axis=1)
    if TMA:
        v = load_bulk(v_ptr, at, V_FIRST, V_SECOND)
    else:
        v = load_rows(v_ptr, at, row, v_stride_t, length, D, V_FIRST, V_SECOND, MASKED)
    sums = scaled(sums, rescale[:, None], V_SECOND)
    sums = accumulate(sums, rounded(p, v[0].dtype), v, V_SECOND)
    return sums, new, total


@triton.jit(do_not_specialize=["tokens", "documents", "window"])
def attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, cu_seqlens_ptr, out_ptr, lse_ptr,
    tokens, documents, window, scale, q_stride_t, q_stride_h, k_stride_t, k_stride_h, v_stride_t,
    v_stride_h, D: tl.constexpr, GROUP: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    V_FIRST: tl.constexpr, V_SECOND: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
    SEARCH: tl.constexpr, TURN: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_WINDOW: tl.constexpr,
    TMA: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    """Writes ``out [T, H, D]`` and ``lse [H, T]``, the base-2 logarithm of each row's sum."""
    slot, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, length, first = locate(cu_seqlens_ptr, documents, slot, OUTER, SEARCH)
    if not SPECIALIZED:  # noqa: SIM102  (a return would leave all warps with the same task)
        if first >= length:
            return
    exponent = scale * 1.4426950408889634  # log2(e): exp2 is one instruction
    q_ptr += start * q_stride_t + head * q_stride_h
    k_ptr += start * k_stride_t + head // GROUP * k_stride_h
    v_ptr += start * v_stride_t + head // GROUP * v_stride_h
    out_ptr += (start * tl.num_programs(1) + head) * D
    cos_ptr += start * (D // 2)
    sin_ptr += start * (D // 2)

    row = tl.arange(0, OUTER)
    query = first + row
    if TMA:
        # A spare program reads out of bounds, which is no read at all, and then no key.
        at = tl.where(first < length, first, 1 << 30)
        q = load_bulk(bulk(q_ptr, length, q_stride_t, D, OUTER, FIRST, SECOND), at, FIRST, SECOND)
        k_ptr = bulk(k_ptr, length, k_stride_t, D, INNER, FIRST, SECOND)
        v_ptr = bulk(v_ptr, length, v_stride_t, D, INNER, V_FIRST, V_SECOND)
    else:
        q = load_turned(
            q_ptr, cos_ptr, sin_ptr, first, row, q_stride_t, length, D, FIRST, SECOND, TURN, TURN,
            INTERLEAVED, True,
        )  # fmt: skip
    low, full, high = 0, length // INNER * INNER, length
    if HAS_WINDOW:  # most of its tiles lie on an edge, so all are masked
        low = tl.maximum(first - window, 0) // INNER * INNER
        full = low
        high = tl.minimum(length, first + OUTER + window)
    if SPECIALIZED:  # takes one loop only, so that one is masked
        full = low
        high = tl.where(first < length, high, low)
    sums = zeros(OUTER, V_FIRST, V_SECOND)
    # So low that any score is larger, and still finite once it is multiplied by `exponent`.
    largest = tl.zeros((OUTER,), tl.float32) - 1e38 / tl.maximum(exponent, 1.0)
    total = tl.zeros((OUTER,), tl.float32)
    if not SPECIALIZED:
        for at in tl.range(low, full, INNER):
            sums, largest, total = _attend(
                q, sums, largest, total, k_ptr, v_ptr, cos_ptr, sin_ptr, query, at, length, window,
                exponent, k_stride_t, v_stride_t, D, FIRST, SECOND, V_FIRST, V_SECOND, INNER, TURN,
                INTERLEAVED, HAS_WINDOW, TMA, False,
            )  # fmt: skip
    for at in tl.range(full, high, INNER, warp_specialize=SPECIALIZED):
        sums, largest, total = _attend(
            q, sums, largest, total, k_ptr, v_ptr, cos_ptr, sin_ptr, query, at, length, window,
            exponent, k_stride_t, v_stride_t, D, FIRST, SECOND, V_FIRST, V_SECOND, INNER, TURN,
            INTERLEAVED, HAS_WINDOW, TMA, True,
        )  # fmt: skip
    # Rows past the end may have seen no key; those inside have seen their own.
    total = tl.where(query < length, total, 1.0)
    sums = scaled(sums, (1.0 / total)[:, None], V_SECOND)
    store_rows(
        out_ptr, first, row, tl.num_programs(1) * D, length, sums, D, V_FIRST, V_SECOND
    )  # fmt: skip
    lse = largest * exponent + tl.log2(total)
    tl.store(lse_ptr + head * tokens + start + query, lse, mask=query < length)
