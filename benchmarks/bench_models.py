"""Encoders from token ids to hidden states: throughput, memory, and how cost grows.

Real tokens per second, padding not counted. ``sdpa`` is the model as transformers runs it, on the
batch padded to its longest document. The limit is that of the cost model at the rates of a copy and
a product that are timed in the same rounds.
"""

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import pytest
import torch
from ceilings import Ceilings, floor_s
from shapes import CASES, FIRST, MODELS, SMALL, batch_of, longest_of
from timing import Timing, Variant, interleaved, noisy
from torch import Tensor
from ways import DoesNotFitError, Way, Ways, fits, fitting_peak

from neobert.floors import ARCHITECTURES, forward
from neobert.floors.models import of_config

TOKENS = {"cuda": (8192, 32768, 131072), "cpu": (512, 2048)}
CURVE = {"cuda": 16384, "cpu": 1024}
CORE = ("patched", "sdpa")
CALLS = 8  # of each way at one batch, about
# At one batch. On a GPU a way that would take longer is past its best anyway; on a CPU it has room
# for 2,048 tokens of a base model, because with fewer a ragged batch is a text or two.
MOST_S = {"cuda": 15.0, "cpu": 60.0}
Found = tuple[list[dict[str, Any]], dict[str, str]]  # points, and why ways are absent
WRONG = "differs from the unpatched model"
PAST_BEST = 0.97  # so much of its best rate or less, and a way is not tried on larger batches
LEAST_S = {"compile": 60.0, "compile_max_autotune": 150.0}  # not begun with less time than this

by_model = pytest.mark.parametrize(
    "model",
    [pytest.param(n, marks=pytest.mark.importance(0 if n in FIRST else 3)) for n in MODELS],
)


@dataclass
class Bench:
    """One model on this machine, and how to measure it."""

    name: str
    ways: Ways
    device: str
    quick: bool
    once: Callable[..., Any]
    left_s: Callable[[], float]
    cut_short: bool = False  # by the deadline, in the middle of a sweep

    def __post_init__(self) -> None:
        self.ceilings = Ceilings(self.device, self.ways.dtype, self.quick)
        self.dtype = str(self.ways.dtype).removeprefix("torch.")
        self.best: dict[str, tuple[float, Timing]] = {}

    def point(self, ways: dict[str, Way], lengths: list[int]) -> list[dict[str, Any]]:
        """One batch under every way: a dictionary each, with its time or why there is none."""
        ids, mask = self.ways.batch(lengths)
        batch = {"documents": len(lengths), "tokens": sum(lengths), "longest": max(lengths)}
        found, calls, peaks = [], {}, {}

        def call_of(way: Way) -> Variant:
            return lambda _: way(ids, mask)

        for name, way in ways.items():
            call = call_of(way)
            try:
                if name.startswith("compile") and not self.right(way, ids, mask):
                    found.append({"variant": name, **batch, "wrong": WRONG})
                    continue
                peaks[name] = fitting_peak(call, self.device)
                calls[name] = call
            except DoesNotFitError as error:
                found.append({"variant": name, **batch, "out_of_memory": str(error)[:120]})
        if not calls:
            return found
        rounds = 2 if self.quick else 5

        def measure() -> dict[str, Timing]:
            return interleaved(
                calls | self.ceilings.variants, rounds=rounds, device=self.device, warm_up=1
            )

        try:
            timings = fits(measure)
        except DoesNotFitError as error:
            why = str(error)[:120]
            return found + [{"variant": name, **batch, "out_of_memory": why} for name in calls]
        shape = of_config(self.ways.plain.config)
        least = floor_s(forward(shape, lengths, self.dtype), self.ceilings.gpu(timings), self.dtype)
        for name in calls:
            t = timings[name]
            rate = batch["tokens"] / t.median_s
            self.best[name] = max(self.best.get(name, (0.0, t)), (rate, t), key=lambda b: b[0])
            found.append(
                {
                    "variant": name,
                    **batch,
                    "tokens_per_s": rate,
                    "low_tokens_per_s": batch["tokens"] / t.high_s,
                    "high_tokens_per_s": batch["tokens"] / t.low_s,
                    "limit_tokens_per_s": batch["tokens"] / least,
                    "peak_bytes": peaks[name],
                    "noisy": name in noisy(timings),
                    **self.ceilings.rates(timings),
                }
            )
        return found

    def right(self, way: Way, ids: Tensor, mask: Tensor) -> bool:
        return fits(lambda: self.ways.agrees(way, ids, mask))

    def sweep(
        self, names: Iterable[str], batches: Iterable[list[int]], to_best: bool = False
    ) -> Found:
        """Points of every batch, smallest first, and why ways are absent.

        A way that ran out of memory is not run again; with ``to_best`` neither is one whose rate
        has begun to fall, or which would take too long.
        """
        ways, absent = {}, {}
        for name in names:
            way, why = self.ways.working(name)
            if way is None:
                absent[name] = why
            else:
                ways[name] = way
        points: list[dict[str, Any]] = []
        for lengths in batches:
            if not ways:
                break
            if self.left_s() <= 0:
                self.cut_short = True
                break
            if to_best:
                ways = {
                    name: way for name, way in ways.items() if self.worth(name, points, lengths)
                }
            found = self.point(ways, lengths) if ways else []
            points += found
            failed = {point["variant"] for point in found if "tokens_per_s" not in point}
            ways = {name: way for name, way in ways.items() if name not in failed}
        return points, absent

    def worth(self, name: str, points: list[dict[str, Any]], lengths: list[int]) -> bool:
        """Whether a larger batch may be faster, and does not take too long to find out."""
        rates = [point["tokens_per_s"] for point in points if point["variant"] == name]
        if not rates:
            return True
        seconds = CALLS * sum(lengths) / rates[-1]
        return rates[-1] > PAST_BEST * max(rates) and seconds < MOST_S[self.device]


