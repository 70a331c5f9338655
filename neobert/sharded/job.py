"""One job over a folder of shards: what every engine does before, in, and after its workers."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neobert.commands.job import WINDOW, TextEncoder, encoder_record, note
from neobert.inputs import FileSource, open_source, source_record
from neobert.readers import InputError, ReadOptions
from neobert.sharded.folder import ShardFolder, prepared
from neobert.sharded.owned import check_apart
from neobert.sharded.plan import SHARD_ROWS, Shard, make_plan
from neobert.sharded.work import encode_shards

Load = Callable[[str | None, int | None], TextEncoder]


@dataclass(frozen=True)
class Job:
    """What a process on any machine needs to take part; it can be pickled if ``load`` can.

    Attributes:
        load: Builds the encoder, from a device and CPU threads that override the user's.
        input: A file, folder or pattern, as every worker sees it.
        output: The folder of shards, as every worker sees it.
        read: How texts are taken out.
        options: What else decides the numbers (model, dtype, ...).
        window: Texts of a window; a shard is whole windows, so that they do not depend on shards.
        shard_rows: Rows of a shard.
        output_dtype: Precision of the embeddings that are written.
        overwrite: Replace a finished output.
        restart: Discard the shards of an unfinished run.
        trust_input: Resume although the input's files have other times than before.
        quiet: No progress and no notes on stderr.
    """

    load: Load
    input: str
    output: Path
    read: ReadOptions
    options: Mapping[str, Any]
    window: int = WINDOW
    shard_rows: int = SHARD_ROWS
    output_dtype: str = "float32"
    overwrite: bool = False
    restart: bool = False
    trust_input: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.shard_rows < 1 or self.shard_rows % self.window:
            raise InputError(
                f"shard-rows: expected a multiple of the window {self.window}, "
                f"got {self.shard_rows}"
            )

    def source(self) -> FileSource:
        check_apart(self.output, self.input)
        source = open_source(self.input, self.read, exclude=(self.output,))
        if not isinstance(source, FileSource):
            raise InputError("input: expected files for a folder of shards, got '-'")
        return source

    @contextlib.contextmanager
    def prepared(self, source: FileSource, first: bool = True) -> Iterator[ShardFolder]:
        """The folder with its plan, for the one process that leads the job.

        Args:
            source: The input.
            first: False if the same command has already begun: nothing is discarded then.
        """
        with prepared(
            self.output,
            self._identity(source),
            lambda: make_plan(source, self.shard_rows, self.note),
            overwrite=self.overwrite and first,
            restart=self.restart and first,
            trust_input=self.trust_input,
            note=self.note,
        ) as folder:
            yield folder

    def note(self, message: str) -> None:
        note(self.quiet, message)

    def _identity(self, source: FileSource) -> dict[str, Any]:
        return {
            **self.options,
            **vars(self.read),
            **source.identity(),
            "window": self.window,
            "shard_rows": self.shard_rows,
            "output_dtype": self.output_dtype,
        }

    def encoder(
        self, folder: ShardFolder, device: str | None = None, threads: int | None = None
    ) -> TextEncoder:
        """Load the model, and make sure that it is the one of all other workers."""
        encoder = self.load(device, threads)
        folder.agree(encoder_record(encoder))
        return encoder

    def work(
        self,
        encoder: TextEncoder,
        source: FileSource,
        folder: ShardFolder,
        shards: Iterable[Shard],
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Shard]:
        """`encode_shards`, of the input that the plan was made from."""
        self._require_unchanged(source, folder)
        return encode_shards(encoder, source, folder, shards, progress)

    def finish(self, source: FileSource, folder: ShardFolder, run: "Run") -> "Summary":
        """Write the manifest, if the input is still the one that was planned."""
        self._require_unchanged(source, folder)
        manifest = folder.finish(source_record(source))
        return Summary(
            self.output,
            len(folder.plan),
            manifest["rows"],
            manifest["tokens"],
            manifest["truncated"],
            manifest["dim"],
            self.output_dtype,
            run,
        )

    def _require_unchanged(self, source: FileSource, folder: ShardFolder) -> None:
        identity = source.identity()
        if any(folder.job[key] != value for key, value in identity.items()):
            raise InputError(
                f"input: expected no change while it was read, got one in {source.name}; "
                "--restart begins again"
            )


class Run:
    """Texts and tokens that this run encoded, and how long that has taken."""

    def __init__(self) -> None:
        self.texts = self.tokens = 0
        self._began: float | None = None

    def add(self, texts: int, tokens: int) -> None:
        self.texts += texts
        self.tokens += tokens

    def began(self, seconds_ago: float = 0.0) -> None:
        """The clock starts when the first worker has its model; later ones change nothing."""
        began = time.monotonic() - seconds_ago
        self._began = began if self._began is None else min(self._began, began)

    @property
    def seconds(self) -> float:
        return 0.0 if self._began is None else time.monotonic() - self._began


@dataclass(frozen=True)
class Summary:
    """What is in a finished folder, and what this run did for it."""

    output: Path
    shards: int
    texts: int
    tokens: int
    truncated: int
    dim: int
    dtype: str
    run: Run

    def __str__(self) -> str:
        run = self.run
        done = f"this run {run.texts:,} texts in {run.seconds:,.1f} s"
        if run.tokens:
            done += f", {run.tokens / max(run.seconds, 1e-9):,.0f} tokens/s"
        return (
            f"encoded {self.texts:,} texts, {self.tokens:,} tokens "
            f"({self.truncated:,} texts truncated); {done}: "
            f"{self.output} [{self.texts}, {self.dim}] {self.dtype} in {self.shards:,} shards"
        )
