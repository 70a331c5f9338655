"""Tokenise a recipe's documents into a store: resumable after a kill, the same bytes in the end.

``STORE.partial/`` holds the files as far as they are, and a state that is replaced only after what
it counts is on disk; what it does not count is cut off on resume. The whole folder moves to its
name at last.
"""

import functools
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from neobert import files
from neobert.commands.progress import Progress
from neobert.inputs import Source
from neobert.loading import load_tokenizer, tokenizer_folder
from neobert.outputs import writing
from neobert.pretraining.recipe import Data
from neobert.pretraining.rules import error
from neobert.pretraining.sources import DatasetSource, chosen, open_documents, pieces, texts
from neobert.pretraining.store import (
    HISTOGRAM,
    INDEX,
    OFFSET,
    OFFSETS,
    SPECIALS,
    VERSION,
    Store,
    Vocabulary,
    read_index,
    sha256,
    shard_name,
)
from neobert.readers import InputError, one_line

COMMIT_SECONDS = 10.0
# One call of the tokenizer: enough for its threads, little memory.
BATCH_DOCUMENTS, BATCH_CHARACTERS = 1024, 1 << 22
STATE = "state.json"

_writing = functools.partial(writing, goal="go on")


@dataclass
class State:
    """What is on disk. ``rows`` counts texts of the source, ``documents`` what became of them."""

    job: dict[str, Any]
    rows: int = 0
    documents: int = 0
    tokens: int = 0
    empty: int = 0
    split: int = 0
    histogram: list[int] = field(default_factory=lambda: [0] * (len(HISTOGRAM) + 1))
    shards: list[dict[str, Any]] = field(default_factory=list)
    shard_documents: int = 0
    shard_tokens: int = 0


class Tokenizer:
    """A fast tokenizer without truncation and without special tokens, and its vocabulary."""

    def __init__(self, data: Data) -> None:
        folder = tokenizer_folder(data.tokenizer, data.tokenizer_revision)
        self.fast = load_tokenizer(folder, None, "data.tokenizer")
        backend = self.fast.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        self.vocabulary = _vocabulary(self.fast, data.tokenizer)
        content = backend.to_str() + repr(self.vocabulary)
        self.digest = hashlib.sha256(content.encode()).hexdigest()[:16]

    def __call__(self, batch: Sequence[str]) -> list[list[int]]:
        return self.fast(
            batch,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # longer than the model takes is what batches are cut for
        )["input_ids"]


def _vocabulary(tokenizer: Any, name: str) -> Vocabulary:
    ids = {}
    for key in ("cls", "sep", "mask", "pad"):
        if (found := getattr(tokenizer, f"{key}_token_id")) is None:
            raise error("data.tokenizer", f"a [{key.upper()}] token", f"none in {name}")
        ids[key] = int(found)
    size = max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1)
    return Vocabulary(size, **ids, special=tuple(sorted(map(int, tokenizer.all_special_ids))))


def prepare(data: Data, *, restart: bool = False, quiet: bool = False) -> Store:
    """Make the store of a recipe, or open it if it is there.

    Args:
        restart: Discard what an earlier, unfinished run left.
        quiet: No progress and no notes on stderr.

    Raises:
        InputError: The texts, the tokenizer, or a store of another recipe, naming the difference.
        OutputError: The disk is full or fails; finished documents are kept.
        KeyboardInterrupt: With a message that says what is kept.
    """
    folder = Path(data.store)
    partial = _partial(folder)
    if folder.exists() and not folder.is_dir():
        raise error("data.store", "a folder", f"the file {folder}")
    source = open_documents(data, exclude=(folder, partial))
    tokenizer = Tokenizer(data)
    job = _job(data, source, tokenizer)
    if folder.exists():
        _require_same(read_index(folder)["job"], job, f"remove {folder} or name another store")
        _note(quiet, f"{folder} is already complete")
        return Store.open(folder)
    with _Writer(partial, job, tokenizer, data.shard_tokens, restart) as writer:
        if not writer.finished:
            if writer.state.rows:
                _note(quiet, f"resuming at text {writer.state.rows:,}")
            try:
                _fill(writer, source, tokenizer, data, quiet)
            except KeyboardInterrupt:
                raise KeyboardInterrupt(_interruption(partial, writer.committed_rows)) from None
            if source.identity() != {key: job[key] for key in source.identity()}:
                rule = "no change while it was read"
                raise error("data", rule, f"one in {source.name}; --restart begins again")
            writer.finish()
        writer.publish(folder)
    return Store.open(folder)


