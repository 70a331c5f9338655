"""Every check that needs a GPU, most important first, within a number of seconds.

python benchmarks/gpu_test.py --output build/gpu

Stages are processes of their own, several at a time where there are cores for it: most of a test is
the compiler's time. Each ends by the deadline, and what was not reached is listed.
``gpu-test.json`` in the output folder is rewritten after every stage, ``gpu-test.log`` has what
they printed. A second run goes on with the stages that the same code has not passed yet. The exit
code is 1 if a stage failed and 0 otherwise, also where some were not reached.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import evidence
import torch

ROOT = evidence.ROOT
LEAST_S = 15.0  # a stage is not begun with less time than this
CORES_OF_A_LANE = 4
MOST_LOG_BYTES, MOST_OF_A_STAGE = 12 << 20, 2 << 20
MODELS = {
    "model": "tests/model",
    "encode": "tests/encode",
    "libraries": "tests/libraries",
}
REFUSED = re.compile(
    r"Device not supported|LibraryNotLoaded|does not support|nvcc: expected", re.IGNORECASE
)


@dataclass(frozen=True)
class Stage:
    """A process that passes with exit code 0.

    Attributes:
        needed: If not, it may be absent here.
        after: The stage that has to have ended before, whatever came of it.
    """

    name: str
    command: tuple[str, ...]
    needed: bool = True
    after: str = "doctor"


def stages(jobs: int, repeats: int, stand_in: bool) -> list[Stage]:
    """In order of importance. ``stand_in``: what of them a CPU can show, in the interpreter."""
    python = sys.executable
    pytest = (python, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider")

    def on(workers: int) -> tuple[str, ...]:
        return ("-n", str(workers), "--dist", "worksteal") if workers > 1 else ()

    half = (jobs + 1) // 2
    sanitized = (python, "benchmarks/gpu_sanitize.py")
    few = ("tests/kernels/test_rms_norm.py",) if stand_in else ("tests/kernels",)
    rest = {"models": "tests/project/test_cost.py"} if stand_in else MODELS
    often = ("-k", "rope") if stand_in else ()
    parity = (*pytest, *on(jobs), *few, "-m", "not aot", "-k", "not to_the_31")
    extension = (python, "benchmarks/gpu_extension.py", *pytest[3:], *on(half), "-m", "not aot")
    determinism = (*pytest, "tests/kernels/test_determinism.py", "--repeats", str(repeats), *often)
    return [
        Stage("doctor", (python, "-m", "neobert", "doctor"), after=""),
        Stage("parity", parity),
        *(
            ()
            if stand_in
            else (
                Stage("patch", (*pytest, *on(half), "tests/patch")),
                Stage("extension", extension, needed=False),
            )
        ),
        Stage("determinism", determinism),
        Stage("over 2^31 elements", (*pytest, *few, "-m", "not aot", "-k", "to_the_31")),
        *(
            Stage(
                tool,
                ("compute-sanitizer", "--tool", tool, "--error-exitcode", "86", *sanitized),
                needed=False,
                after="extension",  # they watch what it has built
            )
            for tool in ("memcheck", "racecheck")
        ),
        *(Stage(name, (*pytest, *on(half), folder)) for name, folder in rest.items()),
    ]


class Runner:
    """Runs stages, each in a session of its own, so that its workers end with it."""

    def __init__(self, output: Path, log: Path) -> None:
        self.output, self.log = output, log
        self.running: set[subprocess.Popen[bytes]] = set()
        self.stopped = False
        self.lock = threading.Lock()

    def run(self, stage: Stage, timeout_s: float) -> dict[str, Any]:
        """What became of one stage: passed, failed, out of time, or absent with the reason."""
        if shutil.which(stage.command[0]) is None:
            return {"outcome": "absent", "reason": f"{stage.command[0]} is not installed"}
        part = self.output / f"gpu-test-{stage.name.replace(' ', '-').replace('^', '')}.part"
        began = time.monotonic()
        with part.open("wb") as printed:
            code = self._exit_code(stage, printed, timeout_s)
        seconds = round(time.monotonic() - began, 1)
        text = tail(part, MOST_OF_A_STAGE)
        with self.lock, self.log.open("a", encoding="utf-8") as log:
            log.write(f"\n===== {stage.name}: {' '.join(stage.command)}\n{text}")
        part.unlink()
        outcome = {None: "out of time", 0: "passed", 5: "no test ran"}.get(code, "failed")
        if not stage.needed and outcome == "failed" and REFUSED.search(text):
            return {"outcome": "absent", "reason": "the machine refuses it", "seconds": seconds}
        found = {"outcome": outcome, "exit_code": code, "seconds": seconds}
        return found | {"summary": last_line(text)}

    def _exit_code(self, stage: Stage, printed: Any, timeout_s: float) -> int | None:
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONUNBUFFERED": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=printed,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        with self.lock:
            self.running.add(process)
            late = self.stopped
        try:
            if late:
                return None
            return process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _kill(process)
            self.running.discard(process)

    def stop(self) -> None:
        """End what runs, and what is about to."""
        with self.lock:
            self.stopped, running = True, list(self.running)
        for process in running:
            _kill(process)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(
    listed: list[Stage], found: dict[str, Any], run: Callable[[Stage, float], dict[str, Any]],
    lanes: int, ends: float, ended: Callable[[Stage], None], stop: Callable[[], None],
) -> None:  # fmt: skip
    """Run what is not in ``found``, in order, ``lanes`` at a time, as long as there is time.

    ``ended`` is told of each; ``stop`` ends those that run, where one raises.
    """
    names = {stage.name for stage in listed}
    waiting = [stage for stage in listed if stage.name not in found]
    change = threading.Condition()
    broken: list[BaseException] = []

    def next_stage() -> Stage | None:
        while waiting and not broken and ends - time.monotonic() >= LEAST_S:
            for stage in waiting:
                if stage.after not in names or stage.after in found:
                    waiting.remove(stage)
                    return stage
            change.wait(0.2)
        return None

    def lane() -> None:
        while True:
            with change:
                stage = next_stage()
            if stage is None:
                return
            try:
                result = run(stage, ends - time.monotonic())
                with change:
                    if broken:
                        return  # it was stopped, and failed at nothing
                    found[stage.name] = result
                    ended(stage)
                    change.notify_all()
            except BaseException as error:
                broken.append(error)
                stop()
                raise

    with ThreadPoolExecutor(lanes) as pool:
        try:
            for future in [pool.submit(lane) for _ in range(lanes)]:
                future.result()
        except BaseException as error:
            broken.append(error)
            stop()
            raise


def tail(path: Path, most: int) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - most))
        return file.read().decode("utf-8", "replace")


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Every check that needs a GPU.")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--deadline-s", type=float, default=510.0)
    cores = os.cpu_count() or 1
    parser.add_argument("--jobs", type=int, default=max(1, min(8, cores // 2)))
    parser.add_argument("--lanes", type=int, default=max(1, cores // CORES_OF_A_LANE))
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
    listed = stages(args.jobs, args.repeats, args.stand_in)
    found = {
        stage.name: done[stage.name] | {"resumed": True} for stage in listed if stage.name in done
    }

    def save() -> None:
        left = [stage.name for stage in listed if stage.name not in found]
        evidence.write_json(report, {**about, "stages": found, "not_reached": left})

    def ended(stage: Stage) -> None:
        print(f"{stage.name}: {shown(found[stage.name])}", flush=True)
        save()

    for stage in listed:
        if stage.name in found:
            ended(stage)
    log_path.write_text("", encoding="utf-8")
    runner = Runner(args.output, log_path)
    run_all(listed, found, runner.run, args.lanes, ends, ended, runner.stop)
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
        path.write_text(tail(path, MOST_LOG_BYTES), encoding="utf-8")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or stages would outlive it
    sys.exit(main())
