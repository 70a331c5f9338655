"""The kernel: a program makes some columns for 16 rows, and their norm again."""

from neobert_kernels._triton import tl, triton
from neobert_kernels.ops._rounding import rounded
from neobert_kernels.ops.swiglu import activate


@triton.jit
def _channels(j, SLICES: tl.constexpr, SLICE: tl.constexpr):
    """The channels of chunk ``j`` as ``[SLICES, 1, SLICE]``: a slice is what one warp adds up."""
    slices = tl.arange(0, SLICES)[:, None, None]
    return (j * SLICES + slices) * SLICE + tl.arange(0, SLICE)[None, None, :]


@triton.jit
def _load_chunk(
    ptr, row, rows, stride, k, ROWS_FIT: tl.constexpr, K_FITS: tl.constexpr, K: tl.constexpr
):  # fmt: skip
    """Channels ``k`` of the rows ``row`` as ``[SLICES, rows, SLICE]``, zeros outside."""
    at = ptr + row.to(tl.int64)[None, :, None] * stride + k
    if ROWS_FIT and K_FITS:
        return tl.load(at)
    elif ROWS_FIT:
        return tl.load(at, mask=k < K, other=0.0)
    elif K_FITS:
        return tl.load(at, mask=(row < rows)[None, :, None], other=0.0)
    return tl.load(at, mask=(row < rows)[None, :, None] & (k < K), other=0.0)


@triton.jit
def _multiplied(u, w, sums, WIDE: tl.constexpr):
    """``sums [SLICES, ROWS, COLUMNS]`` and the products of one chunk.

    ``WIDE``: the interpreter multiplies no bfloat16.
    """
    if WIDE:
        u, w = u.to(tl.float32), w.to(tl.float32)
    return tl.dot(u, tl.trans(w, 0, 2, 1), sums, input_precision="ieee")


@triton.jit
def _row_sum(x):
    """``[SLICES, ROWS, SLICE]`` to ``[1, ROWS, 1]``."""
    return tl.sum(tl.sum(x, axis=2), axis=0)[None, :, None]


@triton.jit
def _statistics(
    hs, row, rows, eps, K: tl.constexpr, SLICES: tl.constexpr, SLICE: tl.constexpr,
    CENTERED: tl.constexpr,
):  # fmt: skip
    """``(mean, scale)`` of the norm of rows in chunks ``hs``, each ``[1, ROWS, 1]``."""
    mean = tl.zeros_like(_row_sum(hs[0].to(tl.float32)))
    if CENTERED:
        total = hs[0].to(tl.float32)
        for j in tl.static_range(1, len(hs)):
            total += hs[j].to(tl.float32)
        # `/` may be two units off: as in `_norms`, what the quotient lacks is added to it.
        sums = _row_sum(total)
        SHARE: tl.constexpr = 1.0 / K
        mean = sums * SHARE
        mean = tl.fma(tl.fma(mean, -1.0 * K, sums), SHARE, mean)
    total = tl.zeros(hs[0].shape, tl.float32)
    for j in tl.static_range(len(hs)):
        x = hs[j].to(tl.float32)
        if CENTERED:
            x = tl.where(_channels(j, SLICES, SLICE) < K, x - mean, 0.0)
        total += x * x
    # Finite past the last row, where an eps of 0 would give NaN.
    past = (row >= rows).to(tl.float32)[None, :, None]
    return mean, tl.rsqrt(_row_sum(total) / K + eps + past)


@triton.jit
def _normalized(h, mean, scale, norm_weight_ptr, norm_bias_ptr, k, K: tl.constexpr):
    """Channels ``k`` of the norm, rounded; zero past the last one, which has no weight.

    Without a norm it is ``h``, and nobody computes the statistics.
    """
    if norm_weight_ptr is None:
        return h
    inside = k < K
    u = (h.to(tl.float32) - mean) * scale
    u *= tl.load(norm_weight_ptr + k, mask=inside, other=0.0).to(tl.float32)
    if norm_bias_ptr is not None:
        u += tl.load(norm_bias_ptr + k, mask=inside, other=0.0).to(tl.float32)
    return rounded(u, h.dtype)


@triton.jit
def _store_chunk(ptr, tile, row, rows, k, K: tl.constexpr):
    at = ptr + row.to(tl.int64)[None, :, None] * K + k
    tl.store(at, tile, mask=(row < rows)[None, :, None] & (k < K))


