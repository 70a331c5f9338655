"""Readers of one file or stream each: lines, JSON lines, a Parquet column, a whole file.

Memory stays bounded: one line, or one Parquet batch, at a time. Errors name file and line.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

# A line or file beyond this is not a text for an encoder, more likely the wrong file.
MAX_TEXT_BYTES = 64 << 20
PARQUET_BATCH_ROWS = 1024
# Behind an error in a text: what commands with this option offer.
ERRORS_HINT = "; --errors replace goes on"
_COUNTED_BYTES = 1 << 20

_BOM = b"\xef\xbb\xbf"
_SURROGATES = re.compile("[\ud800-\udfff]")


class InputError(ValueError):
    """The user's input breaks a rule; the message names the place in one line."""


class Row(NamedTuple):
    """One text and where it stands: `number` counts lines or Parquet rows from 1."""

    text: str
    id: str | None
    file: str
    number: int

    @property
    def place(self) -> str:
        return f"{self.file}:{self.number}" if self.number else self.file


@dataclass(frozen=True)
class ReadOptions:
    """How texts are taken out of files; `neobert.inputs` has the rules.

    Args:
        field: Name of the text in a ``.jsonl`` object.
        column: Name of the text column of a ``.parquet`` file.
        id_column: Name of an id in ``.jsonl`` and ``.parquet`` input; ids become strings.
        errors: ``"strict"`` or ``"replace"``: what invalid UTF-8 does.
        whole_files: Read ``.txt`` and ``.md`` files as one text each.
    """

    field: str = "text"
    column: str = "text"
    id_column: str | None = None
    errors: str = "strict"
    whole_files: bool = False

    def __post_init__(self) -> None:
        if self.errors not in ("strict", "replace"):
            raise InputError(f"errors: expected 'strict' or 'replace', got {self.errors!r}")
        if self.whole_files and self.id_column is not None:
            raise InputError(
                "id-column: expected none with whole files (a file's path is its id), "
                f"got {self.id_column!r}"
            )

    @property
    def has_ids(self) -> bool:
        return self.whole_files or self.id_column is not None


class Reader(Protocol):
    """One open file: skip rows first, then iterate over the rest.

    `skip` may be told the bytes that the rows take in a file of lines, and need not read them then.
    """

    def skip(self, rows: int, offset: int | None = None) -> int: ...

    def __iter__(self) -> Iterator[Row]: ...

    def close(self) -> None: ...


class LineReader:
    """Lines of a binary stream as texts."""

    def __init__(self, stream: BinaryIO, name: str, options: ReadOptions) -> None:
        self._stream, self._name, self._options = stream, name, options
        self._number = 0

    def _line(self) -> bytes | None:
        line = self._stream.readline(MAX_TEXT_BYTES + 1)
        if self._number == 0:
            line = line.removeprefix(_BOM)
        if not line:
            return None
        self._number += 1
        if len(line) > MAX_TEXT_BYTES:
            raise InputError(
                f"{self._name}:{self._number}: expected at most {MAX_TEXT_BYTES} bytes in a line, "
                "got more; is this a text file?"
            )
        if line.endswith(b"\n"):
            line = line[:-2] if line.endswith(b"\r\n") else line[:-1]
        return line

    def skip(self, rows: int, offset: int | None = None) -> int:
        if offset is not None:
            self._stream.seek(offset)
            self._number = rows
            return rows
        skipped = 0
        while skipped < rows and self._line() is not None:
            skipped += 1
        return skipped

    def __iter__(self) -> Iterator[Row]:
        while (line := self._line()) is not None:
            place = f"{self._name}:{self._number}"
            yield self._row(_decode(line, place, self._options.errors), place)

    def _row(self, line: str, place: str) -> Row:
        return Row(line, None, self._name, self._number)

    def close(self) -> None:
        self._stream.close()


class _JsonReader(LineReader):
    def _row(self, line: str, place: str) -> Row:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise InputError(
                f"{place}: expected a JSON object, got a broken line ({reason})"
            ) from None
        if not isinstance(value, dict):
            raise InputError(f"{place}: expected a JSON object, got {_kind(value)}")
        options = self._options
        text = _member(value, options.field, place)
        if not isinstance(text, str):
            raise InputError(
                f"{place}: expected a string in field {options.field!r}, got {_kind(text)}"
            )
        row_id = None
        if options.id_column is not None:
            row_id = _id(_member(value, options.id_column, place), options.id_column, place)
        if "\\u" in line:
            text = _without_surrogates(text, place, options.errors)
            row_id = row_id and _without_surrogates(row_id, place, options.errors)
        return Row(text, row_id, self._name, self._number)


