"""The backward kernels: dq by query tiles, then dk and dv by key tiles. No atomics.

docs/attention.md derives them with these symbols.
"""

from neobert_kernels._triton import tl, triton
from neobert_kernels.ops._rounding import rounded
from neobert_kernels.ops.attention.device import (
    accumulate,
    load_rows,
    load_turned,
    locate,
    product,
    scaled,
    store_rows,
    store_turned_back,
    visible,
    within,
    zeros,
)


@triton.jit
def _add_dq(
    dq, q, dout, lse, delta, k_ptr, v_ptr, cos_ptr, sin_ptr, query, at, length, window, exponent,
    k_stride_t, v_stride_t, D: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    V_FIRST: tl.constexpr, V_SECOND: tl.constexpr, INNER: tl.constexpr, PAIRS: tl.constexpr,
    TURN: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_WINDOW: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One key tile's part of dq."""
    row = tl.arange(0, INNER)
    key = at + row
    k = load_turned(
        k_ptr, cos_ptr, sin_ptr, at, row, k_stride_t, length, D, FIRST, SECOND, PAIRS, TURN,
        INTERLEAVED, MASKED,
    )  # fmt: skip
    scores = product(q, k, SECOND) * exponent - lse[:, None]
    if MASKED:
        # Not by k = 0 alone: exp2(-lse) overflows where all scores are very negative.
        seen = visible(query[:, None], key[None, :], length, window, HAS_WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    p = tl.exp2(scores)
    v = load_rows(v_ptr, at, row, v_stride_t, length, D, V_FIRST, V_SECOND, MASKED)
    ds = p * (product(dout, v, V_SECOND) - delta[:, None])
    return accumulate(dq, rounded(ds, k[0].dtype), k, SECOND)


@triton.jit(do_not_specialize=["tokens", "documents", "window"])
def attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, cu_seqlens_ptr, out_ptr, dout_ptr, lse_ptr, delta_ptr,
    dq_ptr, tokens, documents, window, scale, q_stride_t, q_stride_h, k_stride_t, k_stride_h,
    v_stride_t, v_stride_h, dout_stride_t, dout_stride_h, dq_stride_t, dq_stride_h,
    D: tl.constexpr, GROUP: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    V_FIRST: tl.constexpr, V_SECOND: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
    SEARCH: tl.constexpr, PAIRS: tl.constexpr, TURN: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Writes dq, and ``delta [H, T]`` = rowsum(dout * out), which dk needs as well."""
    slot, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, length, first = locate(cu_seqlens_ptr, documents, slot, OUTER, SEARCH)
    if first >= length:
        return
    exponent = scale * 1.4426950408889634
    q_ptr += start * q_stride_t + head * q_stride_h
    k_ptr += start * k_stride_t + head // GROUP * k_stride_h
    v_ptr += start * v_stride_t + head // GROUP * v_stride_h
    out_ptr += (start * tl.num_programs(1) + head) * D
    dout_ptr += start * dout_stride_t + head * dout_stride_h
    dq_ptr += start * dq_stride_t + head * dq_stride_h
    cos_ptr += start * (D // 2)
    sin_ptr += start * (D // 2)
    lse_ptr += head * tokens + start
    delta_ptr += head * tokens + start

    row = tl.arange(0, OUTER)
    query = first + row
    inside = query < length
    dout = load_rows(dout_ptr, first, row, dout_stride_t, length, D, V_FIRST, V_SECOND, True)
    out = load_rows(out_ptr, first, row, tl.num_programs(1) * D, length, D, V_FIRST, V_SECOND, True)
    delta = tl.sum(dout[0].to(tl.float32) * out[0].to(tl.float32), axis=1)
    if V_SECOND:
        delta += tl.sum(dout[1].to(tl.float32) * out[1].to(tl.float32), axis=1)
    tl.store(delta_ptr + query, delta, mask=inside)
    # Rows past the end get p = exp2(-inf) = 0.
    lse = tl.load(lse_ptr + query, mask=inside, other=float("inf"))
    q = load_turned(
        q_ptr, cos_ptr, sin_ptr, first, row, q_stride_t, length, D, FIRST, SECOND, PAIRS, TURN,
        INTERLEAVED, True,
    )  # fmt: skip
    low, full, high = 0, length // INNER * INNER, length
    if HAS_WINDOW:
        low = tl.maximum(first - window, 0) // INNER * INNER
        full = low
        high = tl.minimum(length, first + OUTER + window)
    dq = zeros(OUTER, FIRST, SECOND)
    for at in tl.range(low, full, INNER):
        dq = _add_dq(
            dq, q, dout, lse, delta, k_ptr, v_ptr, cos_ptr, sin_ptr, query, at, length, window,
            exponent, k_stride_t, v_stride_t, D, FIRST, SECOND, V_FIRST, V_SECOND, INNER, PAIRS,
            TURN, INTERLEAVED, HAS_WINDOW, False,
        )  # fmt: skip
    for at in tl.range(full, high, INNER):
        dq = _add_dq(
            dq, q, dout, lse, delta, k_ptr, v_ptr, cos_ptr, sin_ptr, query, at, length, window,
            exponent, k_stride_t, v_stride_t, D, FIRST, SECOND, V_FIRST, V_SECOND, INNER, PAIRS,
            TURN, INTERLEAVED, HAS_WINDOW, True,
        )  # fmt: skip
    dq = scaled(dq, scale, SECOND)
    store_turned_back(
        dq_ptr, cos_ptr, sin_ptr, first, row, dq_stride_t, length, dq, D, FIRST, SECOND, PAIRS,
        INTERLEAVED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "documents", "window"])
def attention_dkv_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, cu_seqlens_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr,
    dv_ptr, tokens, documents, window, scale, q_stride_t, q_stride_h, k_stride_t, k_stride_h,
    v_stride_t, v_stride_h, dout_stride_t, dout_stride_h, dk_stride_t, dk_stride_h, dv_stride_t,
    dv_stride_h, D: tl.constexpr, GROUP: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    V_FIRST: tl.constexpr, V_SECOND: tl.constexpr, OUTER: tl.constexpr, INNER: tl.constexpr,
    SEARCH: tl.constexpr, PAIRS: tl.constexpr, TURN: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    """Writes dk and dv of one key/value head: a sum over the queries of all heads it serves.

    Scores are transposed here, ``[keys, queries]``, so that p and ds are left operands as they are.
    """
    slot, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, length, first = locate(cu_seqlens_ptr, documents, slot, OUTER, SEARCH)
    if first >= length:
        return
    exponent = scale * 1.4426950408889634
    k_ptr += start * k_stride_t + group * k_stride_h
    v_ptr += start * v_stride_t + group * v_stride_h
    dk_ptr += start * dk_stride_t + group * dk_stride_h
    dv_ptr += start * dv_stride_t + group * dv_stride_h
    cos_ptr += start * (D // 2)
    sin_ptr += start * (D // 2)

    row = tl.arange(0, OUTER)
    key = first + row
    k = load_turned(
        k_ptr, cos_ptr, sin_ptr, first, row, k_stride_t, length, D, FIRST, SECOND, PAIRS, TURN,
        INTERLEAVED, True,
    )  # fmt: skip
    v = load_rows(v_ptr, first, row, v_stride_t, length, D, V_FIRST, V_SECOND, True)
    low, high = 0, length
    if HAS_WINDOW:
        low = tl.maximum(first - window, 0) // INNER * INNER
        high = tl.minimum(length, first + OUTER + window)
    dk, dv = zeros(OUTER, FIRST, SECOND), zeros(OUTER, V_FIRST, V_SECOND)
    for i in range(GROUP):
        head = group * GROUP + i
        q_head_ptr = q_ptr + start * q_stride_t + head * q_stride_h
        dout_head_ptr = dout_ptr + start * dout_stride_t + head * dout_stride_h
        row_ptr = head * tokens + start
        for at in tl.range(low, high, INNER):
            column = tl.arange(0, INNER)
            query = at + column
            inside = query < length
            q = load_turned(
                q_head_ptr, cos_ptr, sin_ptr, at, column, q_stride_t, length, D, FIRST, SECOND,
                PAIRS, TURN, INTERLEAVED, True,
            )  # fmt: skip
            # Queries past the end get p = 0; keys past the end touch rows that are not stored.
            lse = tl.load(lse_ptr + row_ptr + query, mask=inside, other=float("inf"))
            scores = product(k, q, SECOND) * exponent - lse[None, :]
            if HAS_WINDOW:
                near = within(key[:, None], query[None, :], window)
                scores = tl.where(near, scores, float("-inf"))
            p = tl.exp2(scores)
            dout = load_rows(
                dout_head_ptr, at, column, dout_stride_t, length, D, V_FIRST, V_SECOND, True
            )  # fmt: skip
            dv = accumulate(dv, rounded(p, dout[0].dtype), dout, V_SECOND)
            delta = tl.load(delta_ptr + row_ptr + query, mask=inside, other=0.0)
            ds = p * (product(v, dout, V_SECOND) - delta[None, :])
            dk = accumulate(dk, rounded(ds, q[0].dtype), q, SECOND)
    # dv first: its registers are free when dk turns back.
    store_rows(dv_ptr, first, row, dv_stride_t, length, dv, D, V_FIRST, V_SECOND)
    dk = scaled(dk, scale, SECOND)
    store_turned_back(
        dk_ptr, cos_ptr, sin_ptr, first, row, dk_stride_t, length, dk, D, FIRST, SECOND, PAIRS,
        INTERLEAVED,
    )  # fmt: skip
