"""The CUDA extension is found, checked before it is loaded, refused with a reason, and reported.

No GPU and no nvcc: libraries are stand-ins, and torch's word that there is a GPU is one too.
"""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import neobert_kernels as nk
from neobert_kernels import _cuda_aot, _cuda_build, _runtime, _triton, aot, cuda

CXX = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
needs_compiler = pytest.mark.skipif(CXX is None, reason="no C++ compiler")
GOOD = f"neobert-cuda-extension{{source={_cuda_build.fingerprint()} sm=80,90}}"
WHOLE = """
    extern "C" unsigned neobert_chosen;
    unsigned neobert_chosen = 0;
    extern "C" const char* neobert_cuda_refused() { return nullptr; }
    extern "C" void neobert_cuda_choose(unsigned bits) { neobert_chosen = bits; }
    extern "C" unsigned long neobert_cuda_taken() { return 7; }
"""
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the extension is for Linux")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process that has decided nothing, an empty cache, and a GPU by torch's word."""
    monkeypatch.setattr(cuda, "_state", cuda._State())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(_cuda_build, "PACKAGE", tmp_path / "package")
    monkeypatch.setattr(_cuda_build, "sources", lambda: Path(__file__).parents[2] / "csrc")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "_register_alternatives", lambda: None)
    monkeypatch.delenv(cuda.SWITCH, raising=False)


def put(content: bytes) -> Path:
    path = cuda._cached()
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return path


def compiled(tmp_path: Path, code: str, about: str = GOOD) -> Path:
    """A library at the place of the extension."""
    source = tmp_path / "stand_in.cpp"
    mark = f'extern "C" __attribute__((used)) const char about[] = "{about}";'
    source.write_text(textwrap.dedent(code) + mark, encoding="utf-8")
    path = put(b"")
    command = [str(CXX), "-shared", "-fPIC", "-o", str(path), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    path.write_bytes(_cuda_build.sealed(path.read_bytes()))
    return path


def test_nothing_is_built() -> None:
    assert cuda.status() == "not built (neobert doctor --build)"
    assert cuda.chosen() == frozenset()
    assert nk.implementation("rope", "cuda") in ("triton", "reference")
    with pytest.raises(RuntimeError, match="not built"):
        cuda.use("rope")
    assert cuda.chosen() == frozenset()
    cuda.use()  # asks for nothing, so nothing is missing


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not a whole build of csrc/"),
        (b"#!/bin/sh\nexit 1\n", "is not a whole build of csrc/"),
        (b"\x7fELF" + bytes(100), "is not a whole build of csrc/"),
        (GOOD.encode()[:30], "is not a whole build of csrc/"),
        (GOOD.replace("source=", "source=0").encode(), "was built from other sources"),
        (GOOD.encode(), "is damaged; build it again"),
        (_cuda_build.sealed(GOOD.encode()), "refused: .*(too short|invalid ELF|file)"),
    ],
    ids=["empty", "a script", "half an ELF", "half a mark", "other sources", "bare", "only a mark"],
)
def test_a_wrong_file_is_refused(
    content: bytes, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(content)
    with pytest.raises(RuntimeError, match=reason) as caught:
        cuda.use("rope")
    assert "\n" not in str(caught.value)
    assert cuda.chosen() == frozenset()
    monkeypatch.setenv(cuda.SWITCH, "1")
    monkeypatch.setattr(cuda, "_state", cuda._State())
    with pytest.warns(UserWarning, match="^CUDA extension: refused: .*; Triton runs$"):
        assert cuda.chosen() == frozenset()
    assert cuda.chosen() == frozenset()  # and says so once


@needs_compiler
@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ('extern "C" int absent(); int x = absent();', "undefined symbol: absent"),
        ("", "undefined symbol: neobert_cuda_refused"),
        (WHOLE.replace("nullptr", '"no kernel image"'), "^refused: no kernel image$"),
        (WHOLE.replace("neobert_cuda_taken", "other"), "undefined symbol: neobert_cuda_taken"),
    ],
    ids=["missing symbol", "nothing of ours", "another GPU", "half of ours"],
)
def test_a_library_that_cannot_run_is_refused(tmp_path: Path, code: str, reason: str) -> None:
    compiled(tmp_path, code)
    with pytest.raises(RuntimeError, match=reason) as caught:
        cuda.use("rope")
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("refused")
    assert cuda.chosen() == frozenset()
    assert cuda.status() == str(caught.value)


