"""Options of the benchmarks, and the file their results go to."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import evidence
import memory_bound
import pytest
import torch

from neobert_kernels.ops.attention.peers import VARIABLE

RESULTS = pytest.StashKey[list[dict[str, Any]]]()
WRITTEN = pytest.StashKey[Path]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("neobert-kernels benchmarks")
    group.addoption("--quick", action="store_true", help="tiny sizes: does it run, not how fast")
    group.addoption("--results", type=Path, help="folder for <device>/<date>.json; none by default")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = []
    if config.getoption("quick") and config.getoption("results"):
        raise pytest.UsageError("--results: expected a full run, got --quick")


def pytest_sessionfinish(session: pytest.Session) -> None:
    folder, results = session.config.getoption("results"), session.config.stash[RESULTS]
    if folder and results:
        session.config.stash[WRITTEN] = evidence.write(folder, results)


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    terminalreporter.section("results")
    for result in config.stash[RESULTS]:
        terminalreporter.write_line(f"{result['name']}: {result['case']}")
        for key, value in result["values"].items():
            shown = f"{value:.4g}" if isinstance(value, float) else value
            terminalreporter.write_line(f"    {key} {shown}")
    if WRITTEN in config.stash:
        terminalreporter.write_line(f"written to {config.stash[WRITTEN]}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "rows" in metafunc.fixturenames and "compare" in metafunc.fixturenames:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        metafunc.parametrize(
            "rows", memory_bound.rows_of(metafunc.config.getoption("quick"), device)
        )


@pytest.fixture(autouse=True)
def _ours_is_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment asks of `nk.attention`."""
    monkeypatch.delenv(VARIABLE, raising=False)


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("quick"))


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``record(name, case, **values)`` files one result; numbers' names end in their unit."""

    def add(name: str, case: str, **values: Any) -> None:
        request.config.stash[RESULTS].append({"name": name, "case": case, "values": values})

    return add


@pytest.fixture
def once(benchmark: Any) -> Callable[..., Any]:
    """Run a whole comparison once under pytest-benchmark; it interleaves its variants itself."""

    def run(function: Callable[[], Any]) -> Any:
        return benchmark.pedantic(function, rounds=1, iterations=1)

    return run


@pytest.fixture
def compare(
    quick: bool, device: str, once: Callable[..., Any], record: Callable[..., None]
) -> Callable[..., None]:
    """`memory_bound.compare` on this machine."""
    return functools.partial(
        memory_bound.compare, quick=quick, device=device, once=once, record=record
    )
