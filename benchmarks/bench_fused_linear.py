"""fused_linear against its parts one by one: NeoBERT's four products for a few rows.

With a product goes what stands around it: the residual and the norm before qkv and w12, the gated
unit behind w12. "apart" is our operators around PyTorch's product, "torch" is PyTorch alone.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from ceilings import Ceilings
from memory_bound import agree
from parity import assert_within_budget, long_sums
from timing import columns, host_time, interleaved, over, ratios, rotated
from torch import Tensor
from torch.nn import functional as F

import neobert_kernels as nk
from neobert.floors import operators
from neobert_kernels import _runtime

EPS = 1e-5
# Outputs, inputs, whether a norm with a residual stands before it, the activation behind it.
CASES: dict[str, tuple[int, int, bool, str | None]] = {
    "qkv": (2304, 768, True, None),
    "wo": (768, 768, False, None),
    "w12": (4096, 768, True, "swiglu"),
    "w3": (768, 2048, False, None),
}
Function = Callable[..., tuple[Tensor, ...]]


def functions(added: bool, activation: str | None) -> dict[str, Function]:
    """Of x and the weight and, with a norm, residual and norm_weight, to y and the norm's two."""

    def fused(function: Function) -> Function:
        def call(x: Tensor, weight: Tensor, *norm: Tensor) -> tuple[Tensor, ...]:
            if not norm:
                return function(x, weight, activation=activation)[:1]
            return function(
                x, weight, residual=norm[0], norm="rms_norm", norm_weight=norm[1], eps=EPS,
                activation=activation,
            )  # fmt: skip

        return call

    def apart(x: Tensor, weight: Tensor, *norm: Tensor) -> tuple[Tensor, ...]:
        u, h = nk.add_rms_norm(x, norm[0], norm[1], EPS) if added else (x, x)
        y = F.linear(u, weight)
        y = y if activation is None else nk.swiglu(y)
        return (y, h, u) if added else (y,)

    def eager(x: Tensor, weight: Tensor, *norm: Tensor) -> tuple[Tensor, ...]:
        h = u = x
        if added:
            h = x + norm[0]
            u = F.rms_norm(h, norm[1].shape, norm[1], EPS)
        y = F.linear(u, weight)
        if activation is not None:
            gate, value = y.chunk(2, dim=-1)
            y = F.silu(gate) * value
        return (y, h, u) if added else (y,)

    return {
        "reference": fused(nk.fused_linear_reference),
        "ours": fused(nk.fused_linear),
        "apart": apart,
        "torch": eager,
    }


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize("case", CASES)
def test_fused_linear(
    case: str,
    rows: int,
    quick: bool,
    device: str,
    once: Callable[..., Any],
    record: Callable[..., None],
) -> None:
    gpu = device == "cuda"
    if not gpu and (case, rows) != ("w12", 16):
        pytest.skip("a size for a GPU; the CPU runs the reference")
    dtype = torch.bfloat16 if gpu else torch.float32
    N, K, added, activation = CASES[case]
    if quick:
        N, K = 48, 32

    def make() -> list[Tensor]:
        shapes = [(rows, K), (N, K), *([(rows, K), (K,)] if added else [])]
        tensors = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
        tensors[1] *= 0.02
        return tensors

    variants = functions(added, activation)
    reference = variants.pop("reference")
    sets = rotated(make, device)
    with torch.no_grad():
        expected = reference(*sets[0])
        exact = reference(*(t.double() for t in sets[0]))
        for actual, r, e in zip(variants["ours"](*sets[0]), expected, exact, strict=True):
            assert_within_budget(actual, r, e, case, long_sums(dtype))
        for name in ("apart", "torch"):
            agree(variants[name](*sets[0]), expected)
    ceilings = Ceilings(device, dtype, quick)
    calls = {name: over(sets, function) for name, function in variants.items()}
    rounds = 30 if gpu and not quick else 3
    timings = once(lambda: interleaved(calls | ceilings.variants, rounds=rounds, device=device))
    host = host_time(calls, calls=20 if quick else 200, rounds=rounds) if gpu else {}
    cost = operators.fused_linear(
        rows, K, N, dtype.itemsize, added=added, normed=added, gated=activation is not None
    )
    around = "a residual and rms_norm, " * added + f"{case}" + f", {activation}" * bool(activation)
    record(
        "fused_linear",
        f"{around}: {rows} x {K} to {N}, {str(dtype).removeprefix('torch.')}, {device}",
        implementation=_runtime.implementation("fused_linear", device),
        **ceilings.against(cost, timings),
        **ratios(timings),
        **columns(timings),
        **{f"{name}_host_s": timing.median_s for name, timing in host.items()},
    )
