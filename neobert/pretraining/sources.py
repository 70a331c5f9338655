"""The documents of a recipe: files through `neobert.inputs`, or a Hugging Face data set."""

from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from neobert.inputs import Source, open_source
from neobert.pretraining.recipe import Data
from neobert.pretraining.rules import error
from neobert.readers import InputError, ReadOptions, Row, one_line

# A document beyond this is cut at white space into several: tokenizing one text takes memory of
# some hundred times its size, and no context window holds a quarter of it.
MAX_CHARACTERS = 1 << 20
# Rows of a data set: in one call of `datasets`, and in a part of one that is not streamed.
READ_ROWS, PART_ROWS = 64, 1 << 16


def open_documents(data: Data, exclude: Collection[Path] = ()) -> Source:
    """Open what a recipe names; ``exclude`` as in `neobert.inputs.open_source`.

    Raises:
        InputError: Nothing there to read, no such column, or `datasets` is not installed.
    """
    options = ReadOptions(
        data.column, data.column, errors=data.errors, whole_files=data.whole_files
    )
    if data.dataset is not None:
        return DatasetSource(data, options, _load(data))
    assert data.path is not None
    if data.path == "-":
        raise error("data.path", "a file or folder, which can be read again", "'-'")
    try:
        return open_source(data.path, options, exclude)
    except InputError as problem:
        raise InputError(_in_recipe_words(problem)) from None


def chosen(data: Data) -> dict[str, Any]:
    """The settings that decide which documents a source gives, whatever is in it."""
    names = ("column", "whole_files", "errors", "documents")
    found = {"dataset": data.dataset, **{name: getattr(data, name) for name in names}}
    if data.dataset is not None:
        found |= {"subset": data.subset or "", "split": data.split, "revision": data.revision or ""}
    return found


def texts(source: Source, skip: int, most: int | None) -> Iterator[str]:
    """The texts after the first ``skip`` ones, up to text number ``most``."""
    rows = source.rows(skip)
    try:
        for row in rows if most is None else islice(rows, max(most - skip, 0)):
            yield row.text
    except InputError as problem:
        raise InputError(_in_recipe_words(problem)) from None


def pieces(text: str, most: int = MAX_CHARACTERS) -> Iterator[str]:
    """``text``, cut after the last white space within ``most`` characters while it is longer."""
    start = 0
    while len(text) - start > most:
        window = text[start : start + most]
        cut = max(window.rfind(" "), window.rfind("\n")) + 1 or most
        yield window[:cut]
        start += cut
    yield text[start:] if start else text


def _in_recipe_words(problem: InputError) -> str:
    """Errors of `neobert.inputs` with the recipe's keys in place of options of the command."""
    text = str(problem).replace("--errors replace", "data.errors=replace")
    text = text.removesuffix(" (lines of any file can be piped into --input -)")
    return f"data.path{text.removeprefix('input')}" if text.startswith("input:") else text


class DatasetSource(Source):
    """The text column of a data set, downloaded or streamed."""

    replayable = True

    def __init__(self, data: Data, options: ReadOptions, rows: Any) -> None:
        """``rows`` are a `datasets.Dataset` or `datasets.IterableDataset`."""
        self.name, self.options, self._data = str(data.dataset), options, data
        self._rows = rows
        columns = self._rows.column_names
        if columns is not None:  # a stream may know its columns only from its first row
            self._require_column(columns)
        kind = (self._rows.features or {}).get(data.column)
        dtype = getattr(kind, "dtype", kind)
        if kind is not None and dtype not in ("string", "large_string"):
            raise error("data.column", f"strings in column {data.column!r}", dtype)

    def __len__(self) -> int:
        """Rows of a data set that is not streamed; 0 if they are not known."""
        return 0 if self._data.streaming else len(self._rows)

    def rows(self, skip: int = 0) -> Iterator[Row]:
        for number, text in enumerate(self._texts(skip), skip + 1):
            if not isinstance(text, str):
                rule = f"a string in column {self._data.column!r}"
                raise error(f"{self.name}:{number}", rule, type(text).__name__)
            yield Row(text, None, self.name, number)

    def _texts(self, skip: int) -> Iterator[object]:
        rows = self._rows.skip(skip) if skip else self._rows
        # By batches: row by row, a stream in a worker of torch's loader gives a share of its rows.
        batches = rows.iter(READ_ROWS)
        while True:
            try:
                batch = next(batches, None)
            except Exception as problem:  # of many kinds, from the network to a file's content
                got = f"{self.name!r} ({one_line(problem)})"
                raise error("data.dataset", "rows that can be read", got) from None
            if batch is None:
                return
            self._require_column(list(batch))
            yield from batch[self._data.column]

    @property
    def parts(self) -> int:
        """The files of a stream; of a downloaded data set ranges of `PART_ROWS` rows."""
        if self._data.streaming:
            return int(self._rows.num_shards) if hasattr(self._rows, "shard") else 1
        return -(-len(self._rows) // PART_ROWS)

    def part(self, number: int) -> "DatasetSource":
        rows = self._rows
        if not self._data.streaming:
            start = number * PART_ROWS
            rows = rows.select(range(start, min(start + PART_ROWS, len(rows))))
        elif self.parts > 1:
            rows = rows.shard(self.parts, number)
        part = DatasetSource(self._data, self.options, rows)
        part.name = f"{self.name}[{number}]"
        return part

    def identity(self) -> dict[str, str | int]:
        data = self._data
        found: dict[str, str | int] = {
            "dataset": str(data.dataset),
            "subset": data.subset or "",
            "split": data.split,
            "revision": data.revision or "",
            "streaming": int(data.streaming),
        }
        if not data.streaming:
            found |= {
                "dataset rows": len(self._rows),
                "dataset fingerprint": self._rows._fingerprint,
            }
        return found

    def _require_column(self, columns: list[str]) -> None:
        if self._data.column not in columns:
            rule = f"one of the columns {', '.join(columns)}"
            raise error("data.column", rule, repr(self._data.column))


def _load(data: Data) -> Any:
    try:
        import datasets
    except ImportError:
        raise error(
            "data.dataset",
            "the package datasets to be installed",
            "none; pip install 'neobert-kernels[train]'",
        ) from None
    try:
        # No remote code: `datasets` runs none unless asked to.
        loaded = datasets.load_dataset(
            data.dataset,
            data.subset,
            split=data.split,
            revision=data.revision,
            streaming=data.streaming,
        )
    except Exception as problem:  # of many kinds, from the hub to the file system
        rule = "a data set that can be loaded"
        raise error("data.dataset", rule, f"{data.dataset!r} ({one_line(problem)})") from None
    return loaded
