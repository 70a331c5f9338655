"""The benchmarks' options: order, deadline, resuming, names."""

import errno
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "--quick", "-q", "-p", "no:cacheprovider"]
    command += ["--benchmark-only", *arguments]
    # A worker of xdist would hand on that it is one, and pytest-benchmark then measures nothing.
    own = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment = own | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("results")
    done = bench("benchmarks/bench_rope.py", "--results", str(folder))
    assert done.returncode == 0, done.stdout
    (path,) = folder.glob("*/*-quick.json")
    return folder, json.loads(path.read_text())


def test_results_say_all_about_a_case(written: tuple[Path, dict[str, Any]]) -> None:
    _, document = written
    assert {"machine", "versions", "commit", "clean", "source", "command"} <= document.keys()
    assert len(document["results"]) == 4
    for found in document["results"]:
        values = found["values"]
        assert found["source"] == document["source"]
        assert found["item"].startswith("benchmarks/bench_rope.py::")
        wanted = {"bytes", "flop", "floor_s", "ours_share_of_floor", "copy_bytes_per_s", "rounds"}
        assert wanted | {"ours_median_s", "eager_median_s", "liger_absent"} <= values.keys()
        assert ("ours_host_s" in values) == ("backward" not in found["case"])


def test_a_resumed_run_keeps_what_is_done_and_lists_what_it_does_not_reach(
    written: tuple[Path, dict[str, Any]],
) -> None:
    folder, document = written
    suites = ("benchmarks/bench_rope.py", "benchmarks/bench_rms_norm.py")
    done = bench(*suites, "--results", str(folder), "--resume", "--deadline-s", "0")
    assert done.returncode == 0, done.stdout
    assert "4 deselected" in done.stdout
    (path,) = folder.glob("*/*-quick.json")
    after = json.loads(path.read_text())
    assert after["results"] == document["results"]
    assert len(after["not_reached"]) == 8
    assert "not reached: benchmarks/bench_rms_norm.py::" in done.stdout


@pytest.fixture(scope="module")
def options() -> ModuleType:
    """benchmarks/conftest.py as a module."""
    spec = importlib.util.spec_from_file_location("options", ROOT / "benchmarks" / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def item(name: str, importance: int | None = None, **parameters: Any) -> Any:
    marks = [] if importance is None else [SimpleNamespace(args=(importance,))]
    return SimpleNamespace(
        nodeid=f"{name}{sorted(parameters.items())}",
        path=Path(f"benchmarks/bench_{name}.py"),
        callspec=SimpleNamespace(params=parameters),
        iter_markers=lambda _: iter(marks),
    )


ITEMS = [
    item("rope", rows=64),
    item("models", 3, model="bert-large", case="ragged"),
    item("models", 0, model="neobert-250m", case="fixed 512"),
    item("rms_norm", 1, rows=512),
]


def collected(module: ModuleType, done: set[str] | None = None, **given: Any) -> list[Any]:
    chosen = list(ITEMS)
    config = SimpleNamespace(
        getoption=lambda name: given.get(name),
        stash={module.JOURNAL: SimpleNamespace(done=done or set())},
        hook=SimpleNamespace(pytest_deselected=lambda items: None),
    )
    module.pytest_collection_modifyitems(config, chosen)
    return [ITEMS.index(each) for each in chosen]


def test_the_most_important_run_first(options: ModuleType) -> None:
    assert collected(options) == [2, 3, 0, 1]


def test_options_pick_by_suite_model_and_case(options: ModuleType) -> None:
    assert collected(options, suite=["rope", "rms_norm"]) == [3, 0]
    assert collected(options, model=["bert-large"]) == [1]
    assert collected(options, case=["512", "ragged"]) == [3, 1]
    assert collected(options, done={ITEMS[2].nodeid}) == [3, 0, 1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"suite": ["no"]}, "--suite: expected one of models, rms_norm, rope, got 'no'"),
        ({"model": ["no"]}, "--model: expected one of bert-large, neobert-250m, got 'no'"),
        ({"case": ["65"]}, "--case: expected one of 512, 64, fixed 512, ragged, got '65'"),
    ],
    ids=["suite", "model", "case"],
)
def test_unknown_names_list_the_known_ones(
    options: ModuleType, given: dict[str, list[str]], message: str
) -> None:
    with pytest.raises(pytest.UsageError, match=message):
        collected(options, **given)


def test_options_that_no_benchmark_meets_are_refused(options: ModuleType) -> None:
    with pytest.raises(pytest.UsageError, match="expected a benchmark of all, got none"):
        collected(options, suite=["rope"], model=["bert-large"])


def test_a_folder_that_takes_no_results_is_refused_before_anything_is_measured(
    options: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:  # what root cannot be refused by permissions
        raise OSError(errno.EROFS, "Read-only file system")

    (tmp_path / "file").write_text("")
    monkeypatch.setattr(options.evidence.tempfile, "TemporaryFile", refuse)
    for name, why in (("file", "Not a directory"), ("folder", "Read-only file system")):
        given = {"results": tmp_path / name, "quick": True}
        config = SimpleNamespace(getoption=given.get, stash={})
        message = f"--results: expected a folder to write to, got {why}: {tmp_path / name}"
        with pytest.raises(pytest.UsageError, match=message):
            options.pytest_configure(config)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quick": True, "results": ROOT / "benchmarks" / "results"}, "expected a full run for"),
        ({"resume": True}, "--resume: expected --results with it"),
        ({"threads": 0}, "--threads: expected at least 1, got 0"),
    ],
    ids=["quick", "resume", "threads"],
)
def test_options_that_make_no_sense_are_refused(
    options: ModuleType, given: dict[str, Any], message: str
) -> None:
    config = SimpleNamespace(getoption=lambda name: given.get(name), stash={})
    with pytest.raises(pytest.UsageError, match=message):
        options.pytest_configure(config)
