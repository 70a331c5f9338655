"""Measure another commit and this one in turns, and say what became slower.

BASE=main python benchmarks/compare_commits.py --output build/gpu

The other commit is checked out beside this one, each runs its own benchmarks, and the turns
alternate, so that a machine that slows down slows both. A case is slower where its median is over
5 % above the other's and no quartile of any turn of the one reaches into those of the other.
``compare.md`` has the table, ``compare.json`` the numbers. Exit code 1 if a case is slower, if a
benchmark of this commit fails, or if there is nothing to compare.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evidence

ROOT = evidence.ROOT
LIMIT = 0.05
SUITES = (
    "attention",
    "rms_norm",
    "swiglu",
    "linear_cross_entropy",
    "layer_norm",
    "rope",
    "models",
    "training",
    "pooling",
    "info_nce",
    "linear",
    "fused_linear",
)


@dataclass(frozen=True)
class Side:
    """One case on one commit, over all its turns, in seconds or in tokens turned into seconds."""

    median_s: float
    low_s: float
    high_s: float


@dataclass(frozen=True)
class Row:
    name: str
    case: str
    base: Side
    head: Side

    @property
    def ratio(self) -> float:
        """How many times as long as before it takes."""
        return self.head.median_s / self.base.median_s

    @property
    def slower(self) -> bool:
        return self.ratio > 1 + LIMIT and self.head.low_s > self.base.high_s

    @property
    def faster(self) -> bool:
        return self.ratio < 1 - LIMIT and self.head.high_s < self.base.low_s


def times_of(values: dict[str, Any]) -> Side | None:
    """Seconds of ours in one result; of a throughput, seconds per token."""
    for name in ("ours", "patched"):
        if f"{name}_median_s" in values:
            return Side(*(values[f"{name}_{key}"] for key in ("median_s", "low_s", "high_s")))
    keys = [f"patched_{k}tokens_per_s" for k in ("", "high_", "low_")]
    if all(values.get(key) for key in keys):
        return Side(*(1 / values[key] for key in keys))
    return None


def together(turns: list[Side]) -> Side:
    return Side(
        statistics.median(t.median_s for t in turns),
        min(t.low_s for t in turns),
        max(t.high_s for t in turns),
    )


def read(folder: Path) -> dict[tuple[str, str], Side]:
    """Our times of every case in one turn's results."""
    found = {}
    for path in folder.glob("*/*.json"):
        for result in json.loads(path.read_text(encoding="utf-8"))["results"]:
            side = times_of(result["values"])
            if side is not None:
                found[result["name"], result["case"]] = side
    return found


def rows(base: list[Path], head: list[Path]) -> list[Row]:
    """Cases that every turn of both measured."""
    turns = {"base": [read(path) for path in base], "head": [read(path) for path in head]}
    shared = [
        key
        for key in turns["head"][0]
        if all(key in found for side in turns.values() for found in side)
    ]
    return [
        Row(*key, *(together([found[key] for found in turns[side]]) for side in ("base", "head")))
        for key in shared
    ]


def markdown(found: list[Row], base: str, head: str, notes: list[str]) -> str:
    lines = [f"### Benchmarks: {head[:10]} against {base[:10]}", ""]
    changed = [row for row in found if row.slower or row.faster]
    slower = sum(row.slower for row in found)
    lines.append(
        f"{len(found)} cases on {evidence.device_name()}: {slower} slower by over {LIMIT:.0%} "
        f"beyond the spread, {len(changed) - slower} faster, {len(found) - len(changed)} the same."
    )
    lines += ["", *notes]
    for title, group in (("Changed", changed), ("All", found)):
        if not group:
            continue
        table = ["| case | before | now | time, now / before |", "|---|---|---|---|"]
        for row in sorted(group, key=lambda r: -r.ratio):
            mark = " **slower**" if row.slower else " faster" if row.faster else ""
            times = " | ".join(f"{1e6 * side.median_s:.4g} us" for side in (row.base, row.head))
            table.append(f"| {row.name}: {row.case} | {times} | {row.ratio:.3f}{mark} |")
        if title == "All":
            table = ["<details><summary>All cases</summary>", "", *table, "", "</details>"]
        lines += ["", *table]
    return "\n".join(lines) + "\n"


def suites(checkout: Path) -> list[str]:
    """Those of `SUITES` that are there: an older commit lacks some, and its pytest refuses them."""
    return [name for name in SUITES if (checkout / "benchmarks" / f"bench_{name}.py").exists()]


def measure(checkout: Path, results: Path, seconds: float, quick: bool) -> str:
    """Run the benchmarks of one checkout; what went wrong, if anything did."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q"]
    command += ["-p", "no:cacheprovider", "--results", str(results)]
    command += [part for suite in suites(checkout) for part in ("--suite", suite)]
    command += ["--deadline-s", str(seconds)] + ["--quick"] * quick
    others = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p != str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(checkout), *others])}
    done = subprocess.run(
        command, cwd=checkout, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    if done.returncode in (0, 1) and list(results.glob("*/*.json")):
        return "" if done.returncode == 0 else "some benchmarks failed"
    return done.stdout.strip().rpartition("\n")[2][:200] or f"exit code {done.returncode}"


def check_out(commit: str, folder: Path) -> None:
    """``commit`` in a worktree of its own.

    Raises:
        ValueError: There is no such commit.
    """
    known = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    if known.returncode:
        raise ValueError(f"BASE: expected a commit of this repository, got {commit!r}")
    drop(folder)
    subprocess.run(
        ["git", "worktree", "add", "--detach", "--force", str(folder), known.stdout.strip()],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip


def drop(folder: Path) -> None:
    subprocess.run(
        ["git", "worktree", "remove", "--force", str(folder)], cwd=ROOT, capture_output=True
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure BASE and this commit in turns.")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--base", default=os.environ.get("BASE", "origin/main"))
    parser.add_argument("--deadline-s", type=float, default=2400.0)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="does it run, not how fast")
    args = parser.parse_args(argv)
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    checkout = output / "base"
    try:
        check_out(args.base, checkout)
    except ValueError as error:
        parser.error(str(error))
    ends = time.monotonic() + args.deadline_s
    turns: dict[str, list[Path]] = {"base": [], "head": []}
    notes = []
    try:
        base = evidence._output("git", "rev-parse", args.base)
        for number in range(args.turns):
            for side, where in (("base", checkout), ("head", ROOT)):
                left = 2 * (args.turns - number) - (side == "head")
                results = output / f"turn-{number}-{side}-{os.getpid()}"
                seconds = (ends - time.monotonic()) / left
                wrong = measure(where, results, seconds, args.quick)
                notes += [f"{side}, turn {number + 1}: {wrong}."] * bool(wrong)
                turns[side].append(results)
    finally:
        drop(checkout)
    found = rows(turns["base"], turns["head"])
    text = markdown(found, base, evidence.commit(), notes)
    (output / "compare.md").write_text(text, encoding="utf-8")
    evidence.write_json(
        output / "compare.json",
        [{**row.__dict__, "base": row.base.__dict__, "head": row.head.__dict__} for row in found],
    )
    print(text)
    return verdict(found, notes)


def verdict(found: list[Row], notes: list[str]) -> int:
    """The exit code; what could not be compared is no pass."""
    if not found:
        print("compare: expected a case that every turn measured, got none", file=sys.stderr)
    failed = any(note.startswith("head") for note in notes)
    return 1 if failed or not found or any(row.slower for row in found) else 0


if __name__ == "__main__":
    sys.exit(main())
