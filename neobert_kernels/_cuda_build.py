"""Compile ``csrc/`` to one shared library: by ``setup.py``, on request, or for tests on a CPU.

Nothing but the standard library, because a build has no torch to import: its headers are enough.
The extension uses PyTorch's stable ABI as of 2.11, so it runs with that version and all later ones,
whichever brought the headers.
"""

import hashlib
import importlib.machinery
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

NAME = "neobert_cuda.so"
SMS = (80, 90, 100)
OLDEST_TORCH = (2, 11)
KERNELS = ("norm.cu", "gated.cu", "rope.cu", "pool.cu", "runtime.cu")
OPERATORS = "extension.cpp"
# The library says of itself what it was made from, and is believed before it is loaded.
ABOUT = re.compile(rb"neobert-cuda-extension\{source=(\w+) sm=([\d,]*)\}")
ERROR = re.compile(r"\berror\b", re.IGNORECASE)  # not AOTITorchError, in a line that says where
FLAGS = ("-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL")
SEEN = ("-fPIC", "-fvisibility=hidden")  # what a shared library needs, and no more of it exported
PACKAGE = Path(__file__).resolve().parent


class BuildError(RuntimeError):
    """One line: what is missing, or which command failed with which words."""


@dataclass(frozen=True)
class Compiler:
    """An nvcc, its version, and the folder with the static CUDA runtime."""

    nvcc: Path
    version: tuple[int, ...]
    libraries: Path


def sources() -> Path:
    """The folder of the sources: beside the package in a checkout, inside it where installed."""
    for folder in (PACKAGE / "csrc", PACKAGE.parent / "csrc"):
        if (folder / OPERATORS).exists():
            return folder
    raise BuildError(f"csrc: expected the sources in {PACKAGE / 'csrc'}, got none")


def fingerprint() -> str:
    """Changes with the sources and with how they are compiled."""
    digest = hashlib.sha256(repr((FLAGS, SEEN)).encode())
    for path in sorted(sources().iterdir()):
        if path.suffix in (".cu", ".cpp", ".h"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def about(path: Path) -> tuple[str, tuple[int, ...]] | None:
    """The fingerprint and GPU generations in a built library; None in any other file."""
    found = ABOUT.search(path.read_bytes())
    if found is None:
        return None
    return found[1].decode(), tuple(int(sm) for sm in found[2].decode().split(",") if sm)


def sealed(library: bytes) -> bytes:
    """A library with its SHA-256 behind its end, where no loader looks."""
    return library + b"neobert-sha256{%s}" % hashlib.sha256(library).hexdigest().encode()


def is_intact(path: Path) -> bool:
    """Whether a library is byte for byte what was built."""
    content = path.read_bytes()
    return content == sealed(content[: -len(sealed(b""))])


def site_packages() -> list[str]:
    """Of the interpreter, whatever a build's isolation has taken off ``sys.path``."""
    return list(dict.fromkeys(sysconfig.get_paths()[key] for key in ("purelib", "platlib")))


def torch_folder() -> Path:
    """The installed torch, which is not imported.

    Raises:
        BuildError: There is none, or one without the stable ABI of 2.11.
    """
    spec = importlib.machinery.PathFinder.find_spec("torch", site_packages())
    if spec is None:  # not where this interpreter installs: wherever it imports from
        spec = importlib.machinery.PathFinder.find_spec("torch")
    if spec is None or spec.origin is None:
        raise BuildError("torch: expected to be installed before the CUDA extension is built")
    folder = Path(spec.origin).parent
    version = folder / "include/torch/headeronly/version.h"
    text = version.read_text(encoding="utf-8") if version.exists() else ""
    numbers = re.findall(r"define TORCH_VERSION_(?:MAJOR|MINOR) (\d+)", text)
    if tuple(map(int, numbers)) < OLDEST_TORCH:
        raise BuildError(
            f"torch: expected 2.11 or newer, got {'.'.join(numbers) or 'older headers'}"
        )
    return folder


def find_compiler() -> Compiler:
    """nvcc of ``CUDA_HOME``, of ``PATH``, of pip's ``nvidia-cuda-nvcc``, or of ``/usr/local/cuda``.

    Raises:
        BuildError: There is none, or one without its runtime library.
    """
    homes = [os.environ[key] for key in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(key)]
    found = [Path(home) / "bin/nvcc" for home in homes]
    if not found:
        on_path = shutil.which("nvcc")
        found = [Path(on_path)] if on_path else []
        for folder in map(Path, site_packages()):
            found += sorted(folder.glob("nvidia/cu*/bin/nvcc"), reverse=True)
        found.append(Path("/usr/local/cuda/bin/nvcc"))
    for nvcc in found:
        if nvcc.is_file():
            return _compiler(nvcc)
    got = f"none in {' or '.join(homes)}, which is looked at alone" if homes else "none"
    raise BuildError(
        "nvcc: expected one in CUDA_HOME (if that is set), or else in PATH or from pip install "
        f"'nvidia-cuda-nvcc', got {got}"
    )


def _compiler(nvcc: Path) -> Compiler:
    listing = _run([nvcc, "--dryrun", "-x", "cu", "-"])  # says where it lives, behind any wrapper
    top = re.search(r"TOP=(\S+)", listing)
    release = re.search(r"release (\d+)\.(\d+)", _run([nvcc, "--version"]))
    if top is None or release is None:
        raise BuildError(f"nvcc: expected NVIDIA's compiler, got {nvcc}")
    for folder in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"):
        if (Path(top[1]) / folder / "libcudart_static.a").exists():
            version = tuple(map(int, release.groups()))
            return Compiler(nvcc, version, (Path(top[1]) / folder).resolve())
    raise BuildError(f"nvcc: expected libcudart_static.a beside it, got none in {top[1]}")


def generations(compiler: Compiler, sms: Sequence[int]) -> list[int]:
    """Those of ``sms`` that the compiler knows, in order.

    Raises:
        BuildError: It knows none of them.
    """
    known = set(map(int, re.findall(r"compute_(\d+)\b", _run([compiler.nvcc, "--list-gpu-arch"]))))
    chosen = [sm for sm in sorted(set(sms)) if sm in known]
    if not chosen:
        release = ".".join(map(str, compiler.version))
        raise BuildError(f"sm: expected generations that nvcc {release} knows, got {list(sms)}")
    return chosen


def build(output: Path, sms: Sequence[int] = SMS) -> Path:
    """Compile everything and put the library at ``output``, whole or not at all.

    Its machine code is of the generations ``sms``, and of the last one there is PTX too, which the
    driver compiles for the generations that follow.

    Raises:
        BuildError: Something is missing or does not compile.
    """
    compiler = find_compiler()
    chosen = generations(compiler, sms)
    codes = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in chosen]
    codes.append(f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}")
    nvcc: list[str | Path] = [compiler.nvcc, *FLAGS, *codes, f"-Xcompiler={','.join(SEEN)}", "-c"]

    def link(folder: Path, objects: list[Path], torch: Path) -> list[str | Path]:
        # A name is all that the linker needs of libtorch_cuda, and a CPU's torch has none.
        (folder / "stub.c").touch()
        _run([cxx(), "-shared", "-Wl,-soname,libtorch_cuda.so", "-o", folder / "libtorch_cuda.so",
              folder / "stub.c"])  # fmt: skip
        return [
            cxx(), "-shared", *objects, f"-L{folder}", f"-L{torch / 'lib'}", "-Wl,--no-as-needed",
            "-ltorch_cuda", "-ltorch_cpu", "-Wl,--as-needed", f"-L{compiler.libraries}",
            "-lcudart_static", "-lrt", "-lpthread", "-ldl", "-Wl,--allow-shlib-undefined",
        ]  # fmt: skip

    return _make(output, nvcc, ["-DUSE_CUDA"], chosen, link)


