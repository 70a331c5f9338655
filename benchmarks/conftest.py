"""Options of the benchmarks, their order and budget, and the file their results go to.

A benchmark that is more important runs first; with ``--deadline-s`` those that would start too late
are listed instead. Of ``importance(n)`` 0 is the first, 2 the default, 3 the last.
"""

import functools
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import evidence
import memory_bound
import pytest
import torch
from report_data import noisy_of
from timing import Timing

from neobert_kernels.ops.attention.peers import VARIABLE

RESULTS = pytest.StashKey[list[dict[str, Any]]]()
JOURNAL = pytest.StashKey[evidence.Journal]()
ALL_DONE = pytest.StashKey[bool]()
BEGAN = pytest.StashKey[float]()
COMMITTED = evidence.ROOT / "benchmarks" / "results"
# Parameters that options pick from, under all the names that benchmarks give them.
PICKED = {"--model": ("model",), "--case": ("case", "rows", "batch", "tokens")}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("neobert-kernels benchmarks")
    group.addoption("--quick", action="store_true", help="tiny sizes: does it run, not how fast")
    group.addoption("--results", type=Path, help="folder for <device>/<date>.json; none by default")
    group.addoption("--resume", action="store_true", help="keep what the same code has measured")
    group.addoption("--deadline-s", type=float, help="seconds after which none starts any more")
    group.addoption("--threads", type=int, help="CPU threads (default: PyTorch's)")
    for name in ("--suite", *PICKED):
        group.addoption(name, action="append", help=f"run this {name[2:]} only; may be repeated")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS], config.stash[BEGAN] = [], time.monotonic()
    threads = config.getoption("threads")
    if threads is not None:
        if threads < 1:
            raise pytest.UsageError(f"--threads: expected at least 1, got {threads}")
        torch.set_num_threads(threads)
    folder, quick = config.getoption("results"), config.getoption("quick")
    if not folder:
        if config.getoption("resume"):
            raise pytest.UsageError("--resume: expected --results with it, got none")
        return
    if quick and folder.resolve() == COMMITTED:
        raise pytest.UsageError(f"--results: expected a full run for {folder}, got --quick")
    try:
        journal = evidence.Journal(folder, quick=quick, resume=config.getoption("resume"))
        journal.hold()
    except OSError as error:
        raise pytest.UsageError(
            f"--results: expected a folder to write to, got {error.strerror}: {folder}"
        ) from error
    except ValueError as error:
        raise pytest.UsageError(f"--results: {error}") from error
    config.stash[JOURNAL] = journal


def pytest_unconfigure(config: pytest.Config) -> None:
    if JOURNAL in config.stash:
        config.stash[JOURNAL].release()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = items
    suites = {item.path.stem.removeprefix("bench_") for item in items}
    chosen = _pick(config, "--suite", suites, chosen, _suite)
    for option, names in PICKED.items():
        known = {value for item in items for value in _parameters(item, names)}
        chosen = _pick(config, option, known, chosen, functools.partial(_parameters, names=names))
    if items and not chosen:
        raise pytest.UsageError("--suite, --model, --case: expected a benchmark of all, got none")
    done = config.stash[JOURNAL].done if JOURNAL in config.stash else set()
    fresh = [item for item in chosen if item.nodeid not in done]
    kept = set(map(id, fresh))
    config.stash[ALL_DONE] = bool(chosen) and not fresh
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = sorted(fresh, key=_importance)


def _suite(item: pytest.Item) -> set[str]:
    return {item.path.stem.removeprefix("bench_")}


def _parameters(item: pytest.Item, names: Iterable[str]) -> set[str]:
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return {str(parameters[name]) for name in names if name in parameters}


def _pick(
    config: pytest.Config, option: str, known: set[str], items: list[pytest.Item],
    values_of: Callable[[pytest.Item], set[str]],
) -> list[pytest.Item]:  # fmt: skip
    wanted = set(config.getoption(option.removeprefix("--")) or ())
    for value in sorted(wanted - known):
        raise pytest.UsageError(
            f"{option}: expected one of {', '.join(sorted(known)) or 'none here'}, got {value!r}"
        )
    return [item for item in items if values_of(item) & wanted] if wanted else items


def _importance(item: pytest.Item) -> int:
    marks = [mark.args[0] for mark in item.iter_markers("importance")]
    return marks[0] if marks else 2


