"""Every check that needs a GPU, most important first, within a number of seconds.

python benchmarks/gpu_test.py --output build/gpu

Stages are processes of their own; each ends by the deadline, and what was not reached is listed.
``gpu-test.json`` in the output folder is rewritten after every stage, ``gpu-test.log`` has what
they printed. A second run goes on with the stages that the same code has not passed yet. The exit
code is 1 if a stage failed and 0 otherwise, also where some were not reached.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evidence
import torch

ROOT = evidence.ROOT
LEAST_S = 15.0  # a stage is not begun with less time than this
MOST_LOG_BYTES = 12 << 20
MODELS = {
    "model": "tests/model",
    "patch": "tests/patch",
    "encode": "tests/encode",
    "libraries": "tests/libraries",
}
REFUSED = re.compile(
    r"Device not supported|LibraryNotLoaded|does not support|nvcc: expected", re.IGNORECASE
)


@dataclass(frozen=True)
class Stage:
    """A process that passes with exit code 0; one that is not ``needed`` may be absent here."""

    name: str
    command: tuple[str, ...]
    needed: bool = True


def stages(jobs: int, repeats: int, stand_in: bool) -> list[Stage]:
    """In order of importance. ``stand_in``: what of them a CPU can show, in the interpreter."""
    python = sys.executable
    pytest = (python, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider")
    side_by_side = ("-n", str(jobs), "--dist", "worksteal") if jobs > 1 else ()
    sanitized = (python, "benchmarks/gpu_sanitize.py")
    few = ("tests/kernels/test_rms_norm.py",) if stand_in else ("tests/kernels",)
    rest = {"models": "tests/project/test_cost.py"} if stand_in else MODELS
    often = ("-k", "rope") if stand_in else ()
    # Before the sanitizers, which watch what it has built.
    extension = Stage(
        "extension",
        (python, "benchmarks/gpu_extension.py", *pytest[3:], *side_by_side, "-m", "not aot"),
        needed=False,
    )
    return [
        Stage("doctor", (python, "-m", "neobert", "doctor")),
        Stage("parity", (*pytest, *side_by_side, *few, "-m", "not aot", "-k", "not to_the_31")),
        Stage(
            "determinism",
            (*pytest, "tests/kernels/test_determinism.py", "--repeats", str(repeats), *often),
        ),
        *(() if stand_in else (extension,)),
        Stage("over 2^31 elements", (*pytest, *few, "-m", "not aot", "-k", "to_the_31")),
        *(
            Stage(
                tool,
                ("compute-sanitizer", "--tool", tool, "--error-exitcode", "86", *sanitized),
                needed=False,
            )
            for tool in ("memcheck", "racecheck")
        ),
        *(Stage(name, (*pytest, *side_by_side, folder)) for name, folder in rest.items()),
    ]


def run(stage: Stage, log: Any, timeout_s: float) -> dict[str, Any]:
    """What became of one stage: passed, failed, out of time, or absent with the reason."""
    if shutil.which(stage.command[0]) is None:
        return {"outcome": "absent", "reason": f"{stage.command[0]} is not installed"}
    log.write(f"\n===== {stage.name}: {' '.join(stage.command)}\n")
    log.flush()
    at = log.tell()
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    began = time.monotonic()
    # A session of its own, so that its workers end with it.
    process = subprocess.Popen(
        stage.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log,
        stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip
    try:
        code: int | None = process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        code = None
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    seconds = round(time.monotonic() - began, 1)
    log.flush()
    text = tail(Path(log.name), at)
    outcome = {None: "out of time", 0: "passed", 5: "no test ran"}.get(code, "failed")
    if not stage.needed and outcome == "failed" and REFUSED.search(text):
        return {"outcome": "absent", "reason": "the machine refuses it", "seconds": seconds}
    return {"outcome": outcome, "exit_code": code, "seconds": seconds, "summary": last_line(text)}


def tail(path: Path, at: int, most: int = 200_000) -> str:
    with path.open("rb") as file:
        file.seek(max(at, path.stat().st_size - most))
        return file.read().decode("utf-8", "replace")


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Every check that needs a GPU.")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--deadline-s", type=float, default=510.0)
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--stand-in", action="store_true", help="try it out where no GPU is")
    args = parser.parse_args(argv)
    if args.stand_in:
        os.environ["TRITON_INTERPRET"] = "1"
    elif not torch.cuda.is_available():
        parser.error("gpu: expected one that torch can use, got none")
    ends = time.monotonic() + args.deadline_s
    args.output.mkdir(parents=True, exist_ok=True)
    report, log_path = args.output / "gpu-test.json", args.output / "gpu-test.log"
    about = evidence.describe()
    earlier = json.loads(report.read_text(encoding="utf-8")) if report.exists() else {}
    same = all(earlier.get(key) == about[key] for key in ("source", "machine", "versions"))
    done: dict[str, Any] = earlier["stages"] if same else {}
    done = {name: result for name, result in done.items() if result["outcome"] == "passed"}
    found: dict[str, Any] = {}
    listed = stages(args.jobs, args.repeats, args.stand_in)

    def save() -> None:
        left = [stage.name for stage in listed if stage.name not in found]
        evidence.write_json(report, {**about, "stages": found, "not_reached": left})

    with log_path.open("w", encoding="utf-8") as log:
        for stage in listed:
            left_s = ends - time.monotonic()
            if stage.name in done:
                found[stage.name] = done[stage.name] | {"resumed": True}
            elif left_s < LEAST_S:
                break
            else:
                found[stage.name] = run(stage, log, left_s)
            print(f"{stage.name}: {shown(found[stage.name])}", flush=True)
            save()
    save()
    for stage in listed:
        if stage.name not in found:
            print(f"{stage.name}: not reached in {args.deadline_s:.0f} s")
    shorten(log_path)
    bad = [name for name, result in found.items() if result["outcome"] in BAD]
    if bad:
        print(f"failed: {', '.join(bad)}; see {log_path}", file=sys.stderr)
    return 1 if bad else 0


BAD = ("failed", "no test ran")


def shown(result: dict[str, Any]) -> str:
    rest = result.get("reason") or result.get("summary", "")
    return f"{result['outcome']} ({result.get('seconds', 0)} s) {rest}".strip()


def shorten(path: Path) -> None:
    """Keep the end of a log that grew past what may come back from a lent machine."""
    if path.stat().st_size > MOST_LOG_BYTES:
        path.write_text(tail(path, 0, MOST_LOG_BYTES), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
