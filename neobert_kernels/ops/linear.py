"""A Linear layer whose rows do not know each other: ``y = x @ weight.T + bias``, batch-invariant.

Libraries choose a product's algorithm by its shape, so the bits of a row change with the number of
rows beside it. Here the tile and the order of the sum over K are fixed by the dtype and the GPU's
generation: K in blocks, one after the other, never split over programs. A row of y is a function of
that row of x and of the weights, whatever M is and wherever the row stands.

Rounding: products are exact, sums float32, the bias is added to the float32 sum, and the result is
rounded once, also where ``F.linear`` rounds before its bias. float32 inputs are multiplied as IEEE
float32, never as TF32. No gradient: what is recorded is worth the same as ``F.linear``.

Source: He et al. 2025, "Defeating Nondeterminism in LLM Inference", thinkingmachines.ai.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from neobert_kernels import _check, _runtime
from neobert_kernels._triton import tl, triton
from neobert_kernels.ops._rounding import rounded


def batch_invariant_linear_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """The numbers of `batch_invariant_linear` in plain PyTorch, not its bits: the oracle."""
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        y = F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide))
    return y.to(x.dtype)


@triton.jit
def _load_tile(
    ptr, row, rows, stride, k, K, ROWS_FIT: tl.constexpr, K_FITS: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """Channels ``k`` of some rows, zeros outside; float32 where the interpreter needs it.

    ``ROWS_FIT`` and ``K_FITS``: the last block is a whole one.
    """
    at = ptr + row.to(tl.int64)[:, None] * stride + k[None, :]
    if ROWS_FIT and K_FITS:
        tile = tl.load(at)
    elif K_FITS:
        tile = tl.load(at, mask=(row < rows)[:, None], other=0.0)
    else:
        tile = tl.load(at, mask=(row < rows)[:, None] & (k < K)[None, :], other=0.0)
    return tile.to(tl.float32) if WIDE else tile


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, M, N, K, x_stride, weight_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    N_FITS: tl.constexpr, K_FITS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One program to a tile of y; ``bias_ptr`` or None.

    Neighbouring programs take up to ``GROUP`` blocks of rows, then the next block of columns: their
    weights and rows meet in L2.
    """
    program = tl.program_id(0)
    programs = tl.cdiv(N, BLOCK_N) * GROUP  # of a group
    first = program // programs * GROUP
    group = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP)
    place = program % programs
    row = (first + place % group) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = place // group * BLOCK_N + tl.arange(0, BLOCK_N)
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        x = _load_tile(x_ptr, row, M, x_stride, k, K, False, K_FITS, WIDE)
        w = _load_tile(weight_ptr, column, N, weight_stride, k, K, N_FITS, K_FITS, WIDE)
        sums = tl.dot(x, tl.trans(w), sums, input_precision="ieee")
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + column, mask=column < N, other=0.0)
        sums += bias.to(tl.float32)[None, :]
    offset = row.to(tl.int64)[:, None] * N + column[None, :]
    mask = (row < M)[:, None] & (column < N)[None, :]
    tl.store(y_ptr + offset, rounded(sums, y_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Choice:
    """A program of ``warps`` warps makes ``m`` x ``n`` results, ``k`` channels at a time."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    group: int = 8
    registers: int | None = None  # of a lane; None: left to the assembler

    def constexprs(self, N: int, K: int) -> dict[str, Any]:
        return {
            "BLOCK_M": self.m, "BLOCK_N": self.n, "BLOCK_K": self.k, "GROUP": self.group,
            "N_FITS": N % self.n == 0, "K_FITS": K % self.k == 0, "WIDE": _runtime.INTERPRET,
        }  # fmt: skip


@functools.cache
def choice(itemsize: int, sm: int) -> Choice:
    """By dtype and generation alone: with the shape in it, a row's bits could depend on M.

    16 bits: two blocks on a multiprocessor, 64 accumulators a lane; 64 KiB of copies in flight on
    an A100 and 96 KiB on Hopper, whose instructions take 64 channels of 128 bytes a row at once.
    float32 goes through FMAs out of registers, so with small tiles. Unmeasured.
    """
    if itemsize == 4:
        return Choice(64, 64, 16, 8, 1)
    if sm < 90 or sm >= 120:
        return Choice(128, 128, 32, 8, 4)
    return Choice(128, 128, 64, 8, 3)


def _launch(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = _fake(x, weight, bias)
    rows, weight = _runtime.as_rows(x), _runtime.neighbouring(weight)
    (M, K), N = rows.shape, len(weight)
    if M:
        tile = choice(x.element_size(), _runtime.generation(x))
        _linear_kernel[(triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n),)](
            rows, weight, None if bias is None else bias.contiguous(), y, M, N, K,
            rows.stride(0), weight.stride(0), **tile.constexprs(N, K), num_warps=tile.warps,
            num_stages=tile.stages, maxnreg=tile.registers, **_runtime.FP_FUSION,
        )  # fmt: skip
    return y


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_forward = _runtime.register(
    "batch_invariant_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _launch, _fake
)


def batch_invariant_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``; a row's bits depend on that row and on the weights alone.

    So they do where the kernel runs: on a GPU of one generation. On a CPU it is the reference, and
    PyTorch's product, which promises no such thing. It follows no autocast.

    Args:
        x: ``[..., K]``; float32, float16 or bfloat16; any strides.
        weight: ``[N, K]`` in the dtype of ``x``. A copy is made of one whose channels are no
            neighbours in memory.
        bias: ``[N]`` in the dtype of ``x``, optional.

    Returns:
        ``[..., N]`` in ``x.dtype``, contiguous, without gradient.

    Raises:
        ValueError: A shape, dtype or device breaks the rules above, or a gradient would be
            recorded.
    """
    _check.product(x, weight, bias)
    _check.no_gradient(x=x, weight=weight, bias=bias)
    if not _runtime.use_kernel(x):
        return batch_invariant_linear_reference(x, weight, bias)
    return _forward(x, weight, bias)


# Whole blocks, a vocabulary, and blocks that end inside in both directions.
SHAPES = ((768, 768), (30_522, 768), (1000, 752))


def _launches(sm: int) -> Iterator[_runtime.Launch]:
    cases = [(torch.bfloat16, N, K) for N, K in SHAPES]
    for dtype, N, K in [*cases, (torch.float16, 768, 768), (torch.float32, 768, 768)]:
        tile = choice(dtype.itemsize, sm)
        signature = _runtime.signature(_linear_kernel, dtype)
        aligned = tuple(n for n in signature if n.endswith(("_ptr", "_stride")))
        yield _runtime.Launch(
            kernel=_linear_kernel,
            name="batch_invariant_linear",
            case=f"N={N} K={K} {_runtime.TRITON_TYPES[dtype]}",
            signature=signature,
            constexprs=tile.constexprs(N, K),
            num_warps=tile.warps,
            num_stages=tile.stages,
            maxnreg=tile.registers,
            aligned=aligned + tuple(n for n, size in (("N", N), ("K", K)) if size % 16 == 0),
            memory_bound=False,
            matrix=dtype != torch.float32,  # exact products are not for tensor cores
        )


_runtime.operator(
    batch_invariant_linear, batch_invariant_linear_reference, (_linear_kernel,), _launches
)
