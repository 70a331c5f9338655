"""What the machine can do, timed in the same rounds as what it is the ceiling of.

Two ceilings: a copy too large for any cache, bytes read and written, and a square matrix product in
the dtype of the case. An operator's floor on this machine is the longer of its bytes over the one
and its FLOP over the other.
"""

from collections.abc import Mapping
from typing import Any

import torch
from timing import CEILINGS, Timing, Variant

from neobert.floors import Cost, Gpu, Part

COPIED_BYTES = {"cuda": 512 << 20, "cpu": 64 << 20}
PRODUCT = {"cuda": 8192, "cpu": 1024}
QUICK_BYTES, QUICK_PRODUCT = 1 << 20, 256


class Ceilings:
    """Add `variants` to those of a case; `rates` turns their times into rates."""

    def __init__(self, device: str, dtype: torch.dtype, quick: bool = False) -> None:
        self.bytes = QUICK_BYTES if quick else COPIED_BYTES[device]
        self.size = QUICK_PRODUCT if quick else PRODUCT[device]
        # Random, because a product of zeros takes less power and runs faster.
        source = torch.randint(256, (self.bytes,), dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        a, b = (torch.randn(self.size, self.size, device=device, dtype=dtype) for _ in range(2))
        out = torch.empty_like(a)
        self.variants: dict[str, Variant] = {
            "copy": lambda _: target.copy_(source),
            "gemm": lambda _: torch.mm(a, b, out=out),
        }

    def rates(self, timings: Mapping[str, Timing]) -> dict[str, float]:
        return {
            "copy_bytes_per_s": 2 * self.bytes / timings["copy"].median_s,
            "gemm_flop_per_s": 2 * self.size**3 / timings["gemm"].median_s,
        }

    def gpu(self, timings: Mapping[str, Timing]) -> Gpu:
        """The machine as the cost model takes it, by its measured rates."""
        rates = self.rates(timings)
        copy, gemm = rates["copy_bytes_per_s"], rates["gemm_flop_per_s"]
        unlimited = float("inf")
        return Gpu("this machine", copy, gemm, gemm, unlimited, unlimited, "measured")

    def against(self, cost: Cost, timings: Mapping[str, Timing]) -> dict[str, Any]:
        """Bytes and FLOP of the case, each variant's rates, and its share of the floor."""
        rates = self.rates(timings)
        floor_s = cost.bytes / rates["copy_bytes_per_s"]
        if cost.matrix:
            floor_s = max(floor_s, cost.flop / rates["gemm_flop_per_s"])
        found: dict[str, Any] = {
            **rates,
            "bytes": cost.bytes,
            "flop": cost.flop,
            "floor_s": floor_s,
        }
        for name, timing in timings.items():
            if name not in CEILINGS:
                found[f"{name}_bytes_per_s"] = cost.bytes / timing.median_s
                if cost.matrix:
                    found[f"{name}_flop_per_s"] = cost.flop / timing.median_s
                found[f"{name}_share_of_floor"] = floor_s / timing.median_s
        return found


def floor_s(parts: list[Part], on: Gpu, dtype: str) -> float:
    """The least time of all parts, one after the other."""
    return sum(part.cost.floor_s(on, dtype) for part in parts)
