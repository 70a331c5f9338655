"""SIGTERM or Ctrl-C asks a run to save and end; a second Ctrl-C ends it at once."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

PATIENCE_SECONDS = 1.0


class Signals:
    """While entered, `asked` is the signal that came, or None. Only the main thread can listen."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._since = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._listen)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _listen(self, number: int, frame: FrameType | None) -> None:
        # torchrun hands a Ctrl-C on that the terminal has already sent to every process.
        again = self.asked is not None and time.monotonic() - self._since > PATIENCE_SECONDS
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.asked is None:
            self.asked, self._since = signal.Signals(number), time.monotonic()
