"""Progress is a bar on a terminal and lines elsewhere, and counts from several threads."""

import io
from concurrent.futures import ThreadPoolExecutor

import pytest

from neobert.commands import progress
from neobert.commands.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_bar() -> None:
    stream = Terminal()
    with Progress(10, 4, stream=stream) as shown:
        shown.update(3, 50)
    assert "7/10" in stream.getvalue()
    assert "tokens/s" in stream.getvalue()


def test_a_file_gets_lines_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    stream = io.StringIO()
    with Progress(1000, 400, stream=stream) as shown:
        for _ in range(4):
            now += 10
            shown.update(100, 2000)
    assert stream.getvalue().splitlines() == [
        "600/1,000 texts, 10 texts/s, 200 tokens/s, 40 s left",
        "800/1,000 texts, 10 texts/s, 200 tokens/s, 20 s left",
    ]


def test_rates_count_from_the_first_worker_that_began(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    shown = Progress(1000, stream=io.StringIO())
    now += 30
    shown.began(5)
    shown.update(100, 2000)
    shown.began(20)  # a later result, of a worker that took longer
    assert shown.line(now) == "100/1,000 texts, 20 texts/s, 400 tokens/s, 45 s left"


def test_an_unknown_total_has_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    stream = io.StringIO()
    Progress(None, stream=stream).update(5, 10)
    assert stream.getvalue().startswith("5 texts, ")
    assert "left" not in stream.getvalue()


def test_quiet_prints_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    for stream in (io.StringIO(), Terminal()):
        with Progress(5, stream=stream, quiet=True) as shown:
            shown.update(5, 10)
        assert stream.getvalue() == ""


def test_updates_from_threads_add_up() -> None:
    shown = Progress(None, stream=io.StringIO())
    with ThreadPoolExecutor(4) as pool:
        for _ in range(400):
            pool.submit(shown.update, 1, 2)
    assert (shown._done, shown._tokens) == (400, 800)