class _WholeFileReader:
    def __init__(self, path: Path, options: ReadOptions) -> None:
        self._path, self._name, self._options = path, str(path), options
        self._read = False

    def skip(self, rows: int, offset: int | None = None) -> int:
        self._read = rows > 0
        return int(self._read)

    def __iter__(self) -> Iterator[Row]:
        if self._read:
            return
        with open(self._path, "rb") as stream:
            data = stream.read(MAX_TEXT_BYTES + 1)
        if len(data) > MAX_TEXT_BYTES:
            raise InputError(
                f"{self._name}: expected at most {MAX_TEXT_BYTES} bytes in a text, got more"
            )
        text = _decode(data.removeprefix(_BOM), self._name, self._options.errors)
        yield Row(text.replace("\r\n", "\n"), None, self._name, 0)

    def close(self) -> None:
        pass


class _ParquetReader:
    def __init__(self, path: Path, options: ReadOptions) -> None:
        self._name, self._options, self._skip = str(path), options, 0
        self._file = _open_parquet(path)
        _check_columns(self._file.schema_arrow, path, options)

    @property
    def rows(self) -> int:
        return int(self._file.metadata.num_rows)

    def skip(self, rows: int, offset: int | None = None) -> int:
        self._skip = min(rows, self._file.metadata.num_rows)
        return self._skip

    def __iter__(self) -> Iterator[Row]:
        """Skipped row groups are not read; skipped rows inside a group are read and dropped."""
        metadata = self._file.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        group, number = 0, 0
        while group < len(sizes) and number + sizes[group] <= self._skip:
            number += sizes[group]
            group += 1
        for batch in self._batches(range(group, len(sizes))):
            drop = min(max(self._skip - number, 0), batch.num_rows)
            yield from self._rows(batch.slice(drop), number + drop)
            number += batch.num_rows

    def _batches(self, groups: range) -> Iterator[Any]:
        columns = [self._options.column, self._options.id_column or self._options.column]
        batches = self._file.iter_batches(
            PARQUET_BATCH_ROWS, row_groups=groups, columns=list(dict.fromkeys(columns))
        )
        while True:
            try:
                batch = next(batches, None)
            except (OSError, ValueError) as error:
                raise InputError(
                    f"{self._name}: expected readable pages, got {one_line(error)}"
                ) from None
            if batch is None:
                return
            yield batch

    def _rows(self, batch: Any, number: int) -> Iterator[Row]:
        options = self._options
        texts = batch.column(options.column)
        ids = batch.column(options.id_column) if options.id_column else None
        for i in range(batch.num_rows):
            number += 1
            place = f"{self._name}:{number}"
            text = _scalar(texts[i], place, options.errors)
            if not isinstance(text, str):
                raise InputError(
                    f"{place}: expected a string in column {options.column!r}, got null"
                )
            row_id = None
            if ids is not None and options.id_column is not None:
                row_id = _id(_scalar(ids[i], place, options.errors), options.id_column, place)
            yield Row(text, row_id, self._name, number)

    def close(self) -> None:
        self._file.close()


def line_starts(path: Path, first: int, every: int) -> tuple[int, list[tuple[int, int]]]:
    """Lines of a file, and ``(line, byte)`` where lines ``first``, ``first + every``, ... begin.

    Lines are counted as `LineReader` reads them, from 0; nothing is decoded.
    """
    starts, wanted, lines, at, ends = [], first, 0, 0, True
    with open(path, "rb", buffering=0) as file:
        while block := file.read(_COUNTED_BYTES):
            if at == 0 and wanted == 0:
                starts.append((0, 0))
                wanted += every
            begin = len(_BOM) if at == 0 and block.startswith(_BOM) else 0
            found, stop = block.count(b"\n", begin), begin
            seen = 0
            while wanted - lines <= found:
                for _ in range(wanted - lines - seen):
                    stop = block.index(b"\n", stop) + 1
                seen = wanted - lines
                starts.append((wanted, at + stop))
                wanted += every
            lines, at = lines + found, at + len(block)
            ends = block.endswith(b"\n") or len(block) == begin
    lines += not ends
    return lines, [(line, byte) for line, byte in starts if line < lines]


