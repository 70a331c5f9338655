"""Encode a source of texts into a file: checked first, then streamed, resumable after a kill.

Rows are committed a window at a time, and a resumed job starts at a window's border, so the encoder
meets the same windows and the file gets the same bytes as in one uninterrupted run.
"""

import hashlib
import itertools
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from neobert.commands.progress import Progress
from neobert.inputs import Source, source_record
from neobert.outputs import Partial, State, interruption
from neobert.readers import InputError

WINDOW = 4096


class Chunk(Protocol):
    """One encoded window, as `neobert.encode.Chunk`."""

    @property
    def embeddings(self) -> np.ndarray: ...
    @property
    def tokens(self) -> int: ...
    @property
    def truncated(self) -> int: ...


class TextEncoder(Protocol):
    """What a job needs of `neobert.encode.Encoder`."""

    @property
    def dim(self) -> int: ...
    @property
    def pooling(self) -> str: ...
    @property
    def normalize(self) -> bool: ...
    @property
    def max_length(self) -> int: ...
    @property
    def fingerprint(self) -> Mapping[str, str | int]: ...

    def stream(
        self,
        texts: Iterable[str],
        window: int = ...,
        progress: Callable[[int, int], None] | None = ...,
    ) -> Iterator[Chunk]: ...

    def stream_windows(
        self,
        windows: Iterable[Sequence[str]],
        window: int = ...,
        progress: Callable[[int, int], None] | None = ...,
    ) -> Iterator[Chunk]: ...


@dataclass(frozen=True)
class Summary:
    """What a finished job wrote; `seconds` spent encoding, over all its runs."""

    output: Path
    texts: int
    tokens: int
    truncated: int
    seconds: float
    dim: int
    dtype: str
    max_length: int

    def __str__(self) -> str:
        rate = self.tokens / self.seconds if self.seconds else 0.0
        return (
            f"encoded {self.texts:,} texts, {self.tokens:,} tokens "
            f"({self.truncated:,} texts truncated to {self.max_length:,} tokens) "
            f"in {self.seconds:,.1f} s, {rate:,.0f} tokens/s: "
            f"{self.output} [{self.texts}, {self.dim}] {self.dtype}"
        )


def encode_file(
    load: Callable[[], TextEncoder],
    source: Source,
    output: Path,
    *,
    options: Mapping[str, Any],
    window: int = WINDOW,
    output_dtype: str = "float32",
    overwrite: bool = False,
    restart: bool = False,
    trust_input: bool = False,
    quiet: bool = False,
) -> Summary:
    """Embed every text of ``source`` into ``output`` (from `neobert.outputs.check_output`).

    Args:
        load: Builds the encoder; called once the input has been read through without an error.
        options: What else decides the numbers (model, dtype, ...): a resumed job needs the same.
        window: Texts encoded between two commits.
        output_dtype: Precision of the embeddings that are written, "float32" or "float16".
        overwrite: Replace an existing output.
        restart: Discard the rows of an earlier, unfinished run.
        trust_input: Resume although the input's files have other times than before.
        quiet: No progress and no notes on stderr.

    Raises:
        InputError: The input, or a partial result of other options.
        OutputError: The disk is full or fails; finished rows are kept.
        KeyboardInterrupt: With a message that says what is kept.
    """
    identity = source.identity()
    job = {**options, **vars(source.options), **identity, "window": window}
    job["output_dtype"] = output_dtype
    partial = Partial.open(output, restart)
    try:
        partial.require_same(job, trust_input)
        if partial.state.finished:
            partial.publish()
            note(quiet, f"{output} was already complete")
            return _summary(partial.state, output)
        if partial.state.rows:
            note(quiet, f"resuming at row {partial.state.rows:,}")
        feed = _Feed(source, partial.state, window, quiet)
        encoder = load()
        job |= {"encoder dim": encoder.dim, "encoder max_length": encoder.max_length}
        job |= {f"encoder {key}": value for key, value in encoder.fingerprint.items()}
        partial.require_same(job, trust_input)
        partial.begin(job, encoder.dim, source.options.has_ids, output_dtype)
        _encode(encoder, feed, partial, window, quiet)
        if source.identity() != identity or partial.state.rows != (feed.total or feed.count):
            raise InputError(
                f"input: expected no change while it was read, got one in {source.name}; "
                f"--restart begins again"
            )
        partial.finish(_description(encoder, source, options, partial.state), overwrite)
        return _summary(partial.state, output)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(interruption(output)) from None
    finally:
        if partial.state.rows or partial.state.finished:
            partial.close()
        else:
            partial.discard()