@triton.jit(do_not_specialize=["M"])
def fused_linear_kernel(
    x_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, weight_ptr, bias_ptr, y_ptr, h_ptr, u_ptr,
    M, x_stride, residual_stride, weight_stride, eps,
    F: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    SLICES: tl.constexpr, SLICE: tl.constexpr, STAGES: tl.constexpr, ACTIVATION: tl.constexpr,
    CENTERED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program to ``[ROWS, COLUMNS]`` of y; its rows and their norm as well, if they have one.

    Of the pointers behind ``x`` all but ``weight`` and ``y`` may be None. The programs of the first
    columns write ``h`` and ``u`` where these are wanted. Programs of the same columns, whose
    weights are the same, are neighbours.
    """
    GATED_UNIT: tl.constexpr = ACTIVATION == "swiglu" or ACTIVATION == "geglu"
    CHUNKS: tl.constexpr = (K + SLICES * SLICE - 1) // (SLICES * SLICE)
    K_FITS: tl.constexpr = K % (SLICES * SLICE) == 0
    FITS: tl.constexpr = F % COLUMNS == 0
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    value_ptr = weight_ptr + tl.cast(F, tl.int64) * weight_stride  # the second half's weights
    sums = tl.zeros((SLICES, ROWS, COLUMNS), tl.float32)
    value_sums = tl.zeros((SLICES, ROWS, COLUMNS), tl.float32)
    if norm_weight_ptr is None and residual_ptr is None:
        for j in tl.range(0, CHUNKS, num_stages=STAGES):
            k = _channels(j, SLICES, SLICE)
            x = _load_chunk(x_ptr, row, M, x_stride, k, False, K_FITS, K)
            w = _load_chunk(weight_ptr, column, F, weight_stride, k, FITS, K_FITS, K)
            sums = _multiplied(x, w, sums, WIDE)
            if GATED_UNIT:
                w = _load_chunk(value_ptr, column, F, weight_stride, k, FITS, K_FITS, K)
                value_sums = _multiplied(x, w, value_sums, WIDE)
    else:
        # Weights come from far away and rows from L2: all are asked for before any is used.
        ws, values, hs = (), (), ()
        for j in tl.static_range(CHUNKS):
            k = _channels(j, SLICES, SLICE)
            w = _load_chunk(weight_ptr, column, F, weight_stride, k, FITS, K_FITS, K)
            ws = ws + (w,)  # noqa: RUF005
            if GATED_UNIT:
                w = _load_chunk(value_ptr, column, F, weight_stride, k, FITS, K_FITS, K)
                values = values + (w,)  # noqa: RUF005
        for j in tl.static_range(CHUNKS):
            k = _channels(j, SLICES, SLICE)
            h = _load_chunk(x_ptr, row, M, x_stride, k, False, K_FITS, K)
            if residual_ptr is not None:
                r = _load_chunk(residual_ptr, row, M, residual_stride, k, False, K_FITS, K)
                h = rounded(h.to(tl.float32) + r.to(tl.float32), x_ptr.dtype.element_ty)
            hs = hs + (h,)  # noqa: RUF005
        mean, scale = _statistics(hs, row, M, eps, K, SLICES, SLICE, CENTERED)
        own = tl.where(tl.program_id(1) == 0, M, 0)  # rows that this program writes
        for j in tl.static_range(CHUNKS):
            k = _channels(j, SLICES, SLICE)
            if h_ptr is not None:
                _store_chunk(h_ptr, hs[j], row, own, k, K)
            u = _normalized(hs[j], mean, scale, norm_weight_ptr, norm_bias_ptr, k, K)
            if u_ptr is not None:
                _store_chunk(u_ptr, u, row, own, k, K)
            sums = _multiplied(u, ws[j], sums, WIDE)
            if GATED_UNIT:
                value_sums = _multiplied(u, values[j], value_sums, WIDE)
    y = tl.sum(sums, axis=0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + column, mask=column < F, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION is not None:
        y, _ = activate(y, GELU=ACTIVATION != "swiglu")
    if GATED_UNIT:
        value = tl.sum(value_sums, axis=0)
        if bias_ptr is not None:
            b = tl.load(bias_ptr + F + column, mask=column < F, other=0.0)
            value += b.to(tl.float32)[None, :]
        y *= value
    at = row.to(tl.int64)[:, None] * F + column[None, :]
    mask = (row < M)[:, None] & (column < F)[None, :]
    tl.store(y_ptr + at, rounded(y, y_ptr.dtype.element_ty), mask=mask)
