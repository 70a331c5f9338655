"""Exact nearest neighbours over a saved index, by brute force in blocks.

Scores are exact dot products or cosines in float64, so equal rows have equal scores and ties go to
the lower row, whatever the block size. The float32 matrix product only picks candidates: with
``u = 2**-24`` its error is at most ``gamma * |q| |x|``, ``gamma = dim*u / (1 - dim*u)``
(Higham 2002, Accuracy and Stability of Numerical Algorithms, section 3.1).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from neobert.outputs import read_description, require_pyarrow
from neobert.readers import InputError, one_line
from neobert.sharded.folder import finished

BLOCK_ROWS = 16384


class Index(Protocol):
    """Embeddings ``[rows, dim]`` that are read in blocks."""

    rows: int
    dim: int

    def blocks(self) -> Iterator[np.ndarray]:
        """All rows in order, as float32 ``[n, dim]`` blocks of bounded size."""
        ...


@dataclass(frozen=True)
class Hits:
    """The best rows of every query, best first.

    Args:
        rows: ``[Q, K]`` int64, ``K = min(top, index rows)``.
        scores: ``[Q, K]`` float64.
    """

    rows: np.ndarray
    scores: np.ndarray


class ArrayIndex:
    """An array in memory, or a memory-mapped ``.npy`` file."""

    def __init__(self, array: np.ndarray, block_rows: int = BLOCK_ROWS) -> None:
        if array.ndim != 2 or array.dtype.kind != "f":
            raise InputError(
                f"index: expected floating-point [rows, dim], got {array.dtype} {array.shape}"
            )
        self._array, self._block_rows = array, block_rows
        self.rows, self.dim = array.shape

    def blocks(self) -> Iterator[np.ndarray]:
        for start in range(0, self.rows, self._block_rows):
            yield np.asarray(self._array[start : start + self._block_rows], dtype=np.float32)


class ParquetIndex:
    """The column ``embedding`` of a Parquet file, read group by group."""

    def __init__(self, path: Path) -> None:
        require_pyarrow("index")
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            self._file = pq.ParquetFile(path)
        except pa.ArrowInvalid as error:
            raise InputError(
                f"index: expected a Parquet file, got {one_line(error)} in {path}"
            ) from None
        schema = self._file.schema_arrow
        kind = schema.field("embedding").type if "embedding" in schema.names else None
        floats = (pa.float32(), pa.float16())
        if kind is None or not pa.types.is_fixed_size_list(kind) or kind.value_type not in floats:
            raise InputError(
                "index: expected fixed_size_list<float or halffloat> in column 'embedding', "
                f"got {kind} in {path}"
            )
        self.rows, self.dim = self._file.metadata.num_rows, kind.list_size

    def blocks(self) -> Iterator[np.ndarray]:
        for batch in self._file.iter_batches(BLOCK_ROWS, columns=["embedding"]):
            values = batch.column(0).flatten()
            array = values.to_numpy(zero_copy_only=False).reshape(-1, self.dim)
            yield array.astype(np.float32, copy=False)


class FolderIndex:
    """The shards of a folder, one after the other; one of them is open at a time."""

    def __init__(self, shards: Sequence[Path]) -> None:
        self._shards, self.rows, self.dim = shards, 0, 0
        for path in shards:
            shard = ParquetIndex(path)
            self.dim = self.dim or shard.dim
            if shard.dim != self.dim:
                raise InputError(
                    f"index: expected {self.dim} dimensions as in other shards, "
                    f"got {shard.dim} in {path}"
                )
            self.rows += shard.rows

    def blocks(self) -> Iterator[np.ndarray]:
        for path in self._shards:
            yield from ParquetIndex(path).blocks()


def open_index(path: str | Path) -> tuple[Index, dict[str, Any]]:
    """Open what ``neobert encode`` wrote: the index and its description (empty if it has none).

    A folder of shards is an index with its manifest as the description.

    Raises:
        InputError: Nothing there, another format, a description of other contents, or a folder that
            is not finished.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"index: expected an existing file or folder, got {path}")
    index: Index
    if path.is_dir():
        require_pyarrow("index")
        description, shards = finished(path)
        index = FolderIndex(shards)
    elif path.suffix.lower() == ".npy":
        try:
            index = ArrayIndex(np.load(path, mmap_mode="r", allow_pickle=False))
        except (EOFError, ValueError) as error:
            raise InputError(
                f"index: expected a .npy array of floats, got {path} ({one_line(error)})"
            ) from None
    elif path.suffix.lower() == ".parquet":
        index = ParquetIndex(path)
    else:
        raise InputError(f"index: expected a name ending in .npy or .parquet, got {path}")
    if not path.is_dir():
        description = read_description(path)
    for key, value in (("rows", index.rows), ("dim", index.dim)):
        if description.get(key, value) != value:
            raise InputError(
                f"index: expected {key} {description[key]} as its description says, "
                f"got {value} in {path}"
            )
    return index, description


