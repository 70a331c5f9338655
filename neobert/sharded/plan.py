"""Cuts an input into shards: rows in the order of the input, each shard found without reading on.

Nothing is decoded. A file of lines is read once to count them; of a Parquet file only the footer.
What is kept grows with the number of files and shards, not with the texts.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from neobert.inputs import FileSource
from neobert.readers import InputError, file_starts

SHARD_ROWS = 65536
SECONDS_BETWEEN_NOTES = 5.0


@dataclass(frozen=True)
class Shard:
    """Consecutive rows of the input.

    Attributes:
        number: Its place among the shards.
        first, rows: Its rows in the whole input.
        file: Number of the file that its first row is in.
        skip: Rows of that file before it.
        offset: Bytes that those take in a file of lines; None in other files.
    """

    number: int
    first: int
    rows: int
    file: int
    skip: int
    offset: int | None


@dataclass(frozen=True)
class Plan:
    """All shards of an input; each has ``shard_rows`` rows, but for the last."""

    rows: int
    shard_rows: int
    starts: list[tuple[int, int, int | None]]  # file, skip, offset of each shard

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> Shard:
        first = number * self.shard_rows
        rows = min(self.shard_rows, self.rows - first)
        return Shard(number, first, rows, *self.starts[number])

    @classmethod
    def from_record(cls, record: Any) -> "Plan":
        """From what `dataclasses.asdict` gave, by way of JSON."""
        starts = [(file, skip, offset) for file, skip, offset in record["starts"]]
        return cls(record["rows"], record["shard_rows"], starts)


def make_plan(source: FileSource, shard_rows: int, note: Callable[[str], None]) -> Plan:
    """Count the rows of every file.

    Args:
        source: What `neobert.inputs.open_source` opened.
        shard_rows: Rows of a shard.
        note: Told now and then how far the count is.

    Raises:
        InputError: There is no row, or a Parquet file cannot be read.
    """
    starts: list[tuple[int, int, int | None]] = []
    total, last = 0, time.monotonic()
    for number, path in enumerate(source.files):
        first = len(starts) * shard_rows - total
        rows, found = file_starts(path, source.options, first, shard_rows)
        starts += [(number, skip, offset) for skip, offset in found]
        total += rows
        if time.monotonic() - last > SECONDS_BETWEEN_NOTES:
            last = time.monotonic()
            note(f"counting the input: {total:,} texts in {number + 1:,} files so far")
    if not total:
        raise InputError(f"input: expected at least one text, got none in {source.name}")
    return Plan(total, shard_rows, starts)
