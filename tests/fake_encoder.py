"""A stand-in for `neobert.encode.Encoder`: numbers from each text, one window read ahead."""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from neobert.commands.job import Summary, encode_file
from neobert.inputs import Source, open_source
from neobert.outputs import check_output

DIM = 8
MAX_LENGTH = 5
OPTIONS = {"model": "fake", "dtype": "float32"}


@dataclass(frozen=True)
class FakeChunk:
    embeddings: np.ndarray
    tokens: int
    truncated: int


def embed(text: str) -> np.ndarray:
    digest = hashlib.sha256(text.encode()).digest()
    return np.frombuffer(digest, "<u4").astype(np.float32) / 2**31 - 1


@dataclass
class FakeEncoder:
    """``after_window`` is called with the number of texts out, before each window but the first."""

    dim: int = DIM
    pooling: str = "mean"
    normalize: bool = False
    max_length: int = MAX_LENGTH
    fingerprint: dict[str, str | int] = field(default_factory=lambda: {"files": "f0", "prompt": ""})
    after_window: Callable[[int], object] = lambda texts: None

    def stream(
        self,
        texts: Iterable[str],
        window: int = 4096,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[FakeChunk]:
        source = iter(texts)
        windows = iter(lambda: list(itertools.islice(source, window)), [])
        yield from self.stream_windows(windows, window, progress)

    def stream_windows(
        self,
        windows: Iterable[Sequence[str]],
        window: int = 4096,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[FakeChunk]:
        source, done = iter(windows), 0
        following = next(source, [])
        while following:
            current, following = following, next(source, [])
            tokens = [len(text.split()) for text in current]
            yield FakeChunk(
                np.stack([embed(text) for text in current]),
                sum(min(t, MAX_LENGTH) for t in tokens),
                sum(t > MAX_LENGTH for t in tokens),
            )
            done += len(current)
            self.after_window(done)
            if progress is not None:
                progress(len(current), sum(tokens))


def run_job(
    source: Source | Path, output: Path, encoder: FakeEncoder | None = None, **arguments: Any
) -> Summary:
    """`encode_file` as the command calls it, in windows of four."""
    return encode_file(
        lambda: encoder or FakeEncoder(),
        open_source(str(source)) if isinstance(source, Path) else source,
        check_output(
            str(output), arguments.get("overwrite", False), arguments.get("restart", False)
        ),
        **{"options": OPTIONS, "window": 4, **arguments},
    )
