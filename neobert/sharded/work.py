"""Encodes shards in one process: reading, the model and writing overlap, also between shards."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path

from neobert.commands.job import Chunk, TextEncoder, rounded
from neobert.inputs import FileSource
from neobert.readers import InputError, Row
from neobert.sharded.folder import ShardFolder, ShardWriter
from neobert.sharded.plan import Shard

WRITES_AHEAD = 4  # windows of embeddings that may wait for the disk


@dataclass(frozen=True)
class _Block:
    """The rows of one window, and where they belong."""

    shard: Shard
    rows: Sequence[Row]
    last: bool


def encode_shards(
    encoder: TextEncoder,
    source: FileSource,
    folder: ShardFolder,
    shards: Iterable[Shard],
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Shard]:
    """Encode and write shards, those that are finished aside; each is given back once it is safe.

    Args:
        encoder: Takes windows of as many texts as ``folder.job["window"]``.
        source: The input that the shards were cut from.
        folder: Where they go.
        shards: In any order; taken one at a time, in a thread, a few windows before they are run.
        progress: As `neobert.encode.Encoder.stream_windows` has it.

    Raises:
        InputError: A row that cannot be read, or fewer rows than were counted.
        OutputError: The disk is full or fails.
    """
    window = folder.job["window"]
    blocks: deque[_Block] = deque()

    def windows() -> Iterator[list[str]]:
        for shard in shards:
            if folder.record(shard) is not None:
                continue
            for block in _blocks(source, shard, window):
                blocks.append(block)
                yield [row.text for row in block.rows]

    output = _Output(encoder, source, folder)
    pending: deque[Future[Shard | None]] = deque()
    try:
        with ThreadPoolExecutor(1, "neobert-write") as writer:
            for chunk in encoder.stream_windows(windows(), window, progress):
                pending.append(writer.submit(output.write, blocks.popleft(), chunk))
                while len(pending) > WRITES_AHEAD or (pending and pending[0].done()):
                    if (shard := pending.popleft().result()) is not None:
                        yield shard
            for future in pending:
                if (shard := future.result()) is not None:
                    yield shard
    finally:
        output.close()


def _blocks(source: FileSource, shard: Shard, window: int) -> Iterator[_Block]:
    rows, left = source.rows_from(shard.file, shard.skip, shard.offset), shard.rows
    while left:
        block = list(islice(rows, min(window, left)))
        if len(block) < min(window, left):
            raise InputError(
                f"input: expected no change while it was read, got one in {source.name}; "
                "--restart begins again"
            )
        left -= len(block)
        yield _Block(shard, block, last=not left)


class _Output:
    """The shard that is being written, if any; used by the writer's thread alone."""

    def __init__(self, encoder: TextEncoder, source: FileSource, folder: ShardFolder) -> None:
        self._encoder, self._folder = encoder, folder
        self._writer: ShardWriter | None = None
        self._failed = False
        self._label = lru_cache(1024)(lambda file: source.label(Path(file)))

    def write(self, block: _Block, chunk: Chunk) -> Shard | None:
        """The shard, if these were its last rows; nothing more once a write has failed."""
        if self._failed:
            return None
        self._failed = True
        if self._writer is None:
            self._writer = self._folder.writer(block.shard, self._encoder.dim)
        precision = self._folder.job["output_dtype"]
        embeddings = rounded(chunk.embeddings, precision, self._writer.next_row)
        labels = [self._label(row.file) for row in block.rows]
        self._writer.add(block.rows, labels, embeddings, chunk.tokens, chunk.truncated)
        if block.last:
            self._writer.finish()
            self._writer = None
        self._failed = False
        return block.shard if block.last else None

    def close(self) -> None:
        if self._writer is not None:
            self._writer.discard()
