"""Pairs, and pairs with hard negatives, from local files or the hub."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neobert.readers import InputError, LineReader, ReadOptions, escaped, one_line

QUERY, POSITIVE, NEGATIVE = "query", "positive", "negative"
FORMATS = (".jsonl", ".tsv")


@dataclass(frozen=True, eq=False)
class PairSet:
    """One data set, which is one task: a batch is drawn from one of them.

    Attributes:
        name: What instructions call it.
        columns: ``query``, ``positive``, and ``negative_1`` and so on, of one length.
    """

    name: str
    columns: dict[str, list[str]]

    def __len__(self) -> int:
        return len(self.columns[QUERY])

    @property
    def fingerprint(self) -> str:
        hashed = hashlib.sha256()
        for name, texts in self.columns.items():
            hashed.update(json.dumps([name, texts]).encode())
        return hashed.hexdigest()[:16]


def load_pairs(source: str, revision: str | None = None) -> PairSet:
    """A ``.jsonl`` or ``.tsv`` file, or the training split of a data set on the hub.

    A line is an object with strings under ``query`` (or ``anchor``) and ``positive``, and perhaps a
    string or a list under ``negative``; of a ``.tsv`` file these are the columns of its header. On
    the hub the first column of texts is the query, the second its positive, others are negatives.

    Raises:
        InputError: Nothing there, or a row breaks the rules; the message names it.
    """
    path = Path(source)
    if path.suffix.lower() in FORMATS or path.exists():
        return _read_file(path)
    return _read_hub(source, revision)


def _read_file(path: Path) -> PairSet:
    if not path.is_file():
        raise InputError(f"data: expected a file, got {path}")
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"data: expected a name ending in {' or '.join(FORMATS)}, got {path}")
    read = _objects if path.suffix.lower() == ".jsonl" else _table
    rows: list[list[str]] = []
    with open(path, "rb") as stream:
        for place, values in read(LineReader(stream, str(path), ReadOptions())):
            row = _row(values, place)
            if rows and len(row) != len(rows[0]):
                rule = f"{len(rows[0]) - 2} negatives as in the first row"
                raise InputError(f"{place}: expected {rule}, got {len(row) - 2}")
            rows.append(row)
    if not rows:
        raise InputError(f"{path}: expected pairs, got none")
    return _pair_set(path.stem, [list(column) for column in zip(*rows, strict=True)])


def _objects(reader: LineReader) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for line in reader:
        if line.text.strip():
            try:
                values = json.loads(line.text)
            except (RecursionError, ValueError) as error:
                got = one_line(error)
                raise InputError(f"{line.place}: expected a JSON object, got {got}") from None
            if not isinstance(values, dict):
                got = type(values).__name__
                raise InputError(f"{line.place}: expected a JSON object, got {got}")
            yield line.place, values


def _table(reader: LineReader) -> Iterator[tuple[str, Mapping[str, Any]]]:
    names: list[str] = []
    for line in reader:
        fields = line.text.split("\t")
        if not names:
            names = fields
        elif line.text:
            if len(fields) != len(names):
                got = f"expected {len(names)} fields, got {len(fields)}"
                raise InputError(f"{line.place}: {got}")
            yield line.place, dict(zip(names, fields, strict=True))


def _row(values: Mapping[str, Any], place: str) -> list[str]:
    values = {"query": values.get("anchor"), **values}
    negatives = values.get(NEGATIVE, [])
    negatives = [negatives] if isinstance(negatives, str) else negatives
    if not isinstance(negatives, list):
        raise InputError(f"{place}: expected a string or a list of them under 'negative'")
    row = [values[QUERY], values.get(POSITIVE), *negatives]
    for name, text in zip([QUERY, POSITIVE, *[NEGATIVE] * len(negatives)], row, strict=True):
        if not isinstance(text, str) or not text.strip():
            got = escaped(repr(text))[:50]
            raise InputError(f"{place}: expected a text under {name!r}, got {got}")
    return row


def _read_hub(name: str, revision: str | None) -> PairSet:
    instead = "local .jsonl or .tsv files can be named instead"
    try:
        import datasets
    except ImportError:
        rule = "the package datasets, pip install 'neobert-kernels[train]'"
        raise InputError(f"data: expected {rule}, got none; {instead}") from None
    repository, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(repository, config or None, split="train", revision=revision)
    except (OSError, ValueError, RuntimeError) as error:
        got = f"{type(error).__name__}: {one_line(error)[:200]}"
        raise InputError(f"data: expected {name} from the hub, got {got}; {instead}") from None
    texts = [c for c in rows.column_names if rows.features[c].dtype == "string"]
    if len(texts) < 2:
        got = ", ".join(rows.column_names)
        raise InputError(f"{name}: expected two columns of texts, got {got}")
    return _pair_set(repository.rpartition("/")[2], [list(rows[column]) for column in texts])


def _pair_set(name: str, columns: list[list[str]]) -> PairSet:
    names = [QUERY, POSITIVE, *(f"{NEGATIVE}_{i}" for i in range(1, len(columns) - 1))]
    return PairSet(name, dict(zip(names, columns, strict=True)))
