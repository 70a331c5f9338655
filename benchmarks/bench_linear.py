"""batch_invariant_linear against PyTorch's product, which picks an algorithm for every shape.

What a row's fixed bits cost: NeoBERT's four products and a head's, for few rows and many.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ceilings import Ceilings
from parity import assert_within_budget
from timing import Variant, columns, interleaved, ratios
from torch.nn import functional as F

import neobert_kernels as nk
from neobert.floors import operators
from neobert_kernels import _runtime

# Outputs and inputs: qkv, wo, w12 and w3 of NeoBERT, and its classifier.
SHAPES = ((2304, 768), (768, 768), (4096, 768), (768, 2048), (2, 768))


@pytest.mark.parametrize("rows", [16, 512, 16_384])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear(
    shape: tuple[int, int],
    rows: int,
    quick: bool,
    device: str,
    once: Callable[..., Any],
    record: Callable[..., None],
) -> None:
    gpu = device == "cuda"
    if not gpu and (rows != 512 or shape != SHAPES[0]):
        pytest.skip("a size for a GPU; the CPU runs the reference")
    dtype = torch.bfloat16 if gpu else torch.float32
    (N, K), M = ((48, 32), 24) if quick else (shape, rows)
    x = torch.randn(M, K, device=device, dtype=dtype)
    weight = torch.randn(N, K, device=device, dtype=dtype) * 0.02
    bias = torch.randn(N, device=device, dtype=dtype)
    few = x[:33]
    reference = nk.batch_invariant_linear_reference
    assert_within_budget(
        nk.batch_invariant_linear(few, weight, bias),
        reference(few, weight, bias),
        reference(few.double(), weight.double(), bias.double()),
    )
    variants: dict[str, Variant] = {
        "ours": lambda _: nk.batch_invariant_linear(x, weight, bias),
        "torch": lambda _: F.linear(x, weight, bias),
    }
    ceilings = Ceilings(device, dtype, quick)
    rounds = 30 if gpu and not quick else 3
    with torch.inference_mode():
        timings = once(
            lambda: interleaved(variants | ceilings.variants, rounds=rounds, device=device)
        )
    record(
        "batch_invariant_linear",
        f"{M} x {K} to {N}, {str(dtype).removeprefix('torch.')}, {device}",
        implementation=_runtime.implementation("batch_invariant_linear", device),
        **ceilings.against(operators.linear(M, K, N, dtype.itemsize, bias=True), timings),
        **ratios(timings),
        **columns(timings),
    )
