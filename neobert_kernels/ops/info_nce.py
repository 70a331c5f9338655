"""InfoNCE: cross-entropy of each query's cosine similarities, its own document being the class.

``loss = mean_i -log softmax_j(s_ij)[i]`` with ``s_ij = cos(q_i, d_j) / temperature``, in float32.

The ``[N, M]`` similarities never exist in memory. Forward: a program keeps the largest ``q d^``
and the sum of ``exp(s - largest s)`` of its queries over a share of the documents; the shares are
joined in order. Backward: the similarities are formed again, tile by tile, once for the queries and
once for the documents. With ``w_ij = (softmax_j(s_ij) - [i = j]) / N`` and ^ for unit vectors,
``dq_i = (sum_j w_ij d_j^ - q_i^ sum_j w_ij cos_ij) / (|q_i| temperature)``, and ``dd_j`` likewise.

Rounding: at a temperature of 0.01 what a cosine lacks reaches the gradient a hundredfold. So the
lengths, in float64 first, divide after the products, and no similarity is rounded: with the row's
``m``, the largest ``q d^``, ``s - max s`` is ``(q d / |d| - m) / (|q| temperature)``, where a fused
multiply-add rounds the difference, and what ``1 / |d|`` in float32 lacks is added to it. float32
products are IEEE float32, summed in blocks of channels that a compensated sum adds, or float64
below 64 channels; 16-bit inputs are multiplied as they are and summed in float32. In the backward,
``w N`` over the other vector's length is rounded to the inputs' dtype before it multiplies that
vector as it is, and what is taken out along the own vector is summed from the same rounded numbers:
the gradient stays exact where its parts nearly cancel, as in a trained encoder. float16 weights are
scaled to fill their range. Sums are float32, and a gradient is rounded once more. No atomics.

Source: van den Oord et al. 2018, arXiv:1807.03748, equation 4.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neobert_kernels import _check, _runtime
from neobert_kernels._triton import tl, triton

EPS = 1e-12  # shorter vectors are divided by this, as in torch.nn.functional.normalize


def info_nce_reference(queries: Tensor, documents: Tensor, temperature: float) -> Tensor:
    """The contract of `info_nce` in plain PyTorch: the CPU path and, in float64, the oracle."""
    wide = torch.promote_types(queries.dtype, torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        q, d = (F.normalize(x.to(wide), dim=-1, eps=EPS) for x in (queries, documents))
        own = torch.arange(len(q), device=q.device)
        return F.cross_entropy(q @ d.t() / temperature, own)


@triton.jit
def _load_tile(ptr, row, rows, stride, column, C: tl.constexpr, WIDE: tl.constexpr):
    """Rows of a matrix at some columns, zeros outside; float32 where `tl.dot` needs it."""
    mask = (row < rows)[:, None] & (column < C)[None, :]
    offset = row.to(tl.int64)[:, None] * stride + column[None, :]
    tile = tl.load(ptr + offset, mask=mask, other=0.0)
    return tile.to(tl.float32) if WIDE else tile


@triton.jit
def _products(
    a_ptr, b_ptr, a_row, b_row, A, B, a_stride, b_stride, C: tl.constexpr,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of inner products of rows of a and rows of b, and what is missing from its sums.

    Blocks of float32 inputs are added by Kahan's sum; few channels have few blocks to add, and go
    through float64. Sums of 16-bit inputs stay in the tensor cores, and what they lack, far below
    the rounding of the gradient, is returned as 0.
    """
    if a_ptr.dtype.element_ty == tl.float32 and C < 64:
        total = tl.zeros((BLOCK_A, BLOCK_B), tl.float64)
        for start in range(0, C, BLOCK_C):
            column = start + tl.arange(0, BLOCK_C)
            a = _load_tile(a_ptr, a_row, A, a_stride, column, C, WIDE).to(tl.float64)
            b = _load_tile(b_ptr, b_row, B, b_stride, column, C, WIDE).to(tl.float64)
            total = tl.dot(a, tl.trans(b), total, out_dtype=tl.float64)
        products = total.to(tl.float32)
        missing = (total - products.to(tl.float64)).to(tl.float32)
    else:
        products = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
        missing = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
        for start in range(0, C, BLOCK_C):
            column = start + tl.arange(0, BLOCK_C)
            a = _load_tile(a_ptr, a_row, A, a_stride, column, C, WIDE)
            b = _load_tile(b_ptr, b_row, B, b_stride, column, C, WIDE)
            if a_ptr.dtype.element_ty == tl.float32:
                added = tl.dot(a, tl.trans(b), input_precision="ieee") + missing
                total = products + added
                missing = added - (total - products)
                products = total
            else:
                products = tl.dot(a, tl.trans(b), products, input_precision="ieee")
    return products, missing


