"""Texts to embeddings: a patched encoder, batches by token budget, one worker per core on a CPU.

Texts are taken in windows. A window is read and tokenized while the ones before it run, sorted by
length, cut into batches of about ``max_tokens`` real tokens, and given back in the order it came.
Batches are cut from a window alone, never from the number of threads, and so are the numbers.
"""

import itertools
import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

import neobert_kernels as nk
from neobert.loading import (
    digest,
    load_model,
    load_tokenizer,
    model_family,
    model_folder,
    text_length,
)
from neobert.sentence_files import POOLINGS, SentenceSettings, read_settings
from neobert.truncation import token_ids
from neobert_kernels import patching

Progress = Callable[[int, int], None]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
WINDOW = 4096

# On a CPU one worker's activations should stay in its cache; a GPU wants enough rows to fill it.
MAX_TOKENS = {"cpu": 1024, "cuda": 16384}

SMALLEST_BATCH = 128  # tokens; below, a matrix product costs more than its share

# The batches of a stream's last window shrink, as if for so many workers, to let them end together.
LAST_BATCHES = 4

# Windows that are in memory at a time: one runs, one waits tokenized, one is read.
WINDOWS_AHEAD = 3


@dataclass(frozen=True, eq=False)
class Chunk:
    """The embeddings of one window of texts.

    Attributes:
        start: Position of the first text in the input.
        embeddings: ``[n, dim]`` float32.
        tokens: Real tokens that went through the model.
        truncated: Texts that were longer than the model takes, and were cut.
    """

    start: int
    embeddings: np.ndarray
    tokens: int
    truncated: int


@dataclass(frozen=True, eq=False)
class _Window:
    """Token ids of texts, one after the other, and where each begins."""

    start: int
    tokens: np.ndarray
    bounds: np.ndarray
    truncated: int

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.bounds)

    def ids(self, rows: Sequence[int]) -> np.ndarray:
        """The token ids of some texts, packed."""
        bounds = self.bounds
        return np.concatenate([self.tokens[bounds[row] : bounds[row + 1]] for row in rows])


@dataclass(eq=False)
class _Running:
    """A window whose batches are with the workers."""

    window: _Window
    embeddings: np.ndarray
    batches: list[Future[None]]

    def chunk(self) -> Chunk:
        """Wait for the batches."""
        for batch in self.batches:
            batch.result()
        window = self.window
        return Chunk(window.start, self.embeddings, len(window.tokens), window.truncated)