def _partial(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")


def _job(data: Data, source: Source, tokenizer: Tokenizer) -> dict[str, Any]:
    """All that decides the bytes of the store."""
    return {
        **source.identity(),
        **chosen(data),
        "shard_tokens": data.shard_tokens,
        "tokenizer": tokenizer.digest,
    }


def require_chosen(store: Store, data: Data) -> str | None:
    """Refuse a store that was made from other documents than a recipe now names.

    The texts may be gone, or others may have come: what was tokenised counts.

    Returns:
        A note, where the recipe's texts are no longer those of the store.

    Raises:
        InputError: Naming the settings that differ.
    """
    job, way_out = store.index["job"], f"remove {store.folder} or name another store"
    _require_same(job, chosen(data), way_out)
    if data.path is None or not Path(data.path).exists():
        return None
    folder = store.folder
    try:
        found = open_documents(data, exclude=(folder, _partial(folder))).identity()
    except (InputError, OSError) as problem:
        return f"{one_line(problem)}; {folder} is used as it is"
    sizes = {key: found[key] for key in ("input files", "input bytes")}
    if not (changed := files.differences(job, sizes)):
        return None
    _require_same(job, {"input": found["input"]}, way_out)
    return f"{data.path} changed since {folder} was made: {'; '.join(changed)} ({way_out})"


def _require_same(before: dict[str, Any], job: dict[str, Any], way_out: str) -> None:
    if changed := files.differences(before, job):
        got = f"{'; '.join(changed)} ({way_out})"
        raise error("data.store", "a store of these documents and this tokenizer", got)


def _fill(writer: "_Writer", source: Source, tokenizer: Tokenizer, data: Data, quiet: bool) -> None:
    state = writer.state
    total = data.documents
    if isinstance(source, DatasetSource) and len(source):
        total = min(len(source), total or len(source))
    with Progress(total, state.rows, quiet=quiet) as progress:
        for rows, batch in _batches(texts(source, state.rows, data.documents)):
            ids = tokenizer(batch) if batch else []
            writer.append(rows, ids, split=len(batch) - rows)
            progress.update(rows, sum(map(len, ids)))
    if not state.documents:
        got = f"{state.rows:,} empty texts" if state.rows else "none"
        raise error("data", "at least one document with tokens", f"{got} in {source.name}")


def _batches(rows: Iterator[str]) -> Iterator[tuple[int, list[str]]]:
    """Number of texts, and the documents they became."""
    count, batch, characters = 0, list[str](), 0
    for text in rows:
        count += 1
        batch += pieces(text)
        characters += len(text)
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield count, batch
            count, batch, characters = 0, [], 0
    if count:
        yield count, batch


class _Writer:
    """The unfinished store; `append` in order, then `finish`, then `publish`."""

    def __init__(
        self,
        folder: Path,
        job: dict[str, Any],
        tokenizer: Tokenizer,
        shard_tokens: int,
        restart: bool,
    ) -> None:
        self._folder, self._vocabulary, self._most = folder, tokenizer.vocabulary, shard_tokens
        self._dtype = np.dtype("<u2" if tokenizer.vocabulary.size <= 1 << 16 else "<u4")
        self._files: dict[str, BinaryIO] = {}
        self._last = time.monotonic()
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = files.lock(folder, "data.store")
        try:
            if restart:
                for path in folder.iterdir():
                    if path.name != "lock":
                        path.unlink()
            self.finished = (folder / INDEX).exists()
            if self.finished:
                self.state = State(read_index(folder)["job"])
            else:
                self.state = _load_state(folder / STATE) or State(job)
            _require_same(self.state.job, job, "--restart discards what is done")
            self.committed_rows = self.state.rows
            if not self.finished:
                with _writing(folder):
                    self._open()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        # Nothing worth keeping: leave no folder behind that a fixed recipe would have to discard.
        if self._folder.exists() and not self.committed_rows and not self.finished:
            for path in self._folder.iterdir():
                path.unlink()
            self._folder.rmdir()

    def append(self, rows: int, documents: list[list[int]], split: int = 0) -> None:
        """Add what became of ``rows`` texts; documents without tokens are counted and left out."""
        state = self.state
        kept = [ids for ids in documents if ids]
        lengths = np.array([len(ids) for ids in kept], np.int64)
        ids = np.fromiter((i for d in kept for i in d), self._dtype, int(lengths.sum()))
        with _writing(self._folder):
            self._write_documents(ids, lengths)
        state.rows += rows
        state.empty += len(documents) - len(kept)
        state.split += max(split, 0)
        where = np.searchsorted(HISTOGRAM, lengths + SPECIALS)
        for place, count in enumerate(np.bincount(where, minlength=len(state.histogram)).tolist()):
            state.histogram[place] += count
        if time.monotonic() - self._last >= COMMIT_SECONDS:
            self.commit()

    def _write_documents(self, ids: np.ndarray, lengths: np.ndarray) -> None:
        state = self.state
        ends = np.cumsum(lengths)
        done = 0
        while done < len(lengths):
            start = int(ends[done - 1]) if done else 0
            # The document that reaches the limit is the shard's last one.
            room = self._most - state.shard_tokens
            upto = min(int(np.searchsorted(ends, start + room)) + 1, len(lengths))
            end = int(ends[upto - 1])
            files.write_all(self._shard(), memoryview(ids[start:end].tobytes()))
            offsets = (state.tokens - start + ends[done:upto]).astype(OFFSET)
            files.write_all(self._files[OFFSETS], memoryview(offsets.tobytes()))
            state.documents += upto - done
            state.tokens += end - start
            state.shard_documents += upto - done
            state.shard_tokens += end - start
            done = upto
            if state.shard_tokens >= self._most:
                self._close_shard()

    def commit(self) -> None:
        """When this returns, all that was appended survives a kill or a power cut."""
        with _writing(self._folder):
            for file in self._files.values():
                os.fsync(file.fileno())
            content = json.dumps({"version": VERSION, **asdict(self.state)}, indent=1)
            files.write_atomically(self._folder / STATE, content + "\n")
        self.committed_rows, self._last = self.state.rows, time.monotonic()

    def finish(self) -> None:
        """Write the index; from here on only `publish` is left."""
        with _writing(self._folder):
            if self.state.shard_tokens:
                self._close_shard()
            self.commit()
            state = asdict(self.state)
            index = {
                "format": "neobert-tokens",
                "version": VERSION,
                "dtype": self._dtype.name,
                **{key: state[key] for key in ("documents", "tokens", "empty", "split")},
                "histogram": state["histogram"],
                "vocabulary": self._vocabulary._asdict(),
                "tokenizer": self.state.job["tokenizer"],
                OFFSETS: sha256(self._folder / OFFSETS),
                "shards": state["shards"],
                "job": self.state.job,
            }
            files.write_atomically(self._folder / INDEX, json.dumps(index, indent=1) + "\n")
        self.finished = True

    def publish(self, folder: Path) -> None:
        """Move the folder to its name; safe to repeat after a kill at any moment."""
        self.close()
        with _writing(self._folder):
            for name in (STATE, "lock"):
                (self._folder / name).unlink(missing_ok=True)
            os.replace(self._folder, folder)
            files.sync_folder(folder.parent)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._lock.close()

    def _open(self) -> None:
        """Cut off what the state does not count."""
        state = self.state
        counted = {shard["name"] for shard in state.shards} | {STATE, OFFSETS, "lock"}
        current = shard_name(len(state.shards))
        for path in self._folder.iterdir():
            if path.name not in counted | {current}:
                path.unlink()
        for shard in state.shards:
            size = shard["tokens"] * self._dtype.itemsize
            path = self._folder / shard["name"]
            if not path.exists() or path.stat().st_size != size:
                raise error(f"data.store: {path}", f"{size:,} bytes", "others (--restart)")
        self._open_at(OFFSETS, (state.documents + 1) * OFFSET.itemsize if state.rows else 0)
        if not state.rows:
            files.write_all(self._files[OFFSETS], memoryview(bytes(OFFSET.itemsize)))
        if state.shard_tokens:
            self._open_at(current, state.shard_tokens * self._dtype.itemsize)
        else:
            (self._folder / current).unlink(missing_ok=True)

    def _shard(self) -> BinaryIO:
        name = shard_name(len(self.state.shards))
        if name not in self._files:
            self._open_at(name, 0)
        return self._files[name]

    def _open_at(self, name: str, size: int) -> None:
        path = self._folder / name
        path.touch()
        file = open(path, "r+b", buffering=0)  # noqa: SIM115
        if os.fstat(file.fileno()).st_size < size:
            file.close()
            raise error(f"data.store: {path}", f"at least {size:,} bytes", "fewer (--restart)")
        file.truncate(size)
        file.seek(size)
        self._files[name] = file

    def _close_shard(self) -> None:
        state = self.state
        name = shard_name(len(state.shards))
        file = self._files.pop(name)
        os.fsync(file.fileno())
        file.close()
        state.shards.append(
            {
                "name": name,
                "documents": state.shard_documents,
                "tokens": state.shard_tokens,
                "sha256": sha256(self._folder / name),
            }
        )
        state.shard_documents = state.shard_tokens = 0


def _load_state(path: Path) -> State | None:
    try:
        content = json.loads(path.read_bytes())
        if content.pop("version") != VERSION:
            raise ValueError("another version")
        return State(**content)
    except FileNotFoundError:
        return None
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise InputError(
            f"resume: expected a state in {path}, got {one_line(problem)} (--restart discards it)"
        ) from None


def _interruption(folder: Path, rows: int) -> str:
    kept = f"{rows:,} texts are kept in {folder}" if rows else "no texts were finished"
    return f"interrupted; {kept}; run the same command again to go on"


def _note(quiet: bool, message: str) -> None:
    if not quiet:
        print(f"neobert: {message}", file=sys.stderr, flush=True)