@triton.jit
def _apart(products, missing, scale, low, to, EXACT: tl.constexpr, WIDE: tl.constexpr):
    """``(products + missing) * (scale + low) - to``, rounded like the difference.

    Two similarities are subtracted before 1 / temperature multiplies them, and their difference
    is not rounded like themselves. Without ``EXACT`` nothing is missing and ``low`` does not count.
    """
    if WIDE:  # the interpreter rounds twice in a fused multiply-add
        near = (products.to(tl.float64) * scale.to(tl.float64) - to.to(tl.float64)).to(tl.float32)
    else:
        near = tl.fma(products, scale + tl.zeros_like(products), -to + tl.zeros_like(products))
    return near + (products * low + missing * scale) if EXACT else near


@triton.jit(do_not_specialize=["N", "M", "share"])
def _info_nce_forward_kernel(
    q_ptr, d_ptr, q_scale_ptr, d_scale_ptr, largest_ptr, others_ptr, own_ptr, N, M, share,
    q_stride, d_stride, C: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
    BLOCK_C: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Softmax statistics of a block of queries over ``share`` of the documents, the own apart.

    ``largest`` is that of ``q d^``, which a query's scale multiplies after the subtraction.
    """
    EXACT: tl.constexpr = q_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    q_scale = tl.load(q_scale_ptr + row, mask=row < N, other=1.0)
    largest = tl.full((BLOCK_A,), float("-inf"), tl.float32)
    others = tl.zeros((BLOCK_A,), tl.float32)
    first = tl.program_id(1) * share
    for start in range(first, tl.minimum(first + share, M), BLOCK_B):
        column = start + tl.arange(0, BLOCK_B)
        d_scale = tl.load(d_scale_ptr + column, mask=column < M, other=0.0)[None, :]
        low = tl.load(d_scale_ptr + M + column, mask=column < M, other=0.0)[None, :]
        products, missing = _products(
            q_ptr, d_ptr, row, column, N, M, q_stride, d_stride, C, BLOCK_A, BLOCK_B, BLOCK_C, WIDE
        )
        # Not 0 outside: a largest far below it would make an infinity.
        inside = (column < M)[None, :]
        r = tl.where(inside, products * d_scale, float("-inf"))
        larger = tl.maximum(largest, tl.max(r, axis=1))
        mine = row[:, None] == column[None, :]
        s = _apart(products, missing, d_scale, low, larger[:, None], EXACT, WIDE)
        s *= q_scale[:, None]
        s = tl.where(inside & ~mine, s, float("-inf"))
        others = others * tl.exp((largest - larger) * q_scale) + tl.sum(tl.exp(s), axis=1)
        largest = larger
        held = (row >= start) & (row < start + BLOCK_B) & (row < N)
        tl.store(own_ptr + row, tl.sum(tl.where(mine, products, 0.0), axis=1), mask=held)
        if EXACT:
            own_missing = tl.sum(tl.where(mine, missing, 0.0), axis=1)
            tl.store(own_ptr + N + row, own_missing, mask=held)
    offset = tl.program_id(1).to(tl.int64) * N + row
    tl.store(largest_ptr + offset, largest, mask=row < N)
    tl.store(others_ptr + offset, others, mask=row < N)


@triton.jit(do_not_specialize=["A", "B", "N"])
def _info_nce_backward_kernel(
    a_ptr, b_ptr, a_scale_ptr, b_scale_ptr, largest_ptr, total_ptr, others_ptr, upstream_ptr,
    da_ptr, A, B, N, a_stride, b_stride, temperature, C: tl.constexpr, BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_C: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr,
    QUERIES: tl.constexpr, SCALED: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """``CHUNKS * CHUNK`` columns of the gradients of a block of a; a holds queries or documents."""
    EXACT: tl.constexpr = a_ptr.dtype.element_ty == tl.float32
    row = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    base = tl.program_id(1) * CHUNKS * CHUNK
    a_scale = tl.load(a_scale_ptr + row, mask=row < A, other=0.0)
    # The scale of queries holds 1 / temperature.
    a_inverse_length = a_scale * temperature if QUERIES else a_scale
    if QUERIES:
        largest = tl.load(largest_ptr + row, mask=row < N, other=0.0)[:, None]
        inverse = 1.0 / tl.load(total_ptr + row, mask=row < N, other=1.0)[:, None]
        others = tl.load(others_ptr + row, mask=row < N, other=0.0)[:, None]
    else:
        low = tl.load(a_scale_ptr + A + row, mask=row < A, other=0.0)[:, None]
    along = tl.zeros((BLOCK_A,), tl.float32)
    sums = ()
    for _ in tl.static_range(CHUNKS):
        sums = sums + (tl.zeros((BLOCK_A, CHUNK), tl.float32),)  # noqa: RUF005
    for start in range(0, B, BLOCK_B):
        other = start + tl.arange(0, BLOCK_B)
        b_scale = tl.load(b_scale_ptr + other, mask=other < B, other=0.0)
        products, missing = _products(
            a_ptr, b_ptr, row, other, A, B, a_stride, b_stride, C, BLOCK_A, BLOCK_B, BLOCK_C, WIDE
        )
        if QUERIES:
            low = tl.load(b_scale_ptr + B + other, mask=other < B, other=0.0)[None, :]
            s = _apart(products, missing, b_scale[None, :], low, largest, EXACT, WIDE)
            s *= a_scale[:, None]
            weight = b_scale
        else:
            largest = tl.load(largest_ptr + other, mask=other < N, other=0.0)[None, :]
            inverse = 1.0 / tl.load(total_ptr + other, mask=other < N, other=1.0)[None, :]
            others = tl.load(others_ptr + other, mask=other < N, other=0.0)[None, :]
            s = _apart(products, missing, a_scale[:, None], low, largest, EXACT, WIDE)
            s *= b_scale[None, :]
            weight = b_scale * temperature
        s = tl.where((row < A)[:, None] & (other < B)[None, :], s, float("-inf"))
        # The own weight, p - 1, from the sum of the others: p may be 1 but for its last bits.
        mine = row[:, None] == other[None, :]
        w = tl.where(mine, -others, tl.exp(s)) * inverse
        unscale = 1.0
        if SCALED:
            # Zero vectors must not make the others small; they add nothing.
            weight = tl.where(weight < 1e11, weight, 0.0)
            unscale = tl.maximum(tl.max(weight, axis=0), 1e-30) / 32768
            weight = weight / unscale
        w = (w * weight[None, :]).to(b_ptr.dtype.element_ty)
        along += tl.sum(w.to(tl.float32) * products, axis=1) * unscale
        added = ()
        for j in tl.static_range(CHUNKS):
            column = base + j * CHUNK + tl.arange(0, CHUNK)
            b = _load_tile(b_ptr, other, B, b_stride, column, C, WIDE)
            if SCALED:
                total = sums[j] + tl.dot(w.to(b.dtype), b, input_precision="ieee") * unscale
            else:
                total = tl.dot(w.to(b.dtype), b, sums[j], input_precision="ieee")
            added = added + (total,)  # noqa: RUF005
        sums = added
    # Shorter vectors were divided by a constant, so nothing is taken out along them.
    along = tl.where(a_inverse_length < 0.999e12, along * a_inverse_length * a_inverse_length, 0.0)
    factor = (tl.load(upstream_ptr) / (temperature * N) * a_inverse_length)[:, None]
    for j in tl.static_range(CHUNKS):
        column = base + j * CHUNK + tl.arange(0, CHUNK)
        a = _load_tile(a_ptr, row, A, a_stride, column, C, True)
        mask = (row < A)[:, None] & (column < C)[None, :]
        offset = row.to(tl.int64)[:, None] * C + column[None, :]
        da = (sums[j] - a * along[:, None]) * factor
        tl.store(da_ptr + offset, da.to(da_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Choice:
    """Tile of one kernel: ``a`` x ``b`` similarities, formed from ``c`` channels at a time.

    In the backward an accumulator holds ``chunk`` columns of ``a`` gradients.
    """

    a: int
    b: int
    c: int
    chunk: int
    warps: int
    stages: int
    registers: int | None = None  # of a lane; None: the assembler may spill a few for more blocks

    def constexprs(self, C: int) -> dict[str, int]:
        return {"C": C, "BLOCK_A": self.a, "BLOCK_B": self.b, "BLOCK_C": self.c}


# All unmeasured; the ahead-of-time report shows that none spills.
MOST_CHUNKS = 2  # accumulators of a program in the backward, each `Choice.chunk` columns wide
PROGRAMS_PER_SM = 2  # that the shares of the documents aim at


def choice(itemsize: int, backward: bool) -> Choice:
    """Tensor-core tiles for 16 bits; float32 goes through FMAs, with smaller operands.

    The float32 tile is the same in both directions: only a similarity that has the same bits again
    gives the largest exp(0), and at a low temperature a gradient shows the difference.
    """
    if itemsize == 4:
        return Choice(32, 32, 16, 32, 8, 1, registers=255)
    if backward:  # Triton 3.6 on sm_100 would spill 8 bytes to fit into 128 registers
        return Choice(64, 64, 32, 128, 8, 2, registers=255)
    return Choice(128, 64, 64, 128, 8, 3)


def chunks(C: int, chunk: int) -> int:
    """Accumulators of a program: the columns in equal groups of at most `MOST_CHUNKS`."""
    count = -(-C // chunk)
    return -(-count // -(-count // MOST_CHUNKS))


def _scale(x: Tensor, temperature: float) -> Tensor:
    """``1 / (|x| temperature)`` in two rows: as float32, and what that lacks."""
    length = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64)
    scale = length.clamp_min_(EPS).mul_(temperature).reciprocal_()
    rounded = scale.float()
    return torch.stack((rounded, scale.sub_(rounded).float()))


def _launch_forward(
    queries: Tensor, documents: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    q, d = _runtime.neighbouring(queries), _runtime.neighbouring(documents)
    (N, C), M = q.shape, len(d)
    _, largest, total, others, *_ = _fake_forward(q, d, temperature)
    q_scale, d_scale = _scale(q, temperature)[0], _scale(d, 1.0)
    tile = choice(q.element_size(), backward=False)
    blocks = triton.cdiv(N, tile.a)
    wanted = triton.cdiv(_runtime.resident_programs(q, PROGRAMS_PER_SM), blocks)
    share = triton.cdiv(triton.cdiv(M, tile.b), wanted) * tile.b
    shares = triton.cdiv(M, share)
    own = q.new_zeros((2, N), dtype=torch.float32)
    larges, shared = q.new_empty((2, shares, N), dtype=torch.float32)
    _info_nce_forward_kernel[(blocks, shares)](
        q, d, q_scale, d_scale, larges, shared, own, N, M, share, q.stride(0), d.stride(0),
        **tile.constexprs(C), WIDE=_runtime.INTERPRET,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
        **_runtime.FP_FUSION,
    )  # fmt: skip
    torch.amax(larges, dim=0, out=largest)
    torch.sum(shared * ((larges - largest) * q_scale).exp_(), dim=0, out=others)
    # Not log(total) + largest: a small loss would drown in the rounding of a large similarity.
    # Vectors of N: float64 costs nothing here.
    nearest = own.double().sum(0).mul_(d_scale[:, :N].double().sum(0))
    apart = nearest.sub_(largest).mul_(q_scale).float()
    torch.add(others, apart.exp(), out=total)
    # A small loss would drown in the rounding of log(total), and a large one overflow the other.
    small = others.mul(apart.neg().exp_()).log1p_()
    loss = small.where(apart > -1, total.log() - apart).mean()
    return loss, largest, total, others, q_scale, d_scale


def _fake_forward(
    queries: Tensor, documents: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    N, M = queries.shape[0], documents.shape[0]
    sizes: tuple[Any, ...] = ((), N, N, N, N, (2, M))
    loss, *vectors = (queries.new_empty(size, dtype=torch.float32) for size in sizes)
    return loss, vectors[0], vectors[1], vectors[2], vectors[3], vectors[4]


def _launch_backward(
    upstream: Tensor, queries: Tensor, documents: Tensor, largest: Tensor, total: Tensor,
    others: Tensor, q_scale: Tensor, d_scale: Tensor, temperature: float, of_queries: bool,
) -> Tensor:  # fmt: skip
    a, b = _runtime.neighbouring(queries), _runtime.neighbouring(documents)
    a_scale, b_scale = q_scale, d_scale
    if not of_queries:
        a, b, a_scale, b_scale = b, a, b_scale, a_scale
    (A, C), B = a.shape, len(b)
    da = a.new_empty((A, C))
    tile = choice(a.element_size(), backward=True)
    count = chunks(C, tile.chunk)
    _info_nce_backward_kernel[(triton.cdiv(A, tile.a), triton.cdiv(C, count * tile.chunk))](
        a, b, a_scale, b_scale, largest, total, others, upstream, da, A, B, len(queries),
        a.stride(0), b.stride(0), temperature, **tile.constexprs(C), CHUNK=tile.chunk, CHUNKS=count,
        QUERIES=of_queries, SCALED=a.dtype == torch.float16, WIDE=_runtime.INTERPRET,
        num_warps=tile.warps, num_stages=tile.stages, maxnreg=tile.registers,
        **_runtime.FP_FUSION,
    )  # fmt: skip
    return da


def _fake_backward(
    upstream: Tensor, queries: Tensor, documents: Tensor, largest: Tensor, total: Tensor,
    others: Tensor, q_scale: Tensor, d_scale: Tensor, temperature: float, of_queries: bool,
) -> Tensor:  # fmt: skip
    a = queries if of_queries else documents
    return a.new_empty(a.shape)


_forward = _runtime.register(
    "info_nce(Tensor queries, Tensor documents, float temperature)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
)
_backward = _runtime.register(
    "info_nce_backward(Tensor upstream, Tensor queries, Tensor documents, Tensor largest,"
    " Tensor total, Tensor others, Tensor q_scale, Tensor d_scale, float temperature,"
    " bool of_queries) -> Tensor",
    _launch_backward,
    _fake_backward,
)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, documents: Tensor, temperature: float) -> Tensor:
        loss, *saved = _forward(queries, documents, temperature)
        ctx.save_for_backward(queries, documents, *saved)
        ctx.temperature = temperature
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        needs = zip(ctx.needs_input_grad, (True, False), strict=False)
        dq, dd = (
            _backward(dloss, *ctx.saved_tensors, ctx.temperature, queries) if needed else None
            for needed, queries in needs
        )
        return dq, dd, None


def info_nce(queries: Tensor, documents: Tensor, temperature: float) -> Tensor:
    """Contrastive loss over in-batch and extra negatives.

    Works in two passes (GradCache): gradients by the vectors, taken at detached leaves, are what
    a second pass through the encoder needs. Memory beyond inputs and gradients: a few numbers for
    each row. Autocast changes nothing. Vectors may be 1e-9 to 1e15 long; far beyond, their inner
    products leave float32.

    Args:
        queries: ``[N, C]``, N at least 1; float32, float16 or bfloat16; any strides.
        documents: ``[M, C]`` with ``M >= N``, same dtype and device; row i of ``queries`` matches
            row i, and all other rows are its negatives.
        temperature: Divides the cosine similarities; 1e-6 to 1e6.

    Returns:
        Scalar float32, the mean over queries. Differentiable once on a GPU.

    Raises:
        ValueError: A shape, dtype, device or the temperature breaks the rules above.
    """
    _check.tensor("queries", queries, ndim=2)
    _check.dtype("queries", queries)
    _check.tensor("documents", documents, ndim=2)
    _check.dtype("documents", documents, (queries.dtype,))
    _check.device("documents", documents, queries.device)
    if not len(queries):
        raise _check.error("queries", "at least one row", 0)
    if not queries.shape[1]:
        raise _check.error("queries", "at least one channel", tuple(queries.shape))
    if documents.shape[1] != queries.shape[1] or len(documents) < len(queries):
        rule = f"shape (M, {queries.shape[1]}) with M >= {len(queries)}"
        raise _check.error("documents", rule, tuple(documents.shape))
    _check.between("temperature", temperature, 1e-6, 1e6)
    if not _runtime.use_kernel(queries):
        return info_nce_reference(queries, documents, temperature)
    return _InfoNCE.apply(queries, documents, temperature)


def _launches(sm: int) -> Iterator[_runtime.Launch]:
    scalars = (
        "q_scale",
        "d_scale",
        "a_scale",
        "b_scale",
        "largest",
        "total",
        "others",
        "own",
        "upstream",
    )
    types = dict.fromkeys((f"{name}_ptr" for name in scalars), "*fp32")
    types["temperature"] = "fp32"
    for dtype in _check.DTYPES:
        more = {torch.bfloat16: 1024, torch.float32: 48}.get(dtype)
        for C in (768, more) if more else (768,):
            for kernel, backward in (
                (_info_nce_forward_kernel, False),
                (_info_nce_backward_kernel, True),
            ):
                tile = choice(dtype.itemsize, backward)
                for queries in (True, False) if backward and C == 768 else (True,):
                    flags: dict[str, int] = {"WIDE": False}
                    if backward:
                        count = chunks(C, tile.chunk)
                        flags |= {"CHUNK": tile.chunk, "CHUNKS": count, "QUERIES": queries}
                        flags["SCALED"] = dtype == torch.float16
                    signature = _runtime.signature(kernel, dtype, **types)
                    yield _runtime.Launch(
                        kernel=kernel,
                        name=f"info_nce_{'backward' if backward else 'forward'}",
                        case=f"C={C} {_runtime.TRITON_TYPES[dtype]}"
                        + f" {'queries' if queries else 'documents'}" * backward,
                        signature=signature,
                        constexprs={**tile.constexprs(C), **flags},
                        num_warps=tile.warps,
                        num_stages=tile.stages,
                        maxnreg=tile.registers,
                        aligned=tuple(n for n in signature if n.endswith(("_ptr", "_stride"))),
                        memory_bound=False,
                    )


_runtime.operator(
    info_nce, info_nce_reference, (_info_nce_forward_kernel, _info_nce_backward_kernel), _launches
)
