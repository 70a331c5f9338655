"""Progress of a long job on stderr: a bar on a terminal, a line now and then elsewhere."""

import sys
import threading
import time
from types import TracebackType
from typing import Any, TextIO

SECONDS_BETWEEN_LINES = 15.0


class Progress:
    """Counts texts and tokens; `total` texts in all, if known, `done` of them in earlier runs."""

    def __init__(
        self,
        total: int | None,
        done: int = 0,
        *,
        quiet: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self._total, self._done, self._first = total, done, done
        self._tokens = 0
        self._lock = threading.Lock()
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._start = self._last_line = time.monotonic()
        self._counts_from_start = True
        self._bar: Any = None
        if not quiet and self._stream.isatty():
            self._bar = _bar(total, done, self._stream)

    @property
    def texts(self) -> int:
        """Finished since this began."""
        return self._done - self._first

    @property
    def tokens(self) -> int:
        """Of these texts."""
        return self._tokens

    def began(self, seconds_ago: float) -> None:
        """Rates count from here, instead of from the time before the model was there."""
        if self._counts_from_start:
            self._counts_from_start = False
            self._start = max(self._start, time.monotonic() - seconds_ago)
            if self._bar is not None:
                self._bar.start_t = self._bar.last_print_t = time.time() - seconds_ago

    def update(self, texts: int, tokens: int) -> None:
        """Add what one batch finished; batches may finish in several threads at once."""
        with self._lock:
            self._add(texts, tokens, time.monotonic())

    def _add(self, texts: int, tokens: int, now: float) -> None:
        self._done += texts
        self._tokens += tokens
        if self._bar is not None:
            rate = self._tokens / max(now - self._start, 1e-9)
            self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
            self._bar.update(texts)
        elif not self._quiet and now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(self.line(now), file=self._stream, flush=True)

    def line(self, now: float) -> str:
        """One line of plain text: how far, how fast, how long still."""
        seconds = max(now - self._start, 1e-9)
        rate = (self._done - self._first) / seconds
        of = f"/{self._total:,}" if self._total is not None else ""
        line = (
            f"{self._done:,}{of} texts, {rate:,.0f} texts/s, {self._tokens / seconds:,.0f} tokens/s"
        )
        if self._total is not None and rate:
            line += f", {(self._total - self._done) / rate:,.0f} s left"
        return line

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def _bar(total: int | None, done: int, stream: TextIO) -> Any:
    """A bar that moves; None without tqdm, which comes with transformers."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped]
    except ImportError:
        return None
    return tqdm(total=total, initial=done, unit=" texts", file=stream, dynamic_ncols=True)
