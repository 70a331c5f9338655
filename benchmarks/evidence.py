"""What every measurement is filed with: the machine, the versions and the commit it came from."""

import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

SCHEMA = 1
PACKAGES = ("neobert-kernels", "torch", "triton", "transformers", "sentence-transformers", "numpy")
ROOT = Path(__file__).resolve().parent.parent


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
        machine["driver"] = _output(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
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
        "commit": _output("git", "rev-parse", "HEAD"),
        "clean": _output("git", "status", "--porcelain", "--untracked-files=no") == "",
    }


def write(folder: Path, results: list[dict[str, Any]]) -> Path:
    """Save ``results`` as ``folder/<device>/<date>.json`` and return the path.

    A second run on one day adds to the first one's file where it measured something else, and
    replaces what it measured again.
    """
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    path = folder / slug(device_name()) / f"{date}.json"
    evidence = describe()
    fresh = [
        {**result, "commit": evidence["commit"], "clean": evidence["clean"]} for result in results
    ]
    measured = {(r["name"], r["case"]) for r in fresh}
    if path.exists():
        earlier = json.loads(path.read_text(encoding="utf-8"))["results"]
        fresh = [r for r in earlier if (r["name"], r["case"]) not in measured] + fresh
    document = {"schema": SCHEMA, "date": date, **evidence, "results": fresh}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(document, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    return path


def _output(*command: str) -> str:
    """What a command prints, or "unknown" where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