def pytest_runtest_setup(item: pytest.Item) -> None:
    if seconds_left(item.config) <= 0:
        _not_reached(item)
    if JOURNAL in item.config.stash:
        item.config.stash[JOURNAL].reached(item.nodeid)


def _not_reached(item: pytest.Item) -> NoReturn:
    if JOURNAL in item.config.stash:
        item.config.stash[JOURNAL].reached(item.nodeid, False)
    pytest.skip("not reached before --deadline-s")


def seconds_left(config: pytest.Config) -> float:
    limit = config.getoption("deadline_s")
    return float("inf") if limit is None else config.stash[BEGAN] + limit - time.monotonic()


def pytest_sessionfinish(session: pytest.Session) -> None:
    if JOURNAL in session.config.stash:
        journal = session.config.stash[JOURNAL]
        if journal.results or journal.not_reached:
            journal.write()
    if session.config.stash.get(ALL_DONE, False):
        session.exitstatus = pytest.ExitCode.OK  # a resumed run that had nothing left to do


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    terminalreporter.section("results")
    for result in config.stash[RESULTS]:
        terminalreporter.write_line(f"{result['name']}: {result['case']}")
        for key, value in result["values"].items():
            if isinstance(value, list) and value and isinstance(value[0], dict):
                value = f"{len(value)} points"
            shown = f"{value:.4g}" if isinstance(value, float) else value
            terminalreporter.write_line(f"    {key} {shown}")
    if JOURNAL in config.stash:
        journal = config.stash[JOURNAL]
        terminalreporter.write_line(f"{len(journal.results)} results in {journal.path}")
        for name in journal.not_reached:
            terminalreporter.write_line(f"not reached: {name}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "rows" in metafunc.fixturenames and "compare" in metafunc.fixturenames:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        rows = memory_bound.rows_of(metafunc.config.getoption("quick"), device)
        first = memory_bound.FIRST_ROWS
        marks = {n: pytest.mark.importance(1 if n == first else 3) for n in rows}
        metafunc.parametrize("rows", [pytest.param(n, marks=marks[n]) for n in rows])


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
def left_s(request: pytest.FixtureRequest) -> Callable[[], float]:
    """Seconds until the deadline; a sweep stops by it and keeps what it has."""
    return functools.partial(seconds_left, request.config)


@pytest.fixture
def not_reached(request: pytest.FixtureRequest) -> Callable[[], NoReturn]:
    """End the benchmark as one that the deadline left no time for."""
    return functools.partial(_not_reached, request.node)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``record(name, case, **values)`` files one result; numbers' names end in their unit."""

    def add(name: str, case: str, **values: Any) -> None:
        unsteady = noisy_of(values)
        values |= {"noisy": unsteady} if unsteady else {}
        result = {"name": name, "case": case, "item": request.node.nodeid, "values": values}
        request.config.stash[RESULTS].append(result)
        if JOURNAL in request.config.stash:
            request.config.stash[JOURNAL].add(result)

    return add


@pytest.fixture
def once(benchmark: Any) -> Callable[..., Any]:
    """Run a whole comparison once under pytest-benchmark; it interleaves its variants itself.

    Where it returns timings, pytest-benchmark's table and its JSON get the rounds of our variant,
    and the others' medians as extra information.
    """

    def run(function: Callable[[], Any]) -> Any:
        result = benchmark.pedantic(function, rounds=1, iterations=1)
        if isinstance(result, dict) and all(isinstance(t, Timing) for t in result.values()):
            show(benchmark, result)
        return result

    return run


@pytest.fixture
def shown(benchmark: Any) -> Callable[[dict[str, Timing]], None]:
    """Put these timings into pytest-benchmark's table and its JSON, as `once` does."""
    return functools.partial(show, benchmark)


def show(benchmark: Any, timings: dict[str, Timing]) -> None:
    for name, timing in timings.items():
        benchmark.extra_info |= timing.values(name) | {f"{name}_spread": timing.spread}
    ours = next((timings[name] for name in ("ours", "patched") if name in timings), None)
    if ours is not None and ours.samples and benchmark.stats is not None:
        benchmark.stats.stats.data[:] = ours.samples


@pytest.fixture
def compare(
    quick: bool, device: str, once: Callable[..., Any], record: Callable[..., None]
) -> Callable[..., None]:
    """`memory_bound.compare` on this machine."""
    return functools.partial(
        memory_bound.compare, quick=quick, device=device, once=once, record=record
    )