@needs_compiler
def test_a_damaged_library_is_named_and_not_loaded(tmp_path: Path) -> None:
    path = compiled(tmp_path, WHOLE)
    content = bytearray(path.read_bytes())
    content[3000] ^= 1
    path.write_bytes(content)
    assert cuda.status() == f"refused: {path} is damaged; build it again"
    with pytest.raises(RuntimeError, match=r"is damaged; build it again$"):
        cuda.use("rope")


@needs_compiler
def test_a_choice_is_passed_on(tmp_path: Path) -> None:
    compiled(tmp_path, WHOLE)
    assert cuda.taken() == 0
    assert "built for sm_80, sm_90, not chosen" in cuda.status()
    cuda.use("geglu", "rope")
    library = cuda._state.library
    word = type(library.neobert_cuda_choose.argtypes[0]()).in_dll(library, "neobert_chosen")
    assert word.value == cuda.bits(["rope", "geglu"]) == 0b10100
    assert cuda.status() == "runs rope, geglu"
    assert cuda.taken() == 7
    assert _runtime.extension_runs("rope")
    assert not _runtime.extension_runs("swiglu")
    if _triton.AVAILABLE:
        assert nk.implementation("rope", "cuda") == "cuda"
        assert nk.implementation("swiglu", "cuda") == "triton"
    cuda.use()
    assert word.value == 0
    assert cuda.chosen() == frozenset()


@needs_compiler
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", ()),
        ("0", ()),
        ("1", tuple(cuda.OPERATORS)),
        ("rope, mean_pool", ("rope", "mean_pool")),
    ],
)
def test_the_environment_chooses(
    value: str, expected: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(tmp_path, WHOLE)
    monkeypatch.setenv(cuda.SWITCH, value)
    assert not cuda.decided()
    assert cuda.chosen() == frozenset(expected)
    assert cuda.decided()
    assert (cuda._state.library is not None) == bool(expected)  # loaded only where it is needed
    line = cuda.status()
    assert line == f"runs {', '.join(expected)}" if expected else line.startswith(("off", "built"))


def test_a_wrong_choice_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"names: expected names of add_rms_norm, .*, got 'nope'"):
        cuda.use("nope")
    monkeypatch.setenv(cuda.SWITCH, "yes")
    with pytest.raises(ValueError, match=r"NEOBERT_CUDA_OPS: expected 0, 1 or names .* got 'yes'"):
        cuda.chosen()
    assert cuda.status().startswith("NEOBERT_CUDA_OPS: expected 0, 1")


