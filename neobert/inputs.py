"""Streaming readers: texts from lines, JSON lines, Parquet columns, whole files and folders.

A `Source` yields `Row`s in a fixed order and can start anywhere, so an interrupted job resumes.
Memory stays bounded: one line, or one Parquet batch, at a time.

Rules, the same on every platform:

* Text is UTF-8, with or without a byte order mark. Lines end in LF or CRLF, and in nothing else.
* ``.txt``: every line is a text; a blank line is the empty text.
* ``.jsonl``: every line is an object with a string under ``field``.
* ``.parquet``: every value of the string column ``column`` is a text.
* A folder is read recursively in the order of its relative paths; hidden names are
  left out, and links to folders are not followed.
* A pattern (``data/*.parquet``, ``**`` for any folders) stands for what matches, in the same order.
* ``whole_files``: every ``.txt`` and ``.md`` file is one text, and its relative path is its id.
"""

import fnmatch
import glob
import hashlib
import itertools
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from neobert.readers import (
    READERS,
    WHOLE_READERS,
    InputError,
    LineReader,
    ReadOptions,
    Row,
    escaped,
    has_surrogates,
    one_line,
)

STDIN = "-"


class Source(ABC):
    """Texts in a fixed order. `replayable` tells whether `rows` may be called again."""

    name: str
    options: ReadOptions
    replayable: bool

    @abstractmethod
    def rows(self, skip: int = 0) -> Iterator[Row]:
        """Every row after the first `skip` ones."""

    @abstractmethod
    def identity(self) -> dict[str, str | int]:
        """What tells this input from another one, as it is now."""

    @property
    def parts(self) -> int:
        """How many sources of their own the rows are, one after the other."""
        return 1

    def part(self, number: int) -> "Source":
        """One of them, which can be read beside the others."""
        return self


class StreamSource(Source):
    """Lines of standard input: read once, in order."""

    name = "standard input"
    replayable = False

    def __init__(self, stream: BinaryIO, options: ReadOptions) -> None:
        self._stream, self.options = stream, options

    def rows(self, skip: int = 0) -> Iterator[Row]:
        reader = LineReader(self._stream, self.name, self.options)
        reader.skip(skip)
        yield from reader

    def identity(self) -> dict[str, str | int]:
        return {"input": STDIN}


class FileSource(Source):
    """The rows of files, one file after the other."""

    replayable = True

    def __init__(
        self, root: Path, files: list[Path], options: ReadOptions, pattern: str = ""
    ) -> None:
        self.name, self.options = str(root / pattern), options
        self._root, self.files, self._pattern = root, files, pattern
        self._readers = WHOLE_READERS if options.whole_files else READERS

    def rows(self, skip: int = 0) -> Iterator[Row]:
        return self.rows_from(0, skip)

    def rows_from(self, number: int, skip: int = 0, offset: int | None = None) -> Iterator[Row]:
        """Every row of file ``number`` and those behind it, after the first ``skip`` ones.

        With ``offset`` the skipped rows are all of that one file, and take so many bytes of it.
        """
        for path in self.files[number:]:
            reader = self._readers[path.suffix.lower()](path, self.options)
            try:
                if skip:
                    skip -= reader.skip(skip, offset)
                    offset = None
                if skip:
                    continue
                if self.options.whole_files:
                    yield from (row._replace(id=self.label(path)) for row in reader)
                else:
                    yield from reader
            finally:
                reader.close()

    @property
    def parts(self) -> int:
        return len(self.files)

    def part(self, number: int) -> "FileSource":
        part = FileSource(self._root, [self.files[number]], self.options)
        part.name = str(self.files[number])
        return part

    def label(self, path: Path) -> str:
        """A name that does not depend on where the folder stands."""
        return path.name if path == self._root else path.relative_to(self._root).as_posix()

    def identity(self) -> dict[str, str | int]:
        digest, size = hashlib.sha256(), 0
        for path in self.files:
            status = path.stat()
            size += status.st_size
            digest.update(f"{self.label(path)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        return {
            "input": str(self._root.resolve() / self._pattern),
            "input files": len(self.files),
            "input bytes": size,
            "input times": digest.hexdigest()[:16],
        }