def search(
    index: Index | np.ndarray, queries: np.ndarray, top: int = 5, score: str = "cosine"
) -> Hits:
    """The ``top`` best rows of the index for every query.

    Args:
        index: ``[rows, dim]`` float array, or an `Index`.
        queries: ``[Q, dim]`` floats.
        top: At least 1; more than the index has gives all its rows.
        score: ``"cosine"`` (0 for a row or query of zeros) or ``"dot"``.

    Returns:
        Rows by falling score; rows of equal score by rising row number.

    Raises:
        InputError: An argument breaks a rule above, or a number is not finite.
    """
    if isinstance(index, np.ndarray):
        index = ArrayIndex(index)
    if queries.ndim != 2 or queries.shape[1] != index.dim:
        raise InputError(f"queries: expected shape [Q, {index.dim}], got {queries.shape}")
    if not np.isfinite(queries).all():
        raise InputError("queries: expected finite numbers, got NaN or infinity")
    if top < 1:
        raise InputError(f"top: expected at least 1, got {top}")
    if score not in ("cosine", "dot"):
        raise InputError(f"score: expected 'cosine' or 'dot', got {score!r}")
    cosine = score == "cosine"
    wide = queries.astype(np.float64)
    if cosine:
        wide = _unit(wide)
    best = [_Best(query, min(top, index.rows)) for query in wide]
    start = 0
    for block in index.blocks():
        lengths = np.sqrt(np.einsum("nc,nc->n", block, block, dtype=np.float64))
        if not np.isfinite(lengths).all():
            row = start + int(np.argmin(np.isfinite(lengths)))
            raise InputError(f"index: expected finite numbers, got NaN or infinity in row {row}")
        rough = wide.astype(np.float32) @ block.T
        if cosine:
            rough /= np.where(lengths, lengths, 1).astype(np.float32)
        longest = 1.0 if cosine else float(lengths.max())
        for b, scores in zip(best, rough, strict=True):
            b.add(start, block, scores, longest, cosine)
        start += len(block)
    return Hits(
        np.stack([b.rows for b in best]) if best else np.empty((0, min(top, index.rows)), np.int64),
        np.stack([b.scores for b in best]) if best else np.empty((0, min(top, index.rows))),
    )


class _Best:
    """The best rows so far of one query."""

    def __init__(self, query: np.ndarray, top: int) -> None:
        self._query, self._top = query, top
        self._length = float(np.linalg.norm(query))
        self.rows = np.empty(0, np.int64)
        self.scores = np.empty(0, np.float64)

    def add(
        self, start: int, block: np.ndarray, rough: np.ndarray, longest: float, cosine: bool
    ) -> None:
        # Twice the bound leaves room for rounding the query and for the division by lengths.
        slack = 2 * (block.shape[1] + 4) * 2.0**-24 * self._length * longest
        floor = -np.inf
        if len(self.scores) == self._top:
            floor = self.scores[-1] - slack
        if len(rough) >= self._top:
            floor = max(floor, np.partition(rough, -self._top)[-self._top] - 2 * slack)
        candidates = np.flatnonzero(rough >= floor)
        if not len(candidates):
            return
        exact = block[candidates].astype(np.float64)
        if cosine:
            exact = _unit(exact)
        scores = np.concatenate([self.scores, (exact * self._query).sum(1)])
        rows = np.concatenate([self.rows, start + candidates])
        # Rows rise along the array, and a stable sort keeps that order among equal scores.
        order = np.argsort(-scores, kind="stable")[: self._top]
        self.rows, self.scores = rows[order], scores[order]


def _unit(x: np.ndarray) -> np.ndarray:
    """Rows scaled to length 1; a row of zeros stays zero."""
    length = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(length, length, 1)