@pytest.mark.parametrize(
    ("version", "available", "reason"),
    [(None, False, "has no CUDA"), ("13.0", False, "no GPU that torch can use")],
)
def test_without_a_gpu_nothing_is_loaded(
    version: str | None, available: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(_cuda_build.sealed(GOOD.encode()))
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    with pytest.raises(RuntimeError, match=reason):
        cuda.use("rope")
    monkeypatch.setenv(cuda.SWITCH, "1")
    assert reason in cuda.status()


def test_the_installed_library_is_found_where_the_cache_has_none() -> None:
    installed = _cuda_build.PACKAGE / _cuda_build.NAME
    installed.parent.mkdir()
    installed.write_bytes(GOOD.encode())
    assert cuda.find() == installed
    assert cuda.find() != put(GOOD.encode()) or cuda.find() == cuda._cached()
    assert cuda.find() == cuda._cached()


def test_the_first_call_on_a_gpu_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for the operator that the extension would have put in its place."""
    log: list[Any] = []
    launch = _runtime._extension_first("rope", lambda *args: log.append(("triton", *args)))
    monkeypatch.setattr(torch.ops.neobert, "rope", lambda *args: log.append(("again", *args)))
    launch(1, 2)
    launch(3)
    assert log == [("again", 1, 2), ("triton", 3)]


def test_a_build_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for key in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(key, str(tmp_path))
    with pytest.raises(RuntimeError, match=rf"nvcc: expected one in CUDA_HOME.* in {tmp_path}"):
        cuda.build()
    monkeypatch.setattr(_cuda_build, "site_packages", lambda: [str(tmp_path)])
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(RuntimeError, match="torch: expected to be installed before"):
        _cuda_build.torch_folder()
    (tmp_path / "torch/include/torch/headeronly").mkdir(parents=True)
    (tmp_path / "torch/__init__.py").touch()
    header = tmp_path / "torch/include/torch/headeronly/version.h"
    header.write_text("#define TORCH_VERSION_MAJOR 2\n#define TORCH_VERSION_MINOR 10\n")
    with pytest.raises(RuntimeError, match=r"torch: expected 2\.11 or newer, got 2\.10"):
        _cuda_build.torch_folder()


def test_a_switch_without_a_meaning_builds_nothing() -> None:
    pytest.importorskip("setuptools")
    command = [sys.executable, "setup.py", "--version"]
    environment = os.environ | {"NEOBERT_CUDA": "banana"}
    ran = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True
    )
    assert ran.returncode == 1
    assert ran.stderr == "NEOBERT_CUDA: expected 0 or 1, got 'banana'\n"


def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str = "") -> None:
    """A compiler that knows two generations and gives the first error of ``fails``."""
    home = tmp_path / "cuda"
    (home / "bin").mkdir(parents=True)
    (home / "lib").mkdir()
    (home / "lib/libcudart_static.a").touch()
    program = home / "bin/nvcc"
    program.write_text(
        f"#!/bin/sh\ncase $1 in --dryrun) echo '#$ TOP={home}';; "
        "--version) echo 'release 12.4, V12.4.1';; --list-gpu-arch) echo compute_80; echo "
        f"compute_90;; *) printf 'note\\n{fails}\\n'; exit 2;; esac\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(home))


def test_a_failed_build_is_one_line_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc(tmp_path, monkeypatch, "norm.cu(3): error: no such thing")
    with pytest.raises(RuntimeError) as caught:
        cuda.build()
    assert str(caught.value) == "nvcc: exit code 2, norm.cu(3): error: no such thing"
    assert cuda.find() is None
    assert list(cuda._cached().parent.iterdir()) == []


def test_an_older_nvcc_builds_what_it_knows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nvcc(tmp_path, monkeypatch)
    compiler = _cuda_build.find_compiler()
    assert compiler.version == (12, 4)
    assert _cuda_build.generations(compiler, (80, 90, 100)) == [80, 90]
    with pytest.raises(RuntimeError, match=r"sm: expected .* that nvcc 12\.4 knows, got \[100\]"):
        _cuda_build.generations(compiler, [100])


NAME = "_ZN7neobert12_GLOBAL__N_111part_kernelI{}EEvPKT_PKiPfill"
USAGE = " Function {}:\n  REG:40 STACK:{} SHARED:9216 LOCAL:0 CONSTANT[0]:564\n"
SASS = """		Function : {}
        /*0010*/                   LDG.E.128 R8, desc[UR8][R18.64] ;    /* 0x0 */
        /*0020*/              @!P0 LDG.E R12, desc[UR8][R12.64] ;       /* 0x0 */
        /*0030*/                   STG.E.{} desc[UR8][R12.64], R8 ;    /* 0x0 */
"""


def test_the_machine_code_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two kernels one spills and one stores 8 bytes at a time."""
    path = put(GOOD.encode())
    clean, poor = (NAME.format(kind) for kind in ("NS_6BFloatE", "f"))

    def listing(tool: str, what: str, _: str, sm: str, file: Path) -> str:
        assert (tool, file) == ("cuobjdump", path)
        assert sm in ("sm_80", "sm_90")
        if what == "-res-usage":
            return "arch = ...\n" + USAGE.format(clean, 0) + USAGE.format(poor, 8)
        return (
            SASS.format(clean, 128)
            + SASS.format(poor, 64)
            + SASS.format(poor, 64)[20 + len(poor) :]
        )

    monkeypatch.setattr(aot, "_run", listing)
    found = list(_cuda_aot.reports(path))
    assert [(r.kernel, r.case, r.sm) for r in found] == [
        ("part_kernel", kind, sm) for sm in (80, 90) for kind in ("bf16", "fp32")
    ]
    assert aot.problems(found[0]) == []
    assert (found[0].registers, found[0].shared_bytes, found[0].load_bytes) == (40, 9216, 16)
    assert found[1].store_bytes == 8
    assert aot.problems(found[1]) == ["spills 8 bytes, 0 local-memory instructions"]
    many = found[1].__class__(**{**vars(found[1]), "narrow_stores": 9})
    assert aot.problems(many)[-1] == "9 of 9 global stores under 16 bytes"
    with pytest.raises(ValueError, match="sm: expected one of 80, 90, got 100"):
        list(_cuda_aot.reports(path, [100]))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"extension: expected a build of csrc/, got"):
        list(_cuda_aot.reports(path))
