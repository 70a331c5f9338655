"""Where a forward's time goes on this GPU, kernel by kernel, and what of it is the host's.

python benchmarks/gpu_profile.py --output build/gpu [--model neobert-250m] [--case 'fixed 512']

For each case and way: seconds of a call one at a time, back to back, and until it returns to the
host; then the device's time by kernel. All times are taken before the first profile, because the
profiler slows every launch from then on. ``profile-<device>.json`` has everything,
``profile-<device>.md`` the longest kernels. On a CPU it shows operators, with --quick in no time.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evidence
import torch
from shapes import FIRST, MODELS, SMALL, batch_of, longest_of
from torch.profiler import ProfilerActivity, profile
from ways import Way, Ways

from neobert.tables import Table
from neobert_kernels.patching.graphs import GRAPHS

ONE_TEXT = "one text of 16 tokens"
TOKENS = {"fixed 512": 32768, "fixed 4096": 32768, "ragged": 16384}
CASES = (*TOKENS, ONE_TEXT)
# Graphs take no large batch, and there they would not matter.
WAYS = ("sdpa", "patched", "frozen")
SMALL_WAYS = (*WAYS, "graphs")
SHOWN = 12  # kernels of a way
LONGEST_NAME = 72


def seconds(call: Callable[[], object], device: str, repeats: int) -> dict[str, float]:
    """Of a call: until it returns, back to back, and waited for."""

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    for _ in range(3):
        call()
    wait()
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    host = time.perf_counter() - began
    wait()
    back_to_back = time.perf_counter() - began
    began = time.perf_counter()
    for _ in range(repeats):
        call()
        wait()
    alone = time.perf_counter() - began
    times = {"host_s": host, "back_to_back_s": back_to_back, "alone_s": alone}
    return {name: taken / repeats for name, taken in times.items()}


def kernels(call: Callable[[], object], device: str) -> list[dict[str, Any]]:
    """Device time of one call by kernel, the longest first; on a CPU that of operators."""
    gpu = device == "cuda"
    activity = ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU
    with profile(activities=[activity], acc_events=True) as found:
        call()
        if gpu:
            torch.cuda.synchronize()
    key = "self_device_time_total" if gpu else "self_cpu_time_total"
    rows = [
        {"name": event.key, "count": event.count, "s": getattr(event, key) / 1e6}
        for event in found.key_averages()
    ]
    return sorted((row for row in rows if row["s"]), key=lambda row: -row["s"])


def replay_of(model: Any) -> Callable[[], None] | None:
    """The replay alone of the graph that a model has used last."""
    for module in model.modules():
        graphs = module.__dict__.get(GRAPHS)
        if graphs is not None and graphs.entries:
            return next(reversed(graphs.entries.values())).recorder.replay
    return None


Timed = tuple[dict[str, Any], Callable[[], object] | None]  # what is known so far, and the call


def measure(ways: Ways, case: str, device: str, quick: bool) -> list[Timed]:
    """Every way of one model at one case, or why it is absent."""
    if case == ONE_TEXT:
        lengths = [16]
    else:
        lengths = batch_of(case, 128 if quick else TOKENS[case], ways.model.longest)
        lengths = [max(2, n // 32) for n in lengths] if quick else lengths
    ids, mask = ways.batch(lengths)
    repeats = 2 if quick else 50 if case == ONE_TEXT else 5
    found: list[Timed] = []
    for name in SMALL_WAYS if case == ONE_TEXT and device == "cuda" else WAYS:
        entry: dict[str, Any] = {"way": name, "case": case, "tokens": sum(lengths)}
        way, why = ways.working(name)
        if way is None:
            found.append((entry | {"absent": why}, None))
            continue

        def call(way: Way = way) -> object:
            return way(ids, mask)

        entry |= seconds(call, device, repeats)
        replay = replay_of(way.model)  # type: ignore[attr-defined]
        if replay is not None:
            entry["replay"] = seconds(replay, device, repeats)
        found.append((entry, call))
    return found


def markdown(document: dict[str, Any]) -> str:
    lines = [f"# Where a forward's time goes on {document['machine']['device']}", ""]
    lines += [f"Commit {document['commit']}.", ""]
    for entry in document["found"]:
        lines += [f"## {entry['model']}, {entry['case']}, {entry['way']}", ""]
        if "absent" in entry:
            lines += [f"Absent: {entry['absent']}", ""]
            continue
        total = sum(row["s"] for row in entry["kernels"])
        shown = {"alone": "alone_s", "back to back": "back_to_back_s", "until it returns": "host_s"}
        times = [f"{what} {1e3 * entry[key]:.3f} ms" for what, key in shown.items()]
        if "replay" in entry:
            times.append(f"its replay alone {1e3 * entry['replay']['alone_s']:.3f} ms")
        lines += [f"{entry['tokens']} tokens: {', '.join(times)}; kernels {1e3 * total:.3f} ms", ""]
        rows = [
            [f"`{row['name'][:LONGEST_NAME]}`", str(row["count"]), f"{1e3 * row['s']:.3f}",
             f"{row['s'] / total:.0%}"]
            for row in entry["kernels"][:SHOWN]
        ]  # fmt: skip
        lines += [Table(["kernel", "calls", "ms", "share"], rows, 1).markdown(), ""]
    if document["not_reached"]:
        lines.append(f"Not reached: {'; '.join(document['not_reached'])}.\n")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Where a forward's time goes.")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--model", action="append", choices=tuple(MODELS), help="may be repeated")
    parser.add_argument("--case", action="append", choices=CASES, help="may be repeated")
    parser.add_argument("--deadline-s", type=float, default=510.0)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run")
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"profile-{evidence.slug(evidence.device_name())}"
    ends = time.monotonic() + args.deadline_s
    timed: list[Timed] = []
    left: list[str] = []
    for model in args.model or FIRST[:1]:
        ways = Ways(MODELS[model], device, dtype, **(SMALL if args.quick else {}))
        for case in args.case or CASES:
            if case != ONE_TEXT and longest_of(case) > MODELS[model].longest:
                continue
            print(f"{model}, {case}", flush=True)
            if time.monotonic() > ends:
                left.append(f"{model}, {case}")
            else:
                found = measure(ways, case, device, args.quick)
                timed += [({"model": model, **entry}, call) for entry, call in found]
    for entry, call in timed:
        if call is not None and time.monotonic() > ends:
            entry["absent"] = "not profiled before --deadline-s"
        elif call is not None:
            entry["kernels"] = kernels(call, device)
    entries = [entry for entry, _ in timed]
    document = {**evidence.describe(), "found": entries, "not_reached": left}
    evidence.write_json(stem.with_suffix(".json"), document)
    stem.with_suffix(".md").write_text(markdown(document), encoding="utf-8")
    print(f"{stem.with_suffix('.json')}\n{stem.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
