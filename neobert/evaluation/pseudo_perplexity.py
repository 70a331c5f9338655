"""Pseudo-perplexity by length: every token of a document masked alone, exp(mean cross-entropy).

    RUNS/MODEL/run.json            what decides the numbers
               documents.jsonl     a line per document read, in order
    RUNS/pseudo-perplexity.{md,html,png}    all models there, by length

A line is on disk before the next document begins; a torn last line is cut when a run goes on.
"""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from neobert import files
from neobert.evaluation.masked_lm import MaskedLM
from neobert.inputs import Source
from neobert.readers import InputError, one_line
from neobert.tables import Section, Table, html_page, markdown_page
from neobert.truncation import token_ids

VERSION = 1
KIND = "neobert pseudo-perplexity"
SEED = 0

# Lengths that a row of the table, and a point of the picture, ends at.
BINS = (64, 128, 256, 512, 768, 1024, 1536, 2048, 2560, 3072, 3584, 4096, 8192)

TITLE = "Pseudo-perplexity by length"
NOTE = (
    "Every token of a document (or a sample of them, where the table says so) is masked alone and "
    "predicted from all others; exp of the mean cross-entropy, averaged over documents. Documents "
    "count where their length in tokens is."
)


@dataclass(frozen=True)
class Document:
    """One document read.

    Attributes:
        place: Where its text stands.
        tokens: Its length, framing tokens included.
        masked: Tokens that were predicted; 0 where it was left out as too short.
        loss: Mean cross-entropy over them, in nats.
    """

    place: str
    tokens: int
    masked: int
    loss: float | None

    @property
    def perplexity(self) -> float | None:
        return None if self.loss is None else math.exp(min(self.loss, 700.0))


class Job:
    """The folder of one model's documents, held by one process; use it as a context."""

    def __init__(self, folder: Path, identity: Mapping[str, Any], restart: bool = False) -> None:
        """Begin, or go on.

        Raises:
            InputError: The folder holds something else, or another process works in it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self._lock = files.lock(folder)
        try:
            self.documents = self._open(json.loads(json.dumps(identity)), restart)
        except BaseException:
            self._lock.close()
            raise
        self._file: BinaryIO = open(folder / "documents.jsonl", "ab")  # noqa: SIM115

    def _open(self, identity: dict[str, Any], restart: bool) -> list[Document]:
        path, lines = self.folder / "run.json", self.folder / "documents.jsonl"
        if restart:
            lines.unlink(missing_ok=True)
            path.unlink(missing_ok=True)
        if not path.exists():
            if lines.exists():
                raise InputError(f"output: expected {path} beside its documents, got none")
            content = {"kind": KIND, "version": VERSION, **identity}
            files.write_object(path, content)
            return []
        changed = files.differences(read_identity(self.folder), identity)
        if changed:
            raise InputError(
                f"output: expected the run that began {self.folder}, got {'; '.join(changed)} "
                "(--restart discards its documents; or choose another --output)"
            )
        documents, size = read_documents(self.folder)
        if lines.exists():
            os.truncate(lines, size)
        return documents

    def append(self, document: Document) -> None:
        self._file.write((json.dumps(asdict(document)) + "\n").encode())
        self._file.flush()
        os.fsync(self._file.fileno())
        self.documents.append(document)

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._lock.close()


def measure(
    masked_lm: MaskedLM,
    source: Source,
    job: Job,
    *,
    max_tokens: int,
    least: int = 0,
    positions: int | None = None,
    most: int | None = None,
    done: Callable[[Document], None] = lambda document: None,
) -> None:
    """Work through the documents that ``job`` does not have yet.

    Args:
        masked_lm, source, job: Who predicts, what, and where results go.
        max_tokens: Tokens of one batch of masked copies.
        least: Documents of fewer tokens are left out.
        positions: Tokens masked of each document, drawn at random; None masks all.
        most: Documents read in all; None reads all.
        done: Called after each document.
    """
    start = len(job.documents)
    rows = itertools.islice(source.rows(start), None if most is None else max(most - start, 0))
    for number, row in enumerate(rows, start):
        (kept,), _ = token_ids(masked_lm.tokenizer, [row.text], masked_lm.max_length, number)
        ids = np.array(kept, np.int64)
        where = masked_lm.maskable(ids)
        if len(ids) < least or not len(where):
            document = Document(row.place, len(ids), 0, None)
        else:
            if positions is not None and positions < len(where):
                draw = np.random.default_rng([SEED, number])
                where = np.sort(draw.choice(where, positions, replace=False))
            loss = masked_lm.loss(ids, where, max_tokens)
            document = Document(row.place, len(ids), len(where), loss)
        job.append(document)
        done(document)


def read_identity(folder: Path) -> dict[str, Any]:
    path = folder / "run.json"
    content = files.read_object(path)
    if content.pop("kind", None) != KIND or content.pop("version", None) != VERSION:
        raise InputError(f"{path}: expected a run of pseudo-perplexity, got another file")
    return content


def read_documents(folder: Path) -> tuple[list[Document], int]:
    """The documents on disk, and the bytes that their whole lines take."""
    path = folder / "documents.jsonl"
    data = path.read_bytes() if path.exists() else b""
    size = data.rfind(b"\n") + 1
    documents = []
    for number, line in enumerate(data[:size].splitlines(), 1):
        try:
            documents.append(Document(**json.loads(line)))
        except (RecursionError, TypeError, ValueError) as error:
            raise InputError(
                f"{path}:{number}: expected a document, got {one_line(error)}"
            ) from None
    return documents, size


def by_length(documents: list[Document]) -> Iterator[tuple[str, list[Document]]]:
    """The documents that were measured, by the length that their row ends at."""
    ends = [*BINS, math.inf]
    for low, high in zip([0, *BINS], ends, strict=True):
        inside = [d for d in documents if d.loss is not None and low < d.tokens <= high]
        if inside:
            yield (f"to {high:,}" if high < math.inf else f"over {low:,}"), inside


def mean_perplexity(documents: list[Document]) -> float:
    """exp of the documents' mean loss, each counting once."""
    losses = [document.loss for document in documents if document.loss is not None]
    return math.exp(min(sum(losses) / len(losses), 700.0))