class _Feed:
    """Hands texts to the encoder, and ids and digests of finished windows to the writer.

    A file's identity tells whether it changed since an interrupted run. A stream has none, so the
    digest of its finished rows is kept and checked when the same rows come in again.
    The encoder may read ahead of the writer, in a thread of its own.
    """

    def __init__(self, source: Source, state: State, window: int, quiet: bool) -> None:
        self._window = window
        self._ids: deque[str | None] = deque()
        self._digests: deque[str] = deque()
        self._digest = None if source.replayable else hashlib.sha256()
        self._first = self.count = state.rows
        self.total = state.texts
        if self._digest is None:
            if not state.rows:
                self.total = state.texts = _count(source, quiet)
            self._rows = source.rows(skip=state.rows)
            return
        self._rows = source.rows()
        for row in itertools.islice(self._rows, state.rows):
            self._digest.update(row.text.encode() + b"\n")
        if state.rows and self._digest.hexdigest() != state.digest:
            raise InputError(
                f"resume: expected the same first {state.rows:,} lines on {source.name}, "
                "got others (--restart discards the finished rows)"
            )
        first = next(self._rows, None)
        if first is None and not state.rows:
            raise InputError(f"input: expected at least one text, got none on {source.name}")
        self._rows = itertools.chain([] if first is None else [first], self._rows)

    def texts(self) -> Iterator[str]:
        """All rows not yet done. A window's digest is taken before its last text is out."""
        for row in self._rows:
            self.count += 1
            self._ids.append(row.id)
            if self._digest is not None:
                self._digest.update(row.text.encode() + b"\n")
                if (self.count - self._first) % self._window == 0:
                    self._digests.append(self._digest.hexdigest())
            yield row.text
        if self._digest is not None and (self.count - self._first) % self._window:
            self._digests.append(self._digest.hexdigest())

    def take(self, rows: int) -> tuple[list[str], str]:
        """Ids of the next `rows` texts, and the digest of all texts up to there."""
        ids = [self._ids.popleft() for _ in range(rows)]
        return [i for i in ids if i is not None], self._digests.popleft() if self._digests else ""


def _encode(encoder: TextEncoder, feed: _Feed, partial: Partial, window: int, quiet: bool) -> None:
    started = time.monotonic()
    with Progress(feed.total, partial.state.rows, quiet=quiet) as progress:
        for chunk in encoder.stream(feed.texts(), window=window, progress=progress.update):
            precision = partial.state.job["output_dtype"]
            embeddings = rounded(chunk.embeddings, precision, partial.state.rows)
            ids, digest = feed.take(len(chunk.embeddings))
            now = time.monotonic()
            partial.append(
                embeddings,
                ids,
                tokens=chunk.tokens,
                truncated=chunk.truncated,
                seconds=now - started,
                digest=digest,
            )
            started = now


def rounded(embeddings: np.ndarray, precision: str, first: int) -> np.ndarray:
    """Embeddings as they are stored; ``first`` is the row of the first one.

    Raises:
        InputError: A row is not numbers, or has one beyond what float16 can hold.
    """
    _require_finite(embeddings, first, "finite embeddings", "--dtype float32 may help")
    with np.errstate(over="ignore"):
        stored = embeddings.astype(precision, copy=False)
    rule = "embeddings of at most 65,504 in float16"
    _require_finite(stored, first, rule, "--output-dtype float32 keeps it")
    return stored


def _require_finite(embeddings: np.ndarray, first: int, rule: str, hint: str) -> None:
    finite = np.isfinite(embeddings).all(1)
    if not finite.all():
        raise InputError(
            f"model: expected {rule}, got NaN or infinity in row "
            f"{first + int(np.argmin(finite))}; {hint}"
        )


def _count(source: Source, quiet: bool) -> int:
    """Read everything once: errors come before the model, and the progress has a total."""
    count, last = 0, time.monotonic()
    for count, _ in enumerate(source.rows(), 1):
        if count % 100_000 == 0 and time.monotonic() - last > 5:
            last = time.monotonic()
            note(quiet, f"checking the input: {count:,} texts so far")
    if not count:
        raise InputError(f"input: expected at least one text, got none in {source.name}")
    return count


def _description(
    encoder: TextEncoder, source: Source, options: Mapping[str, Any], state: State
) -> dict[str, Any]:
    """What stands beside the embeddings. No times and no machine: same job, same bytes."""
    return {
        "format": "neobert-embeddings",
        "version": 1,
        **{key: options[key] for key in ("model", "revision") if key in options},
        "rows": state.rows,
        "output_dtype": state.job["output_dtype"],
        **encoder_record(encoder),
        "tokens": state.tokens,
        "truncated": state.truncated,
        "input": source_record(source),
    }


def encoder_record(encoder: TextEncoder) -> dict[str, Any]:
    """What a description says of the model that made its embeddings."""
    return {
        "dim": encoder.dim,
        "pooling": encoder.pooling,
        "normalize": encoder.normalize,
        "encoder": dict(encoder.fingerprint),
    }


def _summary(state: State, output: Path) -> Summary:
    return Summary(
        output,
        state.rows,
        state.tokens,
        state.truncated,
        state.seconds,
        state.job["encoder dim"],
        state.job["output_dtype"],
        state.job["encoder max_length"],
    )


def note(quiet: bool, message: str) -> None:
    if not quiet:
        print(f"neobert: {message}", file=sys.stderr, flush=True)