@dataclass(eq=False)
class Encoder:
    """A loaded encoder with its tokenizer and pooling; make one with `Encoder.load`.

    Attributes:
        name: The model as the caller named it.
        family: Its ``model_type``, with underscores.
        model: For inference only: a patched one gave up weights for prepared ones.
        dim: Width of an embedding.
        pooling: "mean" or "cls".
        normalize: Whether embeddings have length 1.
        max_length: Tokens kept of each text.
        max_tokens: Real tokens of one batch, unless a single text has more.
        report: What `neobert_kernels.patch` replaced; None when not patched.
        fingerprint: What would change the numbers, for resuming and for search.
    """

    name: str
    family: str
    model: Any
    tokenizer: Any
    settings: SentenceSettings
    max_length: int
    max_tokens: int
    threads: int
    report: patching.PatchReport | None
    fingerprint: dict[str, str | int] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        model: str | os.PathLike[str],
        *,
        device: str | None = None,
        dtype: str = "float32",
        patched: bool = True,
        max_tokens: int = 0,
        max_length: int | None = None,
        revision: str | None = None,
        threads: int | None = None,
        pooling: str | None = None,
        normalize: bool | None = None,
    ) -> "Encoder":
        """Load a model of a supported family with its tokenizer.

        Args:
            model: A local folder, or a hub id (downloaded once: safetensors, never pickle, and
                no remote code).
            device: "cpu", "cuda", "cuda:1", ...; default a GPU if there is one.
            dtype: "float32", "float16" or "bfloat16", of weights and activations.
            patched: False runs the model as transformers has it, on padded batches.
            max_tokens: Real tokens of one batch; 0 chooses by device.
            max_length: Tokens kept of each text; default as the model's files say.
            revision: Branch, tag or commit of a hub id.
            threads: CPU threads, at most this machine's cores; default PyTorch's.
            pooling, normalize: Override what the model's sentence-transformers files say.

        Raises:
            ValueError: The family is not supported, a tensor is missing, or an argument is wrong.
            OSError: The model cannot be found or read.
        """
        _check_options(dtype, max_tokens, max_length, threads, pooling)
        where = find_device(device)
        folder = model_folder(model, revision)
        family = model_family(folder, patched)
        settings = read_settings(folder)
        settings = SentenceSettings(
            settings.pooling if pooling is None else pooling,
            settings.normalize if normalize is None else normalize,
            settings.max_length,
            settings.prompt,
        )
        network = load_model(folder, DTYPES[dtype]).to(where).eval()
        tokenizer = load_tokenizer(folder, network.config.vocab_size)
        length = text_length(max_length, settings, tokenizer, network)
        max_tokens = max_tokens or MAX_TOKENS[where.type]
        report = patching.patch_for_good(network, max_tokens) if patched else None
        fingerprint: dict[str, str | int] = {
            "model": str(model),
            "revision": revision or "",
            "files": digest(folder),
            "dtype": dtype,
            "device": where.type,
            "patched": int(patched),
            "pooling": settings.pooling,
            "normalize": int(settings.normalize),
            "prompt": settings.prompt,
            "max_length": length,
        }
        return cls(
            name=str(model),
            family=family,
            model=network,
            tokenizer=tokenizer,
            settings=settings,
            max_length=length,
            max_tokens=max_tokens,
            threads=threads or torch.get_num_threads(),
            report=report,
            fingerprint=fingerprint,
        )

    @property
    def dim(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def pooling(self) -> str:
        return self.settings.pooling

    @property
    def normalize(self) -> bool:
        return self.settings.normalize

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def encode(self, texts: Sequence[str], progress: Progress | None = None) -> np.ndarray:
        """Embed a list of texts.

        Args:
            texts: Any strings; an empty one is embedded as such.
            progress: Called with the texts and real tokens of each finished batch.

        Returns:
            ``[N, dim]`` float32, rows in the order of ``texts``.

        Raises:
            ValueError: An item is not a string, or not valid Unicode.
        """
        if isinstance(texts, str):
            raise ValueError("texts: expected a sequence of strings, got one string")
        windows = (texts[i : i + WINDOW] for i in range(0, len(texts), WINDOW))
        chunks = self._chunks(windows, WINDOW, progress, max(LAST_BATCHES, 2 * self.threads))
        return np.concatenate(
            [np.empty((0, self.dim), np.float32), *(chunk.embeddings for chunk in chunks)]
        )

    def stream(
        self, texts: Iterable[str], window: int = WINDOW, progress: Progress | None = None
    ) -> Iterator[Chunk]:
        """Embed texts that need not fit in memory: one `Chunk` per ``window`` of them, in order.

        Two windows are read ahead. An error raised by ``texts`` comes after the chunks before it.
        """
        if window < 1:
            raise ValueError(f"window: expected at least 1, got {window}")
        source = iter(texts)
        windows = iter(lambda: list(itertools.islice(source, window)), [])
        return self.stream_windows(windows, window, progress)

    def stream_windows(
        self,
        windows: Iterable[Sequence[str]],
        window: int = WINDOW,
        progress: Progress | None = None,
    ) -> Iterator[Chunk]:
        """`stream` of texts that the caller has cut into windows, none of them empty.

        The embeddings of a window are the same bits whatever is before and behind it.

        Args:
            windows: Each at most ``window`` texts; taken in a thread of its own, two ahead.
            window: Texts of a whole window; the batches of a smaller one shrink at its end.
            progress: Called with the texts and real tokens of each finished batch.
        """
        return self._chunks(windows, window, progress, LAST_BATCHES)

    def _chunks(
        self,
        windows: Iterable[Sequence[str]],
        size: int,
        progress: Progress | None,
        last_batches: int,
    ) -> Iterator[Chunk]:
        # A thread reads, tokenizes and hands batches to the workers, which so never wait for it at
        # the end of a window; what it has begun waits here in order.
        begun: queue.SimpleQueue[_Running | BaseException | None] = queue.SimpleQueue()
        room = threading.Semaphore(WINDOWS_AHEAD - 1)
        closed = threading.Event()

        def read() -> None:
            try:
                start = 0
                for texts in windows:
                    window = self._tokenize(texts, start)
                    start += len(texts)
                    room.acquire()
                    if closed.is_set():
                        return
                    least = last_batches if len(texts) < size else 0
                    begun.put(self._begin(window, submit, least, progress))
                begun.put(None)
            except BaseException as error:
                begun.put(error)

        with _workers(self) as submit, ThreadPoolExecutor(1, "neobert-tokenize") as ahead:
            ahead.submit(read)
            try:
                while (running := begun.get()) is not None:
                    if isinstance(running, BaseException):
                        raise running
                    chunk = running.chunk()
                    room.release()
                    yield chunk
            finally:
                closed.set()
                room.release()

    def _tokenize(self, texts: Sequence[str], start: int) -> _Window:
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise ValueError(
                    f"texts: expected strings, got {type(text).__name__} at {start + i}"
                )
        prompt = self.settings.prompt
        prompted = [prompt + text for text in texts] if prompt else texts
        ids, truncated = token_ids(self.tokenizer, prompted, self.max_length, start)
        bounds = np.fromiter(itertools.accumulate(map(len, ids), initial=0), np.int64)
        tokens = np.fromiter(itertools.chain.from_iterable(ids), np.int64, bounds[-1])
        return _Window(start, tokens, bounds, truncated)

    def _begin(
        self, window: _Window, submit: Callable, last_batches: int, progress: Progress | None
    ) -> _Running:
        lengths = window.lengths.tolist()
        embeddings = np.empty((len(lengths), self.dim), np.float32)

        def work(rows: list[int]) -> None:
            embeddings[rows] = self._forward(window.ids(rows), [lengths[row] for row in rows])
            if progress is not None:
                progress(len(rows), sum(lengths[row] for row in rows))

        batches = self._batches(lengths, last_batches)
        return _Running(window, embeddings, [submit(work, rows) for rows in batches])

    def _batches(self, lengths: list[int], last_batches: int = 0) -> Iterator[list[int]]:
        """Rows of each batch, longest texts first: equal lengths meet, and no straggler is last.

        Where nothing follows, the batches shrink at the end to about that many of equal size.
        """
        rows: list[int] = []
        tokens, left, budget = 0, sum(lengths), self.max_tokens
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            if last_batches:
                budget = min(self.max_tokens, max(left // last_batches, SMALLEST_BATCH))
            if rows and tokens + lengths[row] > budget:
                yield rows
                rows, tokens, left = [], 0, left - tokens
            rows.append(row)
            tokens += lengths[row]
        if rows:
            yield rows

    @torch.inference_mode()
    def _forward(self, ids: np.ndarray, lengths: list[int]) -> np.ndarray:
        """``[n, dim]`` for the packed token ids of one batch."""
        tokens = torch.from_numpy(ids)
        bounds = list(itertools.accumulate(lengths, initial=0))
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        longest = max(lengths)
        if self.report is None:
            x = self._padded(tokens, cu_seqlens, longest)
        else:
            cu_seqlens = cu_seqlens.to(self.device, non_blocking=True)
            x = self.model(
                input_ids=tokens[None].to(self.device, non_blocking=True),
                cu_seq_lens_q=cu_seqlens,
                max_length_q=longest,
            ).last_hidden_state[0]
        pool = nk.mean_pool if self.pooling == "mean" else nk.first_pool
        vectors = pool(x, cu_seqlens.to(x.device)).float()
        if self.normalize:
            vectors = torch.nn.functional.normalize(vectors)
        return vectors.cpu().numpy()

    def _padded(self, tokens: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
        """Token vectors ``[T, C]`` of an unpatched model, which needs its batch padded."""
        lengths = cu_seqlens.diff()
        real = torch.arange(longest) < lengths[:, None]
        input_ids = torch.full(real.shape, self.tokenizer.pad_token_id or 0)
        input_ids[real] = tokens
        real = real.to(self.device)
        hidden = self.model(input_ids=input_ids.to(self.device), attention_mask=real.long())
        return hidden.last_hidden_state[real]


@contextmanager
def _workers(encoder: Encoder) -> Iterator[Callable[..., Future]]:
    """``submit(work, batch)``: on a CPU to one single-threaded worker per thread, else to one.

    Whole batches side by side beat one batch on all threads: no barrier after every operator.
    """
    on_cpu = encoder.device.type == "cpu"
    count, threads = (encoder.threads, 1) if on_cpu else (1, encoder.threads)
    started = threading.Barrier(count + 1)
    previous = torch.get_num_threads()

    def start() -> None:
        torch.get_num_threads()  # takes over the default once; later it would undo the next line
        torch.set_num_threads(threads)
        if not on_cpu:
            torch.cuda.set_device(encoder.device)
        started.wait()

    pool = ThreadPoolExecutor(count, "neobert-encode")
    try:
        for _ in range(count):
            pool.submit(start)
        started.wait()
        torch.set_num_threads(previous)  # the setting is per thread, its default is global
        yield pool.submit
    finally:
        pool.shutdown(cancel_futures=True)


def _check_options(
    dtype: str,
    max_tokens: int,
    max_length: int | None,
    threads: int | None,
    pooling: str | None,
) -> None:
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if pooling is not None and pooling not in POOLINGS:
        raise ValueError(f"pooling: expected one of {', '.join(POOLINGS)}, got {pooling!r}")
    if max_tokens < 0:
        raise ValueError(f"max_tokens: expected 0 (choose) or more, got {max_tokens}")
    for name, value in (("max_length", max_length), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    cores = os.cpu_count() or 1
    if threads is not None and threads > cores:
        raise ValueError(f"threads: expected 1 to {cores} (this machine's cores), got {threads}")


def find_device(device: str | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError:
        where = torch.device("meta")
    if where.type not in MAX_TOKENS:
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {device!r}")
    if where.type == "cuda" and (where.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        rule = f"one of this machine's {count} GPUs" if count else "cpu (this machine has no GPU)"
        raise ValueError(f"device: expected {rule}, got {device!r}")
    return where