def file_starts(
    path: Path, options: ReadOptions, first: int, every: int
) -> tuple[int, list[tuple[int, int | None]]]:
    """Rows of a file, and where rows ``first``, ``first + every``, ... begin, for `Reader.skip`.

    Raises:
        InputError: A Parquet file that cannot be read, or lacks a column.
    """
    if options.whole_files:
        rows = 1
    elif path.suffix.lower() == ".parquet":
        reader = _ParquetReader(path, options)
        rows = reader.rows
        reader.close()
    else:
        lines, starts = line_starts(path, first, every)
        return lines, list(starts)
    return rows, [(row, None) for row in range(first, rows, every)]


def _scalar(value: Any, place: str, errors: str) -> object:
    """Parquet writers may put any bytes into a string column; Arrow decodes on access."""
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return _decode(error.object, place, errors)


def _open_parquet(path: Path) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError(
            f"{path}: expected pyarrow to be installed for .parquet files, got none; "
            "pip install 'neobert-kernels[parquet]'"
        ) from None
    try:
        # pre_buffer would hold a whole row group; a buffer of 1 MiB reads page by page.
        return pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path}: expected a Parquet file, got {one_line(error)}") from None


def _check_columns(schema: Any, path: Path, options: ReadOptions) -> None:
    import pyarrow

    wanted = [options.column] + ([options.id_column] if options.id_column else [])
    for column in wanted:
        if column not in schema.names:
            raise InputError(
                f"{path}: expected a column {column!r}, got columns {', '.join(schema.names)}"
            )
    kind = schema.field(options.column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if kind not in (pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()):
        raise InputError(
            f"{path}: expected strings in column {options.column!r}, "
            f"got {schema.field(options.column).type}"
        )


def _decode(data: bytes, place: str, errors: str) -> str:
    try:
        return data.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{place}: expected UTF-8, got byte 0x{data[error.start]:02x} at column "
            f"{error.start + 1} ({error.reason}){ERRORS_HINT}"
        ) from None


def _without_surrogates(text: str, place: str, errors: str) -> str:
    """JSON's escapes can spell half of a surrogate pair, which UTF-8 cannot."""
    if errors == "strict" and _SURROGATES.search(text):
        raise InputError(f"{place}: expected valid Unicode, got a lone surrogate{ERRORS_HINT}")
    return _SURROGATES.sub("\ufffd", text)


def _kind(value: object) -> str:
    """JSON's own word for a value's type."""
    names: dict[type, str] = {
        dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"
    }  # fmt: skip
    return names.get(type(value), "a number")


def _member(value: Mapping[str, object], key: str, place: str) -> object:
    if key not in value:
        fields = ", ".join(map(repr, value)) or "none"
        raise InputError(f"{place}: expected a field {key!r}, got fields {fields}")
    return value[key]


def _id(value: object, key: str, place: str) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise InputError(
            f"{place}: expected a string or an integer in {key!r}, got {type(value).__name__}"
        )
    return str(value)


def has_surrogates(text: str) -> bool:
    """Whether half of a surrogate pair is in it, as Python puts for a byte that is not UTF-8."""
    return not text.isascii() and _SURROGATES.search(text) is not None


def escaped(text: str) -> str:
    """The text with the bytes that are not UTF-8 as ``\\xff``, and other halves as ``\\ud800``."""
    try:
        return os.fsencode(text).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:
        return text.encode("utf-8", "backslashreplace").decode()


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _open_lines(path: Path, options: ReadOptions) -> Reader:
    return LineReader(open(path, "rb", buffering=1 << 20), str(path), options)


def _open_json(path: Path, options: ReadOptions) -> Reader:
    return _JsonReader(open(path, "rb", buffering=1 << 20), str(path), options)


READERS: dict[str, Callable[[Path, ReadOptions], Reader]] = {
    ".txt": _open_lines,
    ".jsonl": _open_json,
    ".parquet": _ParquetReader,
}
WHOLE_READERS: dict[str, Callable[[Path, ReadOptions], Reader]] = {
    ".txt": _WholeFileReader,
    ".md": _WholeFileReader,
}
