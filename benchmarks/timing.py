"""How benchmarks take time: variants interleaved, median and quartiles, device time on a GPU."""

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

CLEAR_REFS, STATUS = (Path("/proc/self") / name for name in ("clear_refs", "status"))
Variant = Callable[[int], object]  # called with a running number, to pick among rotated buffers

BACKLOG_CYCLES = 20_000_000  # about 10 ms of idling on the GPU, while the host fills the queue
L2_BYTES = 128 << 20  # more than the last-level cache of any GPU here, so every call reads memory


@dataclass(frozen=True)
class Timing:
    """Seconds per call over the rounds."""

    median_s: float
    low_s: float  # first quartile
    high_s: float  # third quartile

    def values(self, prefix: str) -> dict[str, float]:
        """The three numbers under names that start with ``prefix``."""
        return {f"{prefix}_{name}": value for name, value in asdict(self).items()}


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
    take = _device_time if device == "cuda" else _host_time
    calls = {}
    for name in names:
        for number in range(warm_up):
            variants[name](number)
        calls[name] = max(1, round(at_least_s / take(variants[name], warm_up)))
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(take(variants[name], calls[name]))
    return {name: summarize(seconds[name]) for name in names}


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
            taken = _host_time(variants[name], calls)
            if number >= 0:  # the round before warms up
                seconds[name].append(taken)
    return {name: summarize(times) for name, times in seconds.items()}


def ratios(timings: Mapping[str, Timing]) -> dict[str, float]:
    """How many times as long as ours each of the others takes."""
    ours = timings["ours"].median_s
    return {f"ratio_to_{k}": t.median_s / ours for k, t in timings.items() if k != "ours"}


def columns(timings: Mapping[str, Timing]) -> dict[str, float]:
    """All numbers of all variants, for a results file."""
    return {k: v for name, timing in timings.items() for k, v in timing.values(name).items()}


def summarize(seconds: list[float]) -> Timing:
    """Median and quartiles; with one value, that value thrice."""
    if len(seconds) == 1:
        return Timing(seconds[0], seconds[0], seconds[0])
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return Timing(median, low, high)


def rotated(make: Callable[[], list[torch.Tensor]], device: str) -> list[list[torch.Tensor]]:
    """Enough sets of inputs from ``make`` that a GPU's cache never holds the next one."""
    sets = [make()]
    size = sum(t.numel() * t.element_size() for t in sets[0])
    if device == "cuda":
        sets += [make() for _ in range(min(L2_BYTES // max(size, 1), 63))]
    return sets


def _host_time(variant: Variant, calls: int) -> float:
    began = time.perf_counter()
    for number in range(calls):
        variant(number)
    return (time.perf_counter() - began) / calls


def _device_time(variant: Variant, calls: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(BACKLOG_CYCLES)
    start.record()
    for number in range(calls):
        variant(number)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000 / calls
