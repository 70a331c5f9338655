"""``RUN/log.jsonl``: one JSON object per line, appended; a kill costs at most a torn last line.

Every record has ``kind``, ``step`` (optimizer steps done) and ``time`` (seconds since 1970):

    train   tokens (so far), loss, lr, grad_norm, tokens_per_s, masked_per_s, utilisation or null
    eval    tokens, loss, accuracy, unigram_accuracy
    note    text: a resume, a stop
"""

import json
import math
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from neobert.files import sync_folder, write_all, write_atomically
from neobert.outputs import OutputError
from neobert.pretraining.rules import error

NAME = "log.jsonl"


class Log:
    """Appends to the log of one run folder; one process at a time."""

    def __init__(self, folder: str | Path) -> None:
        """Open or begin the log; a line that a kill left without its end is cut off.

        Raises:
            InputError: The file is not such a log; it is left as it is.
            OSError: It cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / NAME
        new = not self.path.exists()
        end = 0 if new else sum(len(line) for line, _ in _records(self.path))
        # Unbuffered: what `write` has returned from, a kill cannot take back.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        self._file.truncate(end)
        if new:
            sync_folder(folder)

    def write(self, *, step: int, kind: str = "train", **values: Any) -> None:
        """Append one record; a number that is not finite becomes null, as JSON has no such.

        Raises:
            OutputError: The disk is full or fails.
        """
        record = {"kind": kind, "step": step, **values, "time": time.time()}
        try:
            write_all(self._file, memoryview(_line(record)))
        except OSError as problem:
            why = f"{problem.strerror}; make room and go on with --resume"
            raise OutputError(f"{self.path}: {why}") from problem

    def truncate(self, step: int) -> None:
        """Drop the records of later steps, which a resumed run makes again."""
        kept = [line for line, record in _records(self.path) if record["step"] <= step]
        self._file.close()
        write_atomically(self.path, b"".join(kept))
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115

    def sync(self) -> None:
        """What was written also survives a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        if not self._file.closed:
            self.sync()
            self._file.close()

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read(folder: str | Path) -> list[dict[str, Any]]:
    """All whole records of a run, also of one that is being written.

    Raises:
        InputError: No log there, or a line that is not a record; the message names it.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        raise error("log", f"a run folder with {NAME}", folder)
    return [record for _, record in _records(path)]


def _records(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Lines and what they say; a last line without its end does not count."""
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record["step"], int):
                raise ValueError
        except (KeyError, RecursionError, ValueError):
            raise error(
                f"log: {path}:{number}", "an object with a step", ascii(line[:60])
            ) from None
        found.append((line, record))
    return found


def _line(record: dict[str, Any]) -> bytes:
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }
    return json.dumps(finite, allow_nan=False).encode() + b"\n"
