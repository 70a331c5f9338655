"""mean_pool and first_pool on long and short documents, plain and normalized."""

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from ceilings import Ceilings
from parity import assert_parity
from timing import columns, interleaved, over, ratios, rotated
from torch import Tensor
from torch.nn import functional as F

import neobert_kernels as nk
from neobert.floors import operators
from neobert_kernels import _runtime

C = 768
# One long document beside many short ones, and a batch as a sorted embedding run packs it.
BATCHES = {"mixed": (8192,) + (10,) * 800, "even": (512,) * 32}
OPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "mean_pool": (nk.mean_pool, nk.mean_pool_reference),
    "first_pool": (nk.first_pool, nk.first_pool_reference),
}


def eager(name: str) -> Callable[..., Tensor]:
    """What a model does today with packed tokens: segment_reduce, or an index."""

    def pool(x: Tensor, cu_seqlens: Tensor, normalize: bool) -> Tensor:
        if name == "mean_pool":
            y = torch.segment_reduce(x.float(), "mean", offsets=cu_seqlens.long(), axis=0)
        else:
            y = x[cu_seqlens[:-1].long()].float()
        return (F.normalize(y, dim=-1) if normalize else y).to(x.dtype)

    return pool


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
@pytest.mark.parametrize("training", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", OPS)
def test_pooling(
    name: str,
    training: bool,
    normalize: bool,
    batch: str,
    quick: bool,
    device: str,
    once: Callable[..., Any],
    record: Callable[..., None],
) -> None:
    ours, reference = OPS[name]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    lengths = BATCHES[batch][:4] if not quick else (40, 3, 9)
    lengths = BATCHES[batch] if device == "cuda" and not quick else lengths
    bounds = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    tokens = sum(lengths)

    def make() -> list[Tensor]:
        return [torch.randn(tokens, C, device=device, dtype=dtype).requires_grad_(training)]

    assert_parity(
        lambda x: ours(x, bounds, normalize),
        lambda x: reference(x, bounds, normalize),
        [make()[0].detach()],
    )
    sets = rotated(make, device)
    variants = {"ours": ours, "reference": reference, "eager": eager(name)}
    if device == "cuda" or (not quick and shutil.which("c++")):
        torch.compiler.reset()
        variants["compile"] = torch.compile(reference)
    gradients = None
    if training:
        gradients = [[torch.randn(len(lengths), C, device=device, dtype=dtype)] for _ in sets]

    def pooled(function: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: function(x, bounds, normalize)

    ceilings = Ceilings(device, dtype, quick)
    calls = {key: over(sets, pooled(function), gradients) for key, function in variants.items()}
    timings = once(
        lambda: interleaved(calls | ceilings.variants, rounds=3 if quick else 30, device=device)
    )
    size = (tokens, len(lengths), C, dtype.itemsize)
    cost = operators.mean_pool(*size) if name == "mean_pool" else operators.first_pool(*size[1:])
    if training:
        cost = cost.plus(operators.mean_pool_backward(*size))
    record(
        name,
        f"{'forward and backward' if training else 'forward'}, {batch} batch of {len(lengths)} "
        f"documents, {tokens} x {C}{', normalized' * normalize}, "
        f"{str(dtype).removeprefix('torch.')}, {device}",
        implementation=_runtime.implementation(name, device),
        **ceilings.against(cost, timings),
        **ratios(timings),
        **columns(timings),
    )
