"""Sweep the launch choices of every operator and propose better ones; nothing is changed.

python benchmarks/gpu_tune.py --output build/gpu

For each operator's case (`operator_cases`) and each of its knobs (`tuning`): the values near the
default, one at a time, then those near the best, each with the same outputs as the default within
rounding, forward and backward apart, all interleaved. Before anything is timed, processes side by
side compile what will be. A value is proposed where its third quartile is below the default's
first. ``tune-<device>.json`` has every measurement, ``tune-<device>.md`` the proposals; both are
rewritten after each knob, and a second run goes on where the first one ended.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evidence
import torch
from operator_cases import CASES, FULL, TINY, outputs, sample
from timing import Timing, Variant, interleaved
from torch import Tensor
from tuning import KNOBS, Knob, answering, candidates, recorded, replaced

from neobert_kernels import _runtime

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
LEAST_S = 10.0
MOST_CANDIDATES = 36
SHARE_TO_COMPILE = 1 / 3  # of the time, at most


class Tuner:
    """One case of one operator, on this machine."""

    def __init__(self, operator: str, case: str, device: str, size: str) -> None:
        self.operator, self.device = operator, device
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.given = sample(operator, case, size, device, self.dtype)
        public = _runtime.load_operators()[operator].public
        with torch.no_grad():
            out = public(*self.given.args, **self.given.options)
        outs = out if isinstance(out, tuple) else (out,)
        self.gradients = [torch.randn_like(o) for o in outs]
        self.expected = outputs(operator, self.given, self.gradients)

    def forward(self) -> None:
        with torch.no_grad():
            _runtime.OPERATORS[self.operator].public(*self.given.args, **self.given.options)

    def both(self) -> list[Tensor]:
        return outputs(self.operator, self.given, self.gradients)

    def variant(self, knob: Knob, call: Callable[[], Any], value: Any) -> Variant:
        def run(_: int) -> None:
            with replaced(knob, value):
                call()

        return run

    def fault(self, knob: Knob, value: Any) -> str:
        """Why a value cannot be taken; empty if it can."""
        try:
            with replaced(knob, value):
                actual = self.both()
        except Exception as error:  # whatever the compiler or the driver raises
            return f"{type(error).__name__}: {error}".partition("\n")[0][:120]
        for a, e in zip(actual, self.expected, strict=True):
            apart = float((a.double() - e.double()).norm() / e.double().norm().clamp(min=1e-30))
            if not apart <= TOLERANCE[self.dtype]:
                return f"differs by {apart:.1e}"
        return ""

    def sweep(self, knob: Knob, quick: bool, left_s: Callable[[], float]) -> list[dict[str, Any]]:
        """A measurement for every arguments that the knob is asked with."""
        with recorded(knob) as seen:
            self.both()
        found = []
        for arguments, default in seen.items():
            tried: dict[str, dict[str, Any]] = {}
            best = default
            for _ in range(1 if quick else 2):
                options = list(candidates(knob, best).items())[: 2 if quick else MOST_CANDIDATES]
                options = [(label, value) for label, value in options if value != default]
                new = {label: value for label, value in options if label not in tried}
                if not new or left_s() < LEAST_S:
                    break
                measured = self.measure(knob, arguments, new, quick, left_s)
                tried |= measured
                faster = [label for label, m in tried.items() if m.get("proposed")]
                if not faster:
                    break
                label = max(faster, key=lambda name: tried[name]["gain"])
                if label not in new:
                    break
                best = new[label]
            found.append(
                {
                    "knob": knob.title,
                    "arguments": [str(a) for a in arguments],
                    "default": repr(default),
                    "tried": tried,
                }
            )
        return found

    def compile(self, knob: Knob) -> None:
        """Put the kernels of what `sweep` tries first into Triton's cache."""
        with recorded(knob) as seen:
            self.both()
        for arguments, default in seen.items():
            for value in [*candidates(knob, default).values()][:MOST_CANDIDATES]:
                if value != default:
                    self.fault(knob, answering(knob, arguments, value))

    def measure(
        self, knob: Knob, arguments: tuple[Any, ...], options: dict[str, Any], quick: bool,
        left_s: Callable[[], float],
    ) -> dict[str, dict[str, Any]]:  # fmt: skip
        found: dict[str, dict[str, Any]] = {}
        values: dict[str, Any] = {}
        for label, value in options.items():
            if left_s() < LEAST_S:
                found[label] = {"value": repr(value), "fault": "not reached"}
                continue
            answer = answering(knob, arguments, value)
            why = self.fault(knob, answer)
            if why:
                found[label] = {"value": repr(value), "fault": why}
            else:
                values[label] = answer
        if not values:
            return found
        original = getattr(knob.owner, knob.name)
        times: dict[str, dict[str, Timing]] = {}
        for direction, call in (("forward", self.forward), ("both", self.both)):
            variants = {
                label: self.variant(knob, call, v)
                for label, v in ({"default": original} | values).items()
            }
            times[direction] = interleaved(
                variants, rounds=2 if quick else 9, device=self.device, at_least_s=0.002, warm_up=2
            )
        for label in values:
            found[label] = {"value": repr(options[label]), **verdict(times, label)}
        return found


