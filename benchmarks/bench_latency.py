"""One short text at a time, as a server sees it: wall time of a forward, p50 and p99."""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from shapes import FIRST, MODELS, SMALL
from timing import Timing, summarize
from ways import Ways

WAYS = {
    "cuda": (
        "patched",
        "sdpa",
        "frozen",
        "frozen_by_layer",
        "frozen_as_many",
        "graphs",
        "graphs_by_layer",
        "graphs_as_many",
        "invariant_graphs",
    ),
    "cpu": ("patched", "sdpa", "frozen"),
}
CALLS = {"cuda": 300, "cpu": 40}


@pytest.mark.parametrize("tokens", [16, 128, 512])
@pytest.mark.parametrize("model", FIRST)
def test_latency(
    model: str,
    tokens: int,
    quick: bool,
    device: str,
    once: Callable[..., Any],
    record: Callable[..., None],
) -> None:
    """From the call to the result on the host; the ways take turns, so a slow moment hits both."""
    if quick and tokens > 16:
        pytest.skip("--quick runs the shortest text")
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    ways = Ways(MODELS[model], device, dtype, **(SMALL if quick else {}))
    ids, mask = ways.batch([tokens])
    calls = {}
    names = WAYS[device]
    for name in names:
        way, why = ways.working(name)
        assert way is not None, why
        calls[name] = way
    seconds: dict[str, list[float]] = {name: [] for name in names}

    def measure() -> dict[str, Timing]:
        for number in range(-5, 4 if quick else CALLS[device]):
            for name in names:
                began = time.perf_counter()
                calls[name](ids, mask)[:, 0].float().cpu()
                if number >= 0:
                    seconds[name].append(time.perf_counter() - began)
        return {name: summarize(taken) for name, taken in seconds.items()}

    timings = once(measure)
    values: dict[str, Any] = {}
    for name, taken in seconds.items():
        p50, p99 = np.percentile(taken, [50, 99])
        values |= timings[name].values(name) | {
            f"{name}_p50_ms": 1e3 * p50,
            f"{name}_p99_ms": 1e3 * p99,
        }
    record(
        "latency",
        f"{model}, {tokens} tokens, {str(dtype).removeprefix('torch.')}, {device}",
        ratio=values["sdpa_p50_ms"] / values["patched_p50_ms"],
        calls=len(seconds["patched"]),
        **values,
    )
