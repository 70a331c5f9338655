"""How benchmarks take time: variants interleaved, median and quartiles, device time on a GPU.

On a GPU a sample is many calls between two events, queued behind a wait that lasts until the last
of them is queued: so the device never waits for the host, whose own time per call is `host_time`.
Buffers rotate past the last-level cache. On a CPU it is wall time at a fixed number of threads.
"""

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from report_data import NOISY

CLEAR_REFS, STATUS = (Path("/proc/self") / name for name in ("clear_refs", "status"))
Variant = Callable[[int], object]  # called with a running number, to pick among rotated buffers

# About 5 ms and 0.2 s of idling on the GPU, while the host fills the queue.
BACKLOG_CYCLES, MOST_BACKLOG_CYCLES = 10_000_000, 400_000_000
MOST_SETS = 64
CEILINGS = ("copy", "gemm")  # timed beside the variants, and not compared with them


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the rounds.

    ``starved``: the GPU waited for the host, so its time is the host's.
    """

    median_s: float
    low_s: float  # first quartile
    high_s: float  # third quartile
    samples: tuple[float, ...] = field(default=(), repr=False)
    starved: bool = False

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a share of the median."""
        return (self.high_s - self.low_s) / self.median_s if self.median_s else 0.0

    def values(self, prefix: str) -> dict[str, float]:
        """The three numbers under names that start with ``prefix``."""
        return {f"{prefix}_{name}": getattr(self, name) for name in ("median_s", "low_s", "high_s")}


def interleaved(
    variants: Mapping[str, Variant],
    *,
    rounds: int,
    device: str = "cpu",
    at_least_s: float = 0.005,
    warm_up: int = 3,
) -> dict[str, Timing]:
    """Time every variant in every round, in an order that rotates; device time for "cuda".

    A round calls a variant as often as fills ``at_least_s``; counts are fixed before the timing,
    from ``warm_up`` calls after as many that are not timed.
    """
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    clocks = {name: DeviceClock() if device == "cuda" else HostClock() for name in names}
    calls = {}
    for name in names:
        for number in range(warm_up):
            variants[name](number)
        calls[name] = max(1, round(at_least_s / clocks[name].take(variants[name], warm_up)))
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(clocks[name].take(variants[name], calls[name]))
    return {name: summarize(seconds[name], clocks[name].starved) for name in names}


class HostClock:
    """Wall time per call."""

    starved = False

    def take(self, variant: Variant, calls: int) -> float:
        began = time.perf_counter()
        for number in range(calls):
            variant(number)
        return (time.perf_counter() - began) / calls


class DeviceClock(HostClock):
    """Time between two events per call, with all calls queued before the first one runs.

    The wait in front of them grows until that holds. Past the driver's queue (about a thousand
    launches) no wait suffices; then the device is ahead of the host, ``starved``, if it has nothing
    left to do when the host has queued the last call.
    """

    def __init__(self) -> None:
        self.cycles = BACKLOG_CYCLES
        self.limited = False  # the queue is too short for so many launches

    def take(self, variant: Variant, calls: int) -> float:
        while True:
            seconds, full, left_s = self._sample(variant, calls)
            if full or self.limited:
                break
            if self.cycles >= MOST_BACKLOG_CYCLES:
                self.cycles, self.limited = BACKLOG_CYCLES, True
                break
            self.cycles = min(4 * self.cycles, MOST_BACKLOG_CYCLES)
        self.starved = not full and left_s < 0.05 * seconds * calls
        return seconds

    def _sample(self, variant: Variant, calls: int) -> tuple[float, bool, float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(self.cycles)
        start.record()
        for number in range(calls):
            variant(number)
        full = not start.query()  # the wait in front has not ended yet
        end.record()
        queued = time.perf_counter()
        torch.cuda.synchronize()
        left_s = time.perf_counter() - queued
        return start.elapsed_time(end) / 1000 / calls, full, left_s


def peak_memory(variant: Variant, device: str = "cpu") -> int | None:
    """Bytes that one call takes at most, beyond what was in use before it.

    On the CPU the process's resident memory, where Linux and glibc tell; None on other systems.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        variant(0)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # freed memory goes back, and counts again when taken
        CLEAR_REFS.write_text("5")  # sets the high-water mark to what is resident now
    except (OSError, AttributeError):
        return None
    before = _resident("VmHWM")
    variant(0)
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    (line,) = (x for x in STATUS.read_text().splitlines() if x.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def over(
    sets: Sequence[Sequence[torch.Tensor]],
    function: Callable[..., Any],
    gradients: Sequence[Sequence[torch.Tensor]] | None = None,
) -> Variant:
    """``function`` on one set of tensors after the other.

    With ``gradients``, one for every output of every set, also the backward to all tensors;
    without, no graph.
    """

    def call(number: int) -> object:
        which = number % len(sets)
        with torch.set_grad_enabled(gradients is not None):
            out = function(*sets[which])
        if gradients is None:
            return out
        outputs = out if isinstance(out, tuple) else (out,)
        return torch.autograd.grad(outputs, sets[which], gradients[which])

    return call


def host_time(variants: Mapping[str, Variant], *, calls: int, rounds: int) -> dict[str, Timing]:
    """Seconds that a call keeps the host, in turning order; a GPU's queue holds all the calls."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-1, rounds):
        for name in sorted(variants, reverse=bool(number % 2)):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            taken = HostClock().take(variants[name], calls)
            if number >= 0:  # the round before warms up
                seconds[name].append(taken)
    return {name: summarize(times) for name, times in seconds.items()}


def ratios(timings: Mapping[str, Timing]) -> dict[str, float]:
    """How many times as long as ours each of the others takes."""
    ours = timings["ours"].median_s
    others = {k: t for k, t in timings.items() if k not in ("ours", *CEILINGS)}
    return {f"ratio_to_{k}": t.median_s / ours for k, t in others.items()}


def columns(timings: Mapping[str, Timing]) -> dict[str, Any]:
    """All numbers of all variants for a results file, and which of them not to trust."""
    found: dict[str, Any] = {}
    for name, timing in timings.items():
        found |= timing.values(name)
    found["rounds"] = max((len(t.samples) for t in timings.values()), default=0)
    for key, names in (
        ("noisy", noisy(timings)),
        ("starved", [name for name, timing in timings.items() if timing.starved]),
    ):
        if names:
            found[key] = names
    return found


def noisy(timings: Mapping[str, Timing]) -> list[str]:
    """Which variants varied too much for their medians to be believed."""
    return [name for name, timing in timings.items() if timing.spread > NOISY]


def summarize(seconds: Sequence[float], starved: bool = False) -> Timing:
    """Median and quartiles; with one value, that value thrice."""
    if len(seconds) == 1:
        return Timing(seconds[0], seconds[0], seconds[0], tuple(seconds), starved)
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, low, high, tuple(seconds), starved)


def cache_bytes() -> int:
    """Twice the last-level cache of the GPU: what rotated buffers must exceed."""
    found = getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0)
    return 2 * max(found, 32 << 20)


def rotated(make: Callable[[], list[torch.Tensor]], device: str) -> list[list[torch.Tensor]]:
    """Enough sets of inputs from ``make`` that a GPU's cache never holds the next one."""
    sets = [make()]
    size = sum(t.numel() * t.element_size() for t in sets[0])
    if device == "cuda":
        sets += [make() for _ in range(min(cache_bytes() // max(size, 1), MOST_SETS - 1))]
    return sets
