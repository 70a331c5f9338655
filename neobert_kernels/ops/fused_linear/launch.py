"""From rows and weights to a launch."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neobert_kernels import _runtime
from neobert_kernels._launch import MOST_PREPARED, Prepared, Ready, Rows, row_step
from neobert_kernels.ops.fused_linear.kernel import fused_linear_kernel

GATED = ("swiglu", "geglu")
# Of a row that is added or normalized, by the bytes of one: a program keeps it in registers.
MOST_CHANNELS = {2: 1024, 4: 384}
MOST_OUTPUTS = 65_535 * 8  # as many blocks of columns as a grid has
ROWS = 16  # of a program: what a tensor core takes at once


@dataclass(frozen=True)
class Choice:
    """A program makes ``columns`` columns with a warp for each of ``slices`` of a chunk."""

    columns: int
    slices: int
    slice: int
    stages: int
    registers: int | None = None  # of a lane; None: left to the assembler

    def constexprs(self, F: int, K: int, activation: str | None, centered: bool) -> dict[str, Any]:
        return {
            "F": F, "K": K, "ROWS": ROWS, "COLUMNS": self.columns, "SLICES": self.slices,
            "SLICE": self.slice, "STAGES": self.stages, "ACTIVATION": activation,
            "CENTERED": centered, "WIDE": _runtime.INTERPRET,
        }  # fmt: skip


@functools.cache
def choice(itemsize: int, held: bool) -> Choice:
    """16 columns, so that 768 outputs are 48 programs and NeoBERT's 2,304 are 144. Unmeasured.

    Rows that are ``held`` in registers take a lane of eight warps 24 of them at 768 channels of
    bfloat16, and as many for each of the weights' halves; float32 has twice the warps and half the
    columns. Without, four chunks of 16 KiB are on their way.
    """
    if not held:
        return Choice(16, 4, 128 // itemsize, 4)
    if itemsize == 2:
        return Choice(16, 8, 32, 1, registers=255)
    return Choice(8, 16, 16, 1, registers=127)


def takes(K: int, itemsize: int) -> bool:
    """Whether the kernel adds and normalizes rows of ``K`` channels."""
    return MOST_CHANNELS[itemsize] >= K


def ready(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    weight: Tensor, bias: Tensor | None, y: Tensor, h: Tensor | None, u: Tensor | None,
    eps: float, activation: str | None, centered: bool,
) -> Ready:  # fmt: skip
    """The kernel's launch on rows ``[M, K]`` with neighbouring channels, M over 0.

    ``h`` and ``u`` may be None; ``centered``: whether the norm is `layer_norm`.
    """
    (M, K), F = x.shape, y.shape[-1]
    held = norm_weight is not None or residual is not None
    tile = choice(x.element_size(), held)
    return Ready(
        _prepared(tile, F, K, activation, centered),
        (-(-M // ROWS), -(-F // tile.columns), 1),
        (
            x, residual, norm_weight, norm_bias, weight, bias, y, h, u, M, row_step(x),
            row_step(residual), weight.stride(0), float(eps),
        ),
        Rows(at=9, block=ROWS),
    )  # fmt: skip


@functools.lru_cache(MOST_PREPARED)
def _prepared(tile: Choice, F: int, K: int, activation: str | None, centered: bool) -> Prepared:
    constexprs = tile.constexprs(F, K, activation, centered)
    return Prepared(
        fused_linear_kernel, constexprs, num_warps=tile.slices, num_stages=tile.stages,
        maxnreg=tile.registers, **_runtime.FP_FUSION,
    )  # fmt: skip


# What the layers of the supported families ask for: (outputs, K, dtype, options). Products before
# attention, out of it, up and down of NeoBERT, BERT-base, BERT-large and ModernBERT-large.
def launches(sm: int) -> Iterator[_runtime.Launch]:
    half = torch.bfloat16
    cases = [
        (2304, 768, half, "rms_norm", None, False),
        (2304, 768, half, None, None, False),
        (768, 768, half, None, None, False),
        (768, 768, half, None, None, True),
        (2048, 768, half, "rms_norm", "swiglu", False),
        (768, 2048, half, None, None, False),
        (3072, 768, half, "layer_norm", "gelu", True),
        (384, 1536, half, None, None, True),
        (1536, 384, torch.float16, "layer_norm", "gelu", True),
        (2624, 1024, half, "layer_norm", "geglu", False),
        (4096, 1024, half, "layer_norm", "gelu", True),
        (1000, 760, half, "layer_norm", "swiglu", True),
        (1536, 384, torch.float32, "layer_norm", "geglu", True),
        (1152, 384, torch.float32, "rms_norm", None, False),
        (768, 2048, torch.float32, None, None, False),
    ]
    for outputs, K, dtype, norm, activation, bias in cases:
        tile = choice(dtype.itemsize, norm is not None)
        missing = [] if bias else ["bias_ptr", "norm_bias_ptr"]
        if norm is None:
            missing += ["residual_ptr", "norm_weight_ptr", "norm_bias_ptr", "h_ptr", "u_ptr"]
        elif norm == "rms_norm":
            missing += ["norm_bias_ptr", "u_ptr"]
        else:
            missing += ["h_ptr"]
        signature = _runtime.signature(
            fused_linear_kernel, dtype, eps="fp32", **dict.fromkeys(missing, "constexpr")
        )
        aligned = tuple(n for n, t in signature.items() if t.startswith("*") or "stride" in n)
        words = [f"F={outputs} K={K} {_runtime.TRITON_TYPES[dtype]}", norm, activation]
        yield _runtime.Launch(
            kernel=fused_linear_kernel,
            name="fused_linear",
            case=" ".join(filter(None, [*words, "bias" if bias else None])),
            signature=signature,
            constexprs=tile.constexprs(outputs, K, activation, norm == "layer_norm")
            | dict.fromkeys(missing),
            num_warps=tile.slices,
            num_stages=tile.stages,
            maxnreg=tile.registers,
            aligned=aligned,
            narrow_once=1,  # the store of y
            matrix=dtype != torch.float32,  # exact products are not for tensor cores
            few_rows=True,
        )
