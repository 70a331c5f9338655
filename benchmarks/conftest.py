"""Options of the benchmarks, and the file their results go to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import evidence
import pytest
import torch

RESULTS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("neobert-kernels benchmarks")
    group.addoption("--quick", action="store_true", help="tiny sizes: does it run, not how fast")
    group.addoption("--results", type=Path, help="folder for <device>/<date>.json; none by default")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = []


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    folder, results = session.config.getoption("results"), session.config.stash[RESULTS]
    if folder and results:
        if session.config.getoption("quick"):
            raise pytest.UsageError("--results: expected a full run, got --quick")
        reporter = session.config.pluginmanager.get_plugin("terminalreporter")
        path = evidence.write(folder, results)
        if reporter:
            reporter.write_line(f"results: {path}")


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
        reporter = request.config.pluginmanager.get_plugin("terminalreporter")
        if reporter:
            shown = ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in values.items()
            )
            reporter.write_line(f"\n{name} [{case}]: {shown}")

    return add


@pytest.fixture
def once(benchmark: Any) -> Callable[..., Any]:
    """Run a whole comparison once under pytest-benchmark; it interleaves its variants itself."""

    def run(function: Callable[[], Any]) -> Any:
        return benchmark.pedantic(function, rounds=1, iterations=1)

    return run
