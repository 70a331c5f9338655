"""Tokenised documents on disk: mapped into memory, shared by all processes, read in any order.

    STORE/index.json       counts, the tokenizer's special ids and digest, sha256 of every file
    STORE/offsets          int64 [documents + 1]: document d is tokens offsets[d] .. offsets[d + 1]
    STORE/00000.tokens ... uint16 or uint32 ids, little-endian, document after document

[CLS] and [SEP] are not stored: a document is cut to a recipe's length first. No document spans
two shards. `neobert.pretraining.prepare` writes this.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from neobert.pretraining.rules import error
from neobert.readers import InputError, one_line

VERSION = 1
INDEX, OFFSETS = "index.json", "offsets"
OFFSET = np.dtype("<i8")
SPECIALS = 2  # [CLS] and [SEP], which every length that a user sees includes
# Upper ends of the length histogram.
HISTOGRAM = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class Vocabulary(NamedTuple):
    """What batches need of the tokenizer."""

    size: int
    cls: int
    sep: int
    mask: int
    pad: int
    special: tuple[int, ...]  # all of them, [UNK] included


class Corpus:
    """Documents as ids, without [CLS] and [SEP].

    Attributes:
        vocabulary: Of their tokenizer.
        place: Where they are, for errors.
    """

    vocabulary: Vocabulary
    place: str

    def require_vocabulary(self, size: int) -> None:
        """Refuse a model with fewer embeddings than the tokenizer has tokens.

        Raises:
            InputError: With both numbers.
        """
        if self.vocabulary.size > size:
            raise error(
                "data.tokenizer",
                f"at most {size:,} tokens (the model's vocab_size)",
                f"{self.vocabulary.size:,} in {self.place}",
            )


def shard_name(number: int) -> str:
    return f"{number:05}.tokens"


class Store(Corpus):
    """A finished store; open one with `Store.open`. Costs nothing to send to another process."""

    def __init__(self, folder: Path, index: Mapping[str, Any]) -> None:
        self.folder, self.place, self.index = folder, str(folder), index
        self.vocabulary = Vocabulary(
            **{**index["vocabulary"], "special": tuple(index["vocabulary"]["special"])}
        )
        self._dtype = np.dtype(index["dtype"]).newbyteorder("<")
        self.offsets = _map(folder / OFFSETS, OFFSET)
        self._shards = [_map(folder / shard["name"], self._dtype) for shard in index["shards"]]
        counts = [shard["documents"] for shard in index["shards"]]
        self._first = np.cumsum([0, *counts])  # of every shard: its first document,
        self._base = self.offsets[self._first]  # and its first token

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = False) -> "Store":
        """Open a store whose files have the sizes that its index names.

        Args:
            folder: What `prepare` wrote.
            verify: Also compare checksums, which reads every byte.

        Raises:
            InputError: No store, an unfinished one, or a damaged file, which is named.
        """
        folder = Path(folder)
        index = read_index(folder)
        for name, size, digest in files_of(index):
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                got = "no such file" if found is None else f"{found:,}"
                raise error(f"store: {path}", f"{size:,} bytes", f"{got}; it is damaged")
            if verify and (seen := sha256(path)) != digest:
                raise error(
                    f"store: {path}", f"sha256 {digest[:16]}", f"{seen[:16]}; it is damaged"
                )
        return cls(folder, index)

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.folder, self.index)

    def __len__(self) -> int:
        return int(self.index["documents"])

    @property
    def tokens(self) -> int:
        return int(self.index["tokens"])

    @property
    def digest(self) -> str:
        """What tells these documents from others, wherever the folder stands."""
        known = {key: self.index[key] for key in ("tokenizer", "shards", OFFSETS)}
        return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()[:16]

    def lengths(self, documents: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Tokens of documents, without [CLS] and [SEP], int64."""
        if isinstance(documents, slice):
            return self.offsets[1:][documents] - self.offsets[:-1][documents]
        return self.offsets[documents + 1] - self.offsets[documents]

    def read(
        self, documents: np.ndarray, most: np.ndarray, out: np.ndarray, at: np.ndarray
    ) -> None:
        """Copy the first ``most[i]`` tokens of ``documents[i]`` to ``out`` from ``at[i]`` on."""
        shards = np.searchsorted(self._first, documents, side="right") - 1
        starts = self.offsets[documents] - self._base[shards]
        for shard, start, count, place in zip(
            shards.tolist(), starts.tolist(), most.tolist(), at.tolist(), strict=True
        ):
            out[place : place + count] = self._shards[shard][start : start + count]

    def beginnings(self, documents: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
        """Up to ``most`` tokens of each document, end to end, and how many each has; int64."""
        lengths = np.minimum(self.lengths(documents), most)
        ids = np.empty(int(lengths.sum()), np.int64)
        self.read(documents, lengths, ids, np.cumsum(lengths) - lengths)
        return ids, lengths


def read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    try:
        index = json.loads(path.read_bytes())
        if index["format"] != "neobert-tokens" or index["version"] != VERSION:
            raise ValueError(f"format {index['format']!r}, version {index['version']}")
    except FileNotFoundError:
        raise error(
            "data.store",
            "a finished store (neobert pretrain --prepare RECIPE makes one)",
            f"none in {folder}",
        ) from None
    except (KeyError, TypeError, ValueError) as problem:
        raise InputError(f"store: expected an index in {path}, got {one_line(problem)}") from None
    return dict(index)


def files_of(index: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """Name, bytes and sha256 of every file that an index vouches for."""
    width = np.dtype(index["dtype"]).itemsize
    found = [(OFFSETS, (index["documents"] + 1) * OFFSET.itemsize, index[OFFSETS])]
    return found + [(s["name"], s["tokens"] * width, s["sha256"]) for s in index["shards"]]


def sha256(path: Path) -> str:
    hashed = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            hashed.update(block)
    return hashed.hexdigest()


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    # A plain array over the mapping: slices of np.memmap cost four times as much.
    return np.asarray(np.memmap(path, dtype, "r"))
