"""The support table in docs: which family runs with which head and how, as the tests found it.

A test says what it shows with the ``supports`` fixture; a cell is "yes" when at least one test
shows it and none that does failed. ``--support-table`` writes the table after a run of the tests,
``--check-support-table`` fails if a file is not what they show.
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

MODES = ("padded", "packed", "train", "compile")
KEY = "support"
_HEADS = {
    "base": "base model",
    "mlm": "masked LM",
    "sequence": "sequence classification",
    "token": "token classification",
    "question": "question answering",
    "choice": "multiple choice",
}
_TEXT = """# Support

What `patch` runs, by family and head, as the tests of this commit found it (float32, CPU). "yes":
at least one test compares it with the unpatched model, and all such tests pass. "-": there is no
such class, or a mode has no meaning there (packed input has no choices). Made by `make support`.

"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--support-table", type=Path, help="write the support table to this file")
    parser.addoption("--check-support-table", type=Path, help="fail unless this file is up to date")


@pytest.fixture
def supports(record_property: Any) -> Any:
    """``supports(family, head, mode)``: what the running test shows if it passes; call it first."""

    def record(family: str, head: str, mode: str) -> None:
        assert head in _HEADS, head
        assert mode in MODES, mode
        record_property(KEY, (family, head, mode))

    return record


def table(results: dict[tuple[str, str, str], bool]) -> str:
    """Markdown; rows by family and head in the order of their names and of ``_HEADS``."""
    rows = sorted({key[:2] for key in results}, key=lambda r: (r[0], list(_HEADS).index(r[1])))
    lines = ["| family | head | " + " | ".join(MODES) + " |", "| --- " * (2 + len(MODES)) + "|"]
    marks = {True: "yes", False: "FAILS", None: "-"}
    for family, head in rows:
        cells = [marks[results.get((family, head, mode))] for mode in MODES]
        lines.append(f"| {family} | {_HEADS[head]} | " + " | ".join(cells) + " |")
    return _TEXT + "\n".join(lines) + "\n"


class Plugin:
    """Collects what the tests showed, also from the workers of pytest-xdist."""

    def __init__(self, config: pytest.Config) -> None:
        self.write = config.getoption("--support-table")
        self.check = config.getoption("--check-support-table")
        self.results: dict[tuple[str, str, str], bool] = defaultdict(lambda: True)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            for name, value in report.user_properties:
                if name == KEY:
                    key = tuple(value)
                    self.results[key] = self.results[key] and report.passed

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):
            return
        text = table(self.results)
        if self.write:
            self.write.write_text(text, "utf-8")
        if self.check and self.check.read_text("utf-8") != text:
            print(f"\n{self.check} is not what the tests show; run `make support`")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--support-table") or config.getoption("--check-support-table"):
        config.pluginmanager.register(Plugin(config), "support-table")