def build_for_cpu(output: Path) -> Path:
    """The same sources for a CPU, as operators of ``neobert_on_host``: what the tests check.

    Raises:
        BuildError: There is no C++ compiler or no torch, or something does not compile.
    """
    options = ["-DNEOBERT_ON_HOST", "-DNEOBERT_NAMESPACE=neobert_on_host", "-DNEOBERT_KEY=CPU"]

    def link(folder: Path, objects: list[Path], torch: Path) -> list[str | Path]:
        return [cxx(), "-shared", *objects, f"-L{torch / 'lib'}", "-ltorch_cpu", "-Wl,-z,defs"]

    kernels = [cxx(), *FLAGS, "-O1", *SEEN, "-Wno-unknown-pragmas", *options, "-x", "c++", "-c"]
    return _make(output, kernels, options, [], link)


def cxx() -> str:
    found = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if not found:
        raise BuildError("c++: expected a C++17 compiler in CXX or PATH, got none")
    return found


Link = Callable[[Path, list[Path], Path], list[str | Path]]


def _make(
    output: Path, kernels: Sequence[str | Path], options: list[str], sms: list[int], link: Link
) -> Path:
    torch = torch_folder()
    names = f"source={fingerprint()} sm={','.join(map(str, sms))}"
    operators = [
        cxx(), *FLAGS, *SEEN, "-Wall", "-Wextra", *options, f'-DNEOBERT_ABOUT="{names}"',
        "-isystem", torch / "include", "-c",
    ]  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as name:
        folder = Path(name)
        objects = [folder / f"{source}.o" for source in (*KERNELS, OPERATORS)]
        commands = [
            [*(operators if source == OPERATORS else kernels), sources() / source, "-o", made]
            for source, made in zip((*KERNELS, OPERATORS), objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        _run([*link(folder, objects, torch), "-o", folder / NAME])
        (folder / NAME).write_bytes(sealed((folder / NAME).read_bytes()))
        (folder / NAME).replace(output)
    return output


def _run(command: Sequence[str | Path]) -> str:
    """What a command printed, to either stream."""
    try:
        done = subprocess.run(
            list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
    except OSError as error:
        raise BuildError(f"{command[0]}: expected to run, got {error}") from None
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if ERROR.search(line)]
        why = (lines or done.stdout.strip().splitlines() or ["no output"])[0]
        raise BuildError(f"{Path(command[0]).name}: exit code {done.returncode}, {why.strip()}")
    return done.stdout
