"""What every measurement is filed with: the machine, the versions and the commit it came from.

A `Journal` writes each result as it comes, so an interrupted run keeps what it has, and the next
one goes on where the code, the machine and the versions are the same.
"""

import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from neobert.files import try_lock

SCHEMA = 1
PACKAGES = (
    "neobert-kernels",
    "torch",
    "triton",
    "transformers",
    "sentence-transformers",
    "numpy",
    "liger-kernel",
    "flash-attn",
)
ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("neobert_kernels", "neobert", "benchmarks", "tests/parity.py")
# Of what nvidia-smi tells: what decides the speed, and what only describes the moment.
GPU_FIELDS = ("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit")
STATE_EVERY_S = 20.0  # the program takes a while to answer
LOCK = ".lock"  # stays, empty
GPU_MOMENT = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "pstate")


def device_name() -> str:
    """The GPU's name where there is one, else the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        model = re.search(r"^model name\s*: (.+)$", cpuinfo.read_text(), re.MULTILINE)
        if model:
            return model[1].strip()
    return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A folder name: lower case, words joined by dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe() -> dict[str, Any]:
    """Machine, versions and commit, as they go into a results file."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    machine: dict[str, Any] = {
        "device": device_name(),
        "architecture": platform.machine(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        machine |= gpu_state(GPU_FIELDS)
        machine["driver"] = machine.pop("driver_version", "unknown")
        machine["cuda"] = torch.version.cuda
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "machine": machine,
        "versions": versions,
        "commit": commit(),
        "clean": clean(),
        "source": source(),
    }


def commit() -> str:
    """The checked-out commit; where there is no git, what the variable COMMIT says."""
    found = _output("git", "rev-parse", "HEAD")
    return os.environ.get("COMMIT", found) if found == "unknown" else found


def clean() -> bool:
    """Whether the tree is the commit's, but for results, which an earlier run has added to."""
    status = ("git", "status", "--porcelain", "--untracked-files=no")
    return _output(*status, "--", ".", ":(exclude)benchmarks/results") == ""


def source() -> str:
    """A digest of the code that was measured, changes that are not committed included."""
    digest = hashlib.sha256()
    for name in SOURCES:
        path = ROOT / name
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            digest.update(f"{file.relative_to(ROOT)}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def gpu_state(fields: Iterable[str] = GPU_MOMENT) -> dict[str, str]:
    """What nvidia-smi says of the first GPU; nothing where it is missing or refuses."""
    fields = tuple(fields)
    line = _output("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader")
    values = [value.strip() for value in line.partition("\n")[0].split(",")]
    return dict(zip(fields, values, strict=True)) if len(values) == len(fields) else {}


class Journal:
    """The results of one run in ``folder/<device>/<date>.json``, written after each of them.

    A file holds results of one machine, one set of versions, and full or quick runs alone; where
    the day's file has others, the next number is taken. Results of several commits may share it,
    and each says which it is from. ``resume``: what was measured from the same code, whatever the
    day, stays and is not measured again; what a deadline cut short is.

    Raises:
        ValueError: A file of the folder is no results file; the message names it.
    """

    def __init__(self, folder: Path, *, quick: bool = False, resume: bool = False) -> None:
        self.evidence = describe()
        self.date = _now().date().isoformat()
        self.quick, self.resume = quick, resume
        self._state: dict[str, str] = {}
        self._asked_at = float("-inf")
        self._held: BinaryIO | None = None
        self.path = self._own_file(folder / slug(device_name()))
        found = _read(self.path)
        self.results: list[dict[str, Any]] = found["results"] if found else []
        self.not_reached: list[str] = list(found.get("not_reached", [])) if found else []
        self.done = self._measured() if resume else set()

    def _own_file(self, folder: Path) -> Path:
        number = 1
        while True:
            suffix = "-quick" * self.quick + f"-{number}" * (number > 1)
            path = folder / f"{self.date}{suffix}.json"
            found = _read(path)
            if found is None or self._is_like(found):
                return path
            number += 1

    def _is_like(self, document: dict[str, Any]) -> bool:
        same = all(document.get(key) == self.evidence[key] for key in ("machine", "versions"))
        return same and bool(document.get("quick")) == self.quick

    def _measured(self) -> set[str]:
        """Benchmarks that the same code has finished here; a run may go on past midnight."""
        documents = (_read(path) for path in sorted(self.path.parent.glob("*.json")))
        return {
            result["item"]
            for document in documents
            if document and self._is_like(document)
            for result in document["results"]
            if result.get("source") == self.evidence["source"]
            and "item" in result
            and not result["values"].get("cut_short")
        }

    def hold(self) -> None:
        """Keep other runs out of the folder until this process ends, or `release`.

        Raises:
            OSError: Nothing can be written there.
            ValueError: Another run is at it.
        """
        folder = self.path.parent
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass  # now, and not after the first measurement
        self._held = try_lock(folder / LOCK)
        if self._held is None:
            raise ValueError(f"one run at a time in {folder}, got a second one")

    def release(self) -> None:
        if self._held is not None:
            self._held.close()
            self._held = None

    def reached(self, item: str, yes: bool = True) -> None:
        """Note whether there was time for a benchmark; those of earlier runs stay listed."""
        self.not_reached = [name for name in self.not_reached if name != item] + [item] * (not yes)

    def add(self, result: dict[str, Any]) -> None:
        """File one result in place of an older one of the same name, case and commit."""
        fresh = {**result, **{key: self.evidence[key] for key in ("commit", "clean", "source")}}
        fresh |= {"at": _now().isoformat(timespec="seconds"), "command": command()}
        if torch.cuda.is_available() and time.monotonic() - self._asked_at > STATE_EVERY_S:
            self._state, self._asked_at = gpu_state(), time.monotonic()
        if self._state:
            fresh["gpu"] = self._state
        same = ("name", "case", "commit")
        others = [r for r in self.results if any(r.get(key) != fresh[key] for key in same)]
        self.results = [*others, fresh]
        self.write()

    def write(self) -> None:
        document: dict[str, Any] = {
            "schema": SCHEMA,
            "date": self.date,
            "command": command(),
            **({"quick": True} if self.quick else {}),
            **self.evidence,
            **({"not_reached": self.not_reached} if self.not_reached else {}),
            "results": self.results,
        }
        write_json(self.path, document)


def write(folder: Path, results: list[dict[str, Any]]) -> Path:
    """Save ``results`` and return the path; see `Journal`."""
    journal = Journal(folder)
    for result in results:
        journal.add(result)
    return journal.path


def write_json(path: Path, document: Any) -> None:
    """Replace ``path`` at once, so that a kill leaves either the old or the new text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(document, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def command() -> str:
    """This process's, as a shell takes it; ``python -m`` names a module by its file."""
    name = Path(sys.argv[0])
    program = f"python -m {name.parent.name}" if name.name == "__main__.py" else name.name
    return " ".join([program, *map(shlex.quote, sys.argv[1:])])


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.timezone.utc)


def _read(path: Path) -> dict[str, Any] | None:
    """A results file; None where there is none.

    Raises:
        ValueError: It is something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("results"), list):
        raise ValueError(f"{path}: expected a results file, got other JSON")
    return document


def _output(*command: str) -> str:
    """What a command prints, or "unknown" where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