def shown_mean(documents: list[Document]) -> str:
    value = mean_perplexity(documents)
    return f"{value:.2f}" if value < 1e6 else f"{value:.2e}"


@dataclass(frozen=True)
class Result:
    """A model's documents, and what decided their numbers."""

    identity: dict[str, Any]
    documents: list[Document]

    @property
    def name(self) -> str:
        return str(self.identity["name"])

    @property
    def masked(self) -> str:
        """How many tokens of a document."""
        positions = self.identity["positions"]
        return "all" if positions is None else str(positions)

    @property
    def measured(self) -> list[Document]:
        return [document for document in self.documents if document.loss is not None]


def collect(*roots: Path) -> list[Result]:
    """All results under ``roots`` with a measured document."""
    found = [
        Result(read_identity(folder), read_documents(folder)[0])
        for folder in files.find_runs(KIND, *roots)
    ]
    return [result for result in found if result.measured]


def report(root: Path) -> list[Path]:
    """Write the table and the picture of every model under ``root``; the files written.

    Raises:
        InputError: No model has a measured document there.
    """
    found = collect(root)
    if not found:
        raise InputError(f"output: expected measured documents in {root}, got none")
    rows = [[result.name, result.masked, *row] for result in found for row in _rows(result)]
    columns = ("model", "masked", "tokens", "documents", "mean length", "pseudo-perplexity")
    table = Table(columns, rows, numbers_from=3)
    picture = draw({result.name: result for result in found}, root / "pseudo-perplexity.png")
    section = Section(table=table, picture=picture)
    files.write_atomically(root / "pseudo-perplexity.md", markdown_page(TITLE, NOTE, [section]))
    files.write_atomically(root / "pseudo-perplexity.html", html_page(TITLE, NOTE, [section]))
    written = [root / "pseudo-perplexity.md", root / "pseudo-perplexity.html"]
    return written + ([picture] if picture else [])


def draw(results: Mapping[str, Result], path: Path) -> Path | None:
    """A curve over the length, and the documents, of each result; None without matplotlib."""
    from neobert import pictures

    lines, points = {}, {}
    for name, result in results.items():
        groups = [group for _, group in by_length(result.documents)]
        lines[name] = [(_mean_length(group), mean_perplexity(group)) for group in groups]
        points[name] = [
            (d.tokens, d.perplexity) for group in groups for d in group if d.perplexity is not None
        ]
    return pictures.curves(path, TITLE, "tokens", "pseudo-perplexity", lines, points)


def _rows(result: Result) -> Iterator[list[str]]:
    for name, group in [*by_length(result.documents), ("all", result.measured)]:
        mean = f"{_mean_length(group):,.0f}"
        yield [name, f"{len(group):,}", mean, shown_mean(group)]


def _mean_length(documents: list[Document]) -> float:
    return sum(document.tokens for document in documents) / len(documents)