@pytest.fixture
def bench(
    quick: bool, device: str, once: Callable[..., Any], left_s: Callable[[], float]
) -> Callable[[str], Bench]:
    return lambda name: Bench(name, ways_of(name, device, quick), device, quick, once, left_s)


@pytest.fixture
def file(
    record: Callable[..., None], not_reached: Callable[[], NoReturn], device: str,
    shown: Callable[[dict[str, Timing]], None],
) -> Callable[..., None]:  # fmt: skip
    """File a sweep. One that the deadline cut short says so, and is measured again on resuming."""

    def add(name: str, what: str, here: Bench, found: Found) -> None:
        if here.cut_short and not best_of(found[0]):
            not_reached()
        shown({way: timing for way, (_, timing) in here.best.items()})
        cut = {"cut_short": True} if here.cut_short else {}
        record(name, f"{what}, {here.dtype}, {device}", **cut, **summary(*found))

    return add


@functools.lru_cache(maxsize=1)  # cases of one model follow each other
def ways_of(name: str, device: str, quick: bool) -> Ways:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return Ways(MODELS[name], device, dtype, **(SMALL if quick else {}))


def best_of(points: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For every way the point of its highest throughput."""
    best: dict[str, dict[str, Any]] = {}
    for point in points:
        name = point["variant"]
        rate = point.get("tokens_per_s", 0.0)
        if rate and (name not in best or rate > best[name]["tokens_per_s"]):
            best[name] = point
    return best


def summary(points: list[dict[str, Any]], absent: dict[str, str]) -> dict[str, Any]:
    """What a table shows of a sweep: each way at its best batch, and ours against SDPA's."""
    best = best_of(points)
    wrong = {point["variant"]: point["wrong"] for point in points if "wrong" in point}
    values: dict[str, Any] = {f"{name}_absent": why for name, why in (absent | wrong).items()}
    for name, point in best.items():
        for key in ("tokens_per_s", "low_tokens_per_s", "high_tokens_per_s", "peak_bytes"):
            values[f"{name}_{key}"] = point[key]
        values[f"{name}_batch_tokens"] = point["tokens"]
    if "patched" in best:
        ours = best["patched"]
        values["limit_tokens_per_s"] = ours["limit_tokens_per_s"]
        values["share_of_limit"] = ours["tokens_per_s"] / ours["limit_tokens_per_s"]
        if "sdpa" in best:
            theirs = best["sdpa"]
            values["ratio"] = ours["tokens_per_s"] / theirs["tokens_per_s"]
            values["ratio_low"] = ours["low_tokens_per_s"] / theirs["high_tokens_per_s"]
            values["ratio_high"] = ours["high_tokens_per_s"] / theirs["low_tokens_per_s"]
    unsteady = sorted(name for name, point in best.items() if point["noisy"])
    return values | ({"noisy": unsteady} if unsteady else {}) | {"points": points}


def shortened(lengths: list[int], quick: bool) -> list[int]:
    return [max(4, n // 16) for n in lengths[:4]] if quick else lengths


@pytest.mark.parametrize("case", CASES)
@by_model
def test_inference(
    model: str, case: str, bench: Callable[[str], Bench], quick: bool, device: str,
    once: Callable[..., Any], file: Callable[..., None],
) -> None:  # fmt: skip
    """The batch that suits each way best; memory at that batch."""
    longest = MODELS[model].longest
    if longest_of(case) > longest:
        pytest.skip(f"{model} takes at most {longest} tokens")
    if quick and (case not in ("fixed 512", "long tail") or model not in FIRST):
        pytest.skip("--quick runs few models and cases")
    here = bench(model)
    batches = [shortened(batch_of(case, n, min(longest, 4096)), quick) for n in TOKENS[device]]
    if quick:
        batches = batches[-1:]
    different = [list(lengths) for lengths in dict.fromkeys(map(tuple, batches))]
    points, absent = once(lambda: here.sweep(CORE, different, to_best=True))
    assert not absent, absent
    file("inference", f"{model}, {case}", here, (points, absent))


@pytest.mark.importance(3)
@pytest.mark.parametrize("case", ["fixed 512", "ragged", "fixed 4096"])
@pytest.mark.parametrize("model", FIRST)
def test_ways(
    model: str, case: str, bench: Callable[[str], Bench], quick: bool, device: str,
    once: Callable[..., Any], file: Callable[..., None], left_s: Callable[[], float],
) -> None:  # fmt: skip
    """One batch under everything that transformers, torch and flash-attn offer."""
    longest = MODELS[model].longest
    if longest_of(case) > longest:
        pytest.skip(f"{model} takes at most {longest} tokens")
    if quick and case != "ragged":
        pytest.skip("--quick runs the ragged case")
    here = bench(model)
    names = [n for n in here.ways.names() if left_s() > LEAST_S.get(n, 0.0)]
    here.cut_short = len(names) < len(here.ways.names())
    if quick:
        names = [n for n in names if not n.startswith(("compile", "flex"))]
    batch = shortened(batch_of(case, TOKENS[device][1], longest), quick)
    found = once(lambda: here.sweep(names, [batch]))
    file("ways", f"{model}, {case}", here, found)


@pytest.mark.importance(2)
@pytest.mark.parametrize("axis", ["length", "batch"])
@pytest.mark.parametrize("model", FIRST[:2])
def test_curve(
    model: str, axis: str, bench: Callable[[str], Bench], quick: bool, device: str,
    once: Callable[..., Any], file: Callable[..., None],
) -> None:  # fmt: skip
    """Cost over the length at a fixed number of tokens, and over the batch at 512 tokens."""
    here = bench(model)
    tokens = 128 if quick else CURVE[device]
    sizes = [2**i for i in range(4 if quick else 6, 14) if 2**i <= tokens]
    if axis == "length":
        batches = [[n] * (tokens // n) for n in sizes if n <= ARCHITECTURE_LENGTHS[model]]
    else:
        unit = 16 if quick else 512
        batches = [[unit] * n for n in (1, 2, 4, 8, 16, 32, 64, 128) if n * unit <= tokens]
    found = once(lambda: here.sweep(CORE, batches))
    file(f"curve_{axis}", model, here, found)


ARCHITECTURE_LENGTHS = {name: MODELS[name].longest for name in ARCHITECTURES if name in MODELS}