def open_source(
    path: str, options: ReadOptions | None = None, exclude: Collection[Path] = ()
) -> Source:
    """Open a file, a folder, a pattern, or standard input (``"-"``, read as lines).

    Args:
        path: What the user named.
        options: How texts are taken out; the defaults of `ReadOptions` if None.
        exclude: Files and folders to leave out of a folder, such as the job's own output.

    Raises:
        InputError: Nothing there to read, or not in a form that is understood.
    """
    options = options or ReadOptions()
    if path == STDIN:
        if options.has_ids:
            raise InputError("input: expected a file or folder for ids or whole files, got '-'")
        return StreamSource(sys.stdin.buffer, options)
    root, pattern = Path(path), ""
    kinds = WHOLE_READERS if options.whole_files else READERS
    expected = ", ".join(kinds)
    if not root.exists() and glob.has_magic(path):
        files = _match(path, kinds, exclude)
        if not files:
            raise InputError(f"input: expected {expected} files to match, got none for {path}")
        root, pattern = _plain_part(root)
    elif not root.exists():
        raise InputError(f"input: expected an existing file or folder, got {path}")
    elif root.is_dir():
        files = _walk(root, kinds, exclude)
        if not files:
            raise InputError(f"input: expected {expected} files in the folder, got none in {path}")
    elif not root.is_file():
        raise InputError(f"input: expected a regular file, got {path}; pipe it into --input -")
    elif root.suffix.lower() not in kinds:
        raise InputError(
            f"input: expected a name ending in {expected}, got {path}"
            + ("" if options.whole_files else " (lines of any file can be piped into --input -)")
        )
    else:
        files = [root]
    for file in files:
        if has_surrogates(str(file)):
            raise InputError(
                f"input: expected file names in UTF-8, got {escaped(str(file))}; rename it"
            )
        if file.exists() and not os.access(file, os.R_OK):
            raise InputError(f"input: expected a readable file, got {file} (permission denied)")
    if options.id_column is not None and any(file.suffix.lower() == ".txt" for file in files):
        raise InputError(f"id-column: expected .jsonl or .parquet input, got .txt files in {path}")
    return FileSource(root, files, options, pattern)


def overlaps(path: str, folder: Path) -> bool:
    """Whether an input and a folder are, or hold, one another.

    A pattern holds what a file in the folder could match.
    """
    root, pattern = Path(path), ""
    if not root.exists() and glob.has_magic(path):
        root, pattern = _plain_part(root)
    root, folder = root.resolve(), folder.resolve()
    if root.is_relative_to(folder):
        return True
    inside = folder.is_relative_to(root)
    return inside and _may_hold(Path(pattern).parts, (*folder.relative_to(root).parts, None))


def _may_hold(pattern: Sequence[str], names: Sequence[str | None]) -> bool:
    """Whether a pattern matches the path of these names, or a folder of it; None is any name."""
    if not pattern or not names:
        return not pattern
    if pattern[0] == "**":
        return _may_hold(pattern[1:], names) or _may_hold(pattern, names[1:])
    name = names[0]
    matches = name is None or fnmatch.fnmatchcase(name, pattern[0])
    return matches and _may_hold(pattern[1:], names[1:])


def _match(pattern: str, kinds: Collection[str], exclude: Collection[Path]) -> list[Path]:
    """Files that match, and what is in folders that match, in the order of their paths."""
    left_out = {path.resolve() for path in exclude}
    found: set[Path] = set()
    for path in map(Path, glob.iglob(pattern, recursive=True)):
        place = path.resolve()
        if not left_out.isdisjoint((place, *place.parents)):
            continue
        if path.is_dir():
            found.update(_walk(path, kinds, exclude))
        elif path.suffix.lower() in kinds and not _is_special(path):
            found.add(path)
    return sorted(found, key=lambda path: path.as_posix())


def _plain_part(pattern: Path) -> tuple[Path, str]:
    """The folder that a pattern names before its first wildcard, and the rest."""
    plain = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))
    return plain, pattern.relative_to(plain).as_posix()


def _walk(root: Path, kinds: Collection[str], exclude: Collection[Path]) -> list[Path]:
    def fail(error: OSError) -> None:
        raise error

    left_out = {path.resolve() for path in exclude}
    found: list[Path] = []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and Path(folder, name).resolve() not in left_out
        ]
        for name in names:
            path = Path(folder, name)
            if name.startswith(".") or path.suffix.lower() not in kinds or _is_special(path):
                continue
            if path.resolve() not in left_out:
                found.append(path)
    return sorted(found, key=lambda path: path.relative_to(root).as_posix())


def _is_special(path: Path) -> bool:
    """A broken link is not special: opening it gives the error that the user should see."""
    return path.exists() and not path.is_file()


def source_record(source: Source) -> dict[str, Any]:
    """What a saved index needs to open its texts again with `source_from_record`."""
    return {**vars(source.options), "identity": source.identity()}


def source_from_record(record: Mapping[str, Any], exclude: Collection[Path] = ()) -> Source:
    """Open the texts that an index was made from; `exclude` as in `open_source`.

    Raises:
        InputError: They were standard input, are gone, or the record is not understood.
    """
    try:
        identity = dict(record["identity"])
        options = ReadOptions(**{k: v for k, v in record.items() if k != "identity"})
        path = str(identity["input"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"index: expected a record of its input, got {one_line(error)}") from None
    if path == STDIN:
        raise InputError("texts: expected the index's input to be a file, got standard input")
    return open_source(path, options, exclude)
