"""What a run tells: its log, a line on stderr, and experiment trackers through accelerate."""

import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from neobert.files import write_atomically
from neobert.pretraining.log import Log
from neobert.pretraining.rules import error
from neobert.readers import one_line

SECONDS_BETWEEN_LINES = 15.0  # where nobody watches a terminal


class Watch:
    """Rank 0's; the others have none."""

    def __init__(
        self,
        log: Log,
        steps: int,
        trackers: list[Any],
        quiet: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        self._log, self._steps, self._trackers = log, steps, trackers
        self._quiet, self._stream = quiet, stream or sys.stderr
        self._live = not quiet and self._stream.isatty()
        self._last_line, self._open = 0.0, False

    def record(self, kind: str, step: int, seconds_left: float | None, **values: Any) -> None:
        """A ``train`` or ``eval`` record of the log, and its line."""
        self._log.write(kind=kind, step=step, **values)
        for tracker in self._trackers:
            numbers = {f"{kind}/{k}": v for k, v in values.items() if v is not None}
            tracker.log(numbers, step=step)
        line = f"step {step:,}/{self._steps:,}  {described(kind, values)}"
        if kind == "eval":
            self._say(line)
        elif self._live:
            print(f"\r\x1b[K{line}{_left(seconds_left)}", end="", file=self._stream, flush=True)
            self._open = True
        elif time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = time.monotonic()
            self._say(line + _left(seconds_left))

    def note(self, step: int, text: str, *, say: bool = True) -> None:
        """Something that a reader of the log has to know, such as a resume.

        Without ``say`` it is in the log only: what ends a run is told by whoever catches it.
        """
        self._log.write(kind="note", step=step, text=text)
        self._log.sync()
        if say:
            self._say(text)

    def say(self, text: str) -> None:
        """A line on stderr only."""
        self._say(text)

    def _say(self, text: str) -> None:
        if self._quiet:
            return
        print(f"{chr(10) if self._open else ''}neobert: {text}", file=self._stream, flush=True)
        self._open = False

    def close(self) -> None:
        for tracker in self._trackers:
            tracker.finish()
        if self._open:
            print(file=self._stream)
        self._log.close()


def described(kind: str, values: Mapping[str, Any]) -> str:
    """The numbers of a record in words."""
    if kind == "eval":
        return (
            f"held out: loss {values['loss']:.4f}, accuracy {values['accuracy']:.1%} "
            f"(the most frequent token: {values['unigram_accuracy']:.1%})"
        )
    share = values["utilisation"]
    return (
        f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  norm {values['grad_norm']:.2f}  "
        f"{values['tokens_per_s']:,.0f} tokens/s  {values['masked_per_s']:,.0f} masked/s"
        + ("" if share is None else f"  {share:.0%} of peak")
    )


def _left(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    clock = f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
    return f"  {clock} left"


def open_trackers(names: tuple[str, ...], run: Path, settings: Mapping[str, Any]) -> list[Any]:
    """accelerate's trackers by name, begun; what they write is in ``run/trackers``.

    Raises:
        InputError: accelerate or the tracker's own package is not installed, or it does not begin.
    """
    if not names:
        return []
    try:
        from accelerate import PartialState, tracking, utils
    except ImportError:
        got = "no accelerate (pip install 'neobert-kernels[train]')"
        raise error("log.trackers", "installed trackers", got) from None
    for name in names:
        if not getattr(utils, f"is_{name}_available")():
            raise error("log.trackers", f"the package {name} to be installed", "none")
    PartialState()  # what trackers ask whether they are on rank 0
    # TensorBoard takes no lists and no tables.
    known = {
        key: value if isinstance(value, int | float | str) else str(value)
        for key, value in settings.items()
        if value is not None
    }
    folder = run / "trackers"
    found = []
    for name in names:
        folder.mkdir(exist_ok=True)
        try:
            tracker = tracking.LOGGER_TYPE_TO_CLASS[name](run.name, **_place(name, folder))
            if hasattr(tracker, "start"):  # older ones begin by themselves
                tracker.start()
            tracker.store_init_configuration(known)
        except Exception as problem:  # a log-in that is missing, a service out of reach
            raise error("log.trackers", f"{name} to begin", one_line(problem)) from problem
        found.append(tracker)
    return found


def _place(name: str, folder: Path) -> dict[str, Any]:
    """Where a tracker writes. A resumed run goes on with W&B's run of before, by its id."""
    if name == "tensorboard":
        return {"logging_dir": str(folder)}
    known = folder / "wandb-id"
    if not known.exists():
        write_atomically(known, secrets.token_hex(4))
    return {"dir": str(folder), "id": known.read_text(), "resume": "allow"}
