"""What importing the package costs, and what one call of an operator costs the host."""

import statistics
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timing import interleaved

import neobert_kernels as nk

IMPORTS = """
import time
began = time.perf_counter()
import torch
middle = time.perf_counter()
import neobert_kernels
end = time.perf_counter()
neobert_kernels.rms_norm
print(middle - began, end - middle, time.perf_counter() - end)
"""


def test_import_time(quick: bool, once: Callable[..., Any], record: Callable[..., None]) -> None:
    def fresh_process() -> tuple[float, ...]:
        done = subprocess.run(
            [sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=True
        )
        return tuple(map(float, done.stdout.split()))

    triples = once(lambda: [fresh_process() for _ in range(2 if quick else 9)])
    torch_s, added_s, first_s = zip(*triples, strict=True)
    record(
        "import",
        "neobert_kernels after torch",
        added_s=statistics.median(added_s),
        added_low_s=min(added_s),
        added_high_s=max(added_s),
        first_operator_s=statistics.median(first_s),
        torch_s=statistics.median(torch_s),
    )


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_host_time_of_one_call(
    grad: bool,
    quick: bool,
    device: str,
    once: Callable[..., Any],
    record: Callable[..., None],
) -> None:
    """On a GPU the call returns before the kernel ends; on a CPU the reference's work is in it."""
    x = torch.randn(1, 8, device=device, requires_grad=grad)
    weight = torch.randn(8, device=device, requires_grad=grad)
    torch.testing.assert_close(nk.rms_norm(x, weight), nk.rms_norm_reference(x, weight))
    with torch.set_grad_enabled(grad):
        timings = once(
            lambda: interleaved(
                {
                    "ours": lambda _: nk.rms_norm(x, weight),
                    "reference": lambda _: nk.rms_norm_reference(x, weight),
                },
                rounds=3 if quick else 50,
            )
        )
    record(
        "op_call",
        f"rms_norm, {'training' if grad else 'inference'}, {device}",
        added_us=1e6 * (timings["ours"].median_s - timings["reference"].median_s),
        **timings["ours"].values("ours"),
        **timings["reference"].values("reference"),
    )