def compile_side_by_side(arguments: list[str], jobs: int, left_s: float) -> None:
    """Other processes of this program, which compile and time nothing; those that are late end."""
    command = [sys.executable, __file__, *arguments]
    running = [
        subprocess.Popen(
            [*command, "--compile-part", f"{part}/{jobs}"], stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL,
        )
        for part in range(jobs)
    ]  # fmt: skip
    ends = time.monotonic() + left_s
    try:
        for process in running:
            process.wait(max(0.0, ends - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for process in running:
            process.kill()
            process.wait()


def verdict(times: dict[str, dict[str, Timing]], label: str) -> dict[str, Any]:
    """Gain of forward and of both together, and whether it is beyond the spread."""
    result: dict[str, Any] = {}
    for direction, timings in times.items():
        default, mine = timings["default"], timings[label]
        result |= mine.values(direction) | default.values(f"default_{direction}")
    default, mine = times["both"]["default"], times["both"][label]
    first = times["forward"]
    clear = mine.high_s < default.low_s
    slower = first[label].low_s > first["default"].high_s
    result["gain"] = default.median_s / mine.median_s - 1
    result["proposed"] = clear and not slower
    return result


def markdown(document: dict[str, Any]) -> str:
    lines = [f"# Launch choices on {document['machine']['device']}", ""]
    if document["stand_in"]:
        lines += ["A trial in Triton's interpreter: the times say nothing about a GPU.", ""]
    lines += [f"Commit {document['commit']}. Nothing was changed; a commit decides.", ""]
    lines += ["| operator | choice | asked with | default | proposal | default, us | proposal, us |"
              " gain |", "|---" * 8 + "|"]  # fmt: skip
    for case, sweeps in document["cases"].items():
        for sweep in sweeps:
            row = best_row(sweep)
            cells = [case, sweep["knob"], " ".join(sweep["arguments"]), sweep["default"], *row]
            lines.append("| " + " | ".join(f"`{c}`" if "(" in c else c for c in cells) + " |")
    if document["not_reached"]:
        lines += ["", f"Not reached: {', '.join(document['not_reached'])}."]
    return "\n".join(lines) + "\n"


def best_row(sweep: dict[str, Any]) -> list[str]:
    proposed = {k: m for k, m in sweep["tried"].items() if m.get("proposed")}
    if not proposed:
        measured = sum("gain" in m for m in sweep["tried"].values())
        return [f"keep ({measured} of {len(sweep['tried'])} tried ran)", "", "", ""]
    label = max(proposed, key=lambda name: proposed[name]["gain"])
    m = proposed[label]
    times = [f"{1e6 * m[key]:.1f}" for key in ("default_both_median_s", "both_median_s")]
    return [m["value"], *times, f"{m['gain']:.1%}"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Propose launch choices from measurements.")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--deadline-s", type=float, default=510.0)
    parser.add_argument("--operator", action="append", help="only this one; may be repeated")
    parser.add_argument("--stand-in", action="store_true", help="try it out where no GPU is")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="that compile")
    parser.add_argument("--compile-part", help=argparse.SUPPRESS)  # "K/N": of its own processes
    args = parser.parse_args(argv)
    if args.stand_in:
        if not _runtime.INTERPRET:
            parser.error("stand-in: expected TRITON_INTERPRET=1 in the environment, got none")
    elif not torch.cuda.is_available():
        parser.error("gpu: expected one that torch can use, got none")
    known = dict.fromkeys(operator for operator, _ in CASES)
    for name in args.operator or ():
        if name not in known:
            parser.error(f"operator: expected one of {', '.join(known)}, got {name!r}")
    device, size = ("cpu", TINY) if args.stand_in else ("cuda", FULL)
    ends = time.monotonic() + args.deadline_s
    args.output.mkdir(parents=True, exist_ok=True)
    stem = args.output / f"tune-{evidence.slug(evidence.device_name())}"
    about = evidence.describe()
    path = stem.with_suffix(".json")
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = all(earlier.get(key) == about[key] for key in ("source", "machine", "versions"))
    cases: dict[str, list[dict[str, Any]]] = earlier["cases"] if same else {}
    wanted = [c for c in CASES if not args.operator or c[0] in args.operator]
    pending = [
        (operator, case, knob)
        for operator, case in wanted
        for knob in KNOBS
        if operator in knob.operators
        and knob.title not in {s["knob"] for s in cases.get(f"{operator} {case}".strip(), ())}
    ]

    def save() -> None:
        left = [f"{operator} {case} {knob.title}" for operator, case, knob in pending[number:]]
        document = {**about, "stand_in": args.stand_in, "cases": cases, "not_reached": left}
        evidence.write_json(path, document)
        stem.with_suffix(".md").write_text(markdown(document), encoding="utf-8")

    if args.compile_part:
        part, parts = map(int, args.compile_part.split("/"))
        for operator, case, knob in pending[part::parts]:
            Tuner(operator, case, device, size).compile(knob)
        return 0
    if pending and args.jobs > 1 and not args.stand_in:
        own = sys.argv[1:] if argv is None else argv
        compile_side_by_side(own, args.jobs, args.deadline_s * SHARE_TO_COMPILE)
    number, tuner, current = 0, None, ("", "")
    for number, (operator, case, knob) in enumerate(pending):  # noqa: B007
        if ends - time.monotonic() < LEAST_S:
            break
        if tuner is None or current != (operator, case):
            tuner, current = Tuner(operator, case, device, size), (operator, case)
        found = tuner.sweep(knob, args.stand_in, lambda: ends - time.monotonic())
        name = f"{operator} {case}".strip()
        cases.setdefault(name, []).extend(found)
        print(f"{name}: {knob.title}: " + "; ".join(best_row(s)[0] for s in found), flush=True)
        save()
    else:
        number = len(pending)
    save()
    print(f"{path}\n{stem.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or processes would outlive it
    os.environ.setdefault("TRITON_PRINT_AUTOTUNING", "0")
    sys.exit(main())
