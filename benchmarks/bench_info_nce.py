"""info_nce against the similarities in memory, eager and compiled: time and peak memory."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ceilings import Ceilings
from parity import assert_parity
from timing import Variant, columns, interleaved, peak_memory, ratios
from torch import Tensor

import neobert_kernels as nk
from neobert.floors import operators
from neobert_kernels import _runtime

C, TEMPERATURE = 768, 0.05
Loss = Callable[[Tensor, Tensor, float], Tensor]


def step(loss: Loss, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in tensors]
    return torch.autograd.grad(loss(leaves[0], leaves[1], TEMPERATURE), leaves)


@pytest.mark.parametrize("rows", [1024, 8192, 32_768])
def test_info_nce(
    rows: int,
    quick: bool,
    device: str,
    once: Callable[..., Any],
    record: Callable[..., None],
) -> None:
    gpu = device == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    if not gpu and rows > 1024:
        pytest.skip("a size for a GPU; the CPU runs the reference")
    N, M = (24, 40) if quick else (rows, 2 * rows)
    # Queries near their documents, as in training: a loss that is neither 0 nor random.
    documents = torch.randn(M, C, device=device, dtype=dtype)
    queries = documents[:N] + torch.randn(N, C, device=device, dtype=dtype)
    small = [queries[:33].clone(), documents[:65].clone()]
    assert_parity(
        lambda q, d: nk.info_nce(q, d, TEMPERATURE),
        lambda q, d: nk.info_nce_reference(q, d, TEMPERATURE),
        small,
    )
    losses: dict[str, Loss] = {"ours": nk.info_nce, "eager": nk.info_nce_reference}
    if gpu or (not quick and shutil.which("c++")):
        torch.compiler.reset()
        losses["compile"] = torch.compile(nk.info_nce_reference)
    tensors = [queries, documents]

    def variant(loss: Loss) -> Variant:
        return lambda _: step(loss, tensors)

    variants = {name: variant(loss) for name, loss in losses.items()}
    ceilings = Ceilings(device, dtype, quick)
    rounds = 30 if gpu and not quick else 3
    timings = once(lambda: interleaved(variants | ceilings.variants, rounds=rounds, device=device))
    cost = operators.info_nce(N, M, C, dtype.itemsize).plus(
        operators.info_nce_backward(N, M, C, dtype.itemsize)
    )
    memory = {name: peak_memory(call, device) for name, call in variants.items()} if gpu else {}
    record(
        "info_nce",
        f"forward and backward, {N} queries, {M} documents, width {C}, "
        f"{str(dtype).removeprefix('torch.')}, {device}",
        implementation=_runtime.implementation("info_nce", device),
        **ceilings.against(cost, timings),
        **ratios(timings),
        **{f"{name}_peak_bytes": value for name, value in memory.items()},
        **columns(timings),
    )
