"""The benchmarks' options, tried in processes of their own: order, deadline, resuming, names."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "benchmarks/bench_rms_norm.py", "--quick", "-q"]
    command += ["-p", "no:cacheprovider", "--benchmark-only", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("results")
    done = bench("--results", str(folder))
    assert done.returncode == 0, done.stdout
    (path,) = folder.glob("*/*-quick.json")
    return folder, json.loads(path.read_text())


def test_results_say_all_about_a_case(written: tuple[Path, dict[str, Any]]) -> None:
    _, document = written
    assert {"machine", "versions", "commit", "clean", "source", "command"} <= document.keys()
    assert len(document["results"]) == 8
    for found in document["results"]:
        values = found["values"]
        assert found["source"] == document["source"]
        assert found["item"].startswith("benchmarks/bench_rms_norm.py::")
        wanted = {"bytes", "flop", "floor_s", "ours_share_of_floor", "copy_bytes_per_s", "rounds"}
        assert wanted | {"ours_median_s", "eager_median_s", "liger_absent"} <= values.keys()
        assert ("ours_host_s" in values) == ("backward" not in found["case"])


def test_a_resumed_run_has_nothing_left_to_do(written: tuple[Path, dict[str, Any]]) -> None:
    folder, document = written
    done = bench("--results", str(folder), "--resume")
    assert done.returncode == 0, done.stdout
    assert "8 deselected" in done.stdout
    (path,) = folder.glob("*/*-quick.json")
    assert json.loads(path.read_text())["results"] == document["results"]


def test_what_is_not_reached_is_listed(tmp_path: Path) -> None:
    done = bench("--results", str(tmp_path), "--deadline-s", "0", "--case", "64")
    assert done.returncode == 0, done.stdout
    (path,) = tmp_path.glob("*/*.json")
    assert len(json.loads(path.read_text())["not_reached"]) == 8
    assert "not reached: benchmarks/bench_rms_norm.py::" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "nothing"), "--suite: expected one of rms_norm, got 'nothing'"),
        (("--case", "65"), "--case: expected one of 64, got '65'"),
        (("--results", "benchmarks/results"), "--results: expected a full run for"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_unknown_names_list_the_known_ones(arguments: tuple[str, ...], message: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 4
    assert message in done.stdout + done.stderr
