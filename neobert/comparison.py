"""The same texts through sentence-transformers and through the patched encoder, side by side.

Each side lives in its own process, so its peak memory is its own; a third one measures the GEMM
rate of the machine. All three load first. Then they take turns on slices of the texts, in an order
that alternates, so that a noisy machine disturbs all of them alike. They talk in JSON lines over
pipes and hand embeddings over as .npy files.

A worker is ``python -m neobert.comparison ROLE``; nobody but `compare` starts one.
"""

import abc
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np

BASELINE, PATCHED, GEMM = "sentence-transformers", "patched", "gemm"
WARM_UP_TEXTS = 32
SETTLE_SECONDS = 0.3  # the side that has just finished keeps its threads spinning for a moment

Progress = Callable[[int, int], None]
Report = Callable[..., None]


@dataclass
class Side:
    """What one side measured; one entry per round."""

    name: str
    seconds: list[float] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    peak_bytes: int = 0
    embeddings: np.ndarray = field(default_factory=lambda: np.empty((0, 0)), repr=False)
    queries: np.ndarray = field(default_factory=lambda: np.empty((0, 0)), repr=False)

    @property
    def texts_per_second(self) -> float:
        """Median over the rounds, so that one disturbed round does not count."""
        return _median_rate(self.texts, self.seconds)

    @property
    def tokens_per_second(self) -> float:
        """Real tokens, special ones included, padding not; median over the rounds."""
        return _median_rate(self.tokens, self.seconds)

    def add(
        self, rows: range, total: int, embeddings: np.ndarray, measured: dict[str, Any]
    ) -> None:
        """Take over one round, which embedded ``rows`` of the ``total`` texts."""
        if not self.seconds:
            self.embeddings = np.empty((total, embeddings.shape[1]), embeddings.dtype)
        self.embeddings[rows.start : rows.stop : rows.step] = embeddings
        self.seconds.append(measured["seconds"])
        self.texts.append(measured["texts"])
        self.tokens.append(measured["tokens"])
        self.peak_bytes = measured["peak_bytes"]


def _median_rate(amounts: Sequence[int], seconds: Sequence[float]) -> float:
    return statistics.median(a / s for a, s in zip(amounts, seconds, strict=True))


@dataclass(frozen=True)
class Comparison:
    """Both sides on the same texts, and the limit that the machine's GEMM rate sets."""

    baseline: Side
    patched: Side
    threads: int
    flop_per_token: int
    gemm_case: str
    gemm_rates: list[float]  # FLOP/s, one per round

    @property
    def ratio(self) -> float:
        """How many times the baseline's speed the patched side has: median of the rounds."""
        return statistics.median(self.ratios)

    @property
    def ratios(self) -> tuple[float, ...]:
        """The same, round by round."""
        pairs = zip(self.baseline.seconds, self.patched.seconds, strict=True)
        return tuple(slow / fast for slow, fast in pairs)

    @property
    def limit_tokens_per_second(self) -> float:
        """Real tokens/s if the Linear layers alone cost time."""
        return statistics.median(self.gemm_rates) / self.flop_per_token

    def share_of_limit(self, side: Side) -> float:
        return side.tokens_per_second / self.limit_tokens_per_second

    @property
    def max_abs_difference(self) -> float:
        return float(np.abs(self.patched.embeddings - self.baseline.embeddings).max(initial=0.0))

    @property
    def min_cosine(self) -> float:
        """The lowest cosine between the two embeddings of one text."""
        a, b = (s.embeddings.astype(np.float64) for s in (self.patched, self.baseline))
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        return float(((a * b).sum(axis=1) / norms).min(initial=1.0))


def compare(
    model: str | os.PathLike[str],
    texts: Sequence[str],
    *,
    queries: Sequence[str] = (),
    rounds: int = 3,
    threads: int | None = None,
    gemm_seconds: float = 3.0,
    progress: Progress | None = None,
) -> Comparison:
    """Embed ``texts`` on the CPU in float32 with both sides, ``rounds`` slices in turn.

    Args:
        model: Folder of a sentence-transformers model of a supported family.
        texts: At least one per round.
        queries: Embedded by both sides after the timing.
        rounds: Slices; each side embeds each slice once.
        threads: CPU threads for every side; None leaves the choice to PyTorch.
        gemm_seconds: Time to spend on the GEMM rate in each round.
        progress: Called with the texts and tokens that either side has just finished.

    Raises:
        ValueError: Fewer texts than rounds.
        OSError: A worker could not load or stopped; the message carries its last words.
    """
    if not 1 <= rounds <= len(texts):
        raise ValueError(f"rounds: expected 1 to {len(texts)} (the texts), got {rounds}")
    sides = {role: Side(role) for role in (BASELINE, PATCHED)}
    gemm: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        workers = {
            role: stack.enter_context(_Worker(role, Path(folder), threads))
            for role in (*sides, GEMM)
        }
        for worker in workers.values():
            worker.send("load", model=os.fspath(model))
        for worker in workers.values():
            gemm.update(worker.receive())
        for role in sides:
            workers[role].encode(texts[:WARM_UP_TEXTS])
        for number in range(rounds):
            rows = range(number, len(texts), rounds)
            for role, worker in list(workers.items())[:: -1 if number % 2 else 1]:
                time.sleep(SETTLE_SECONDS)
                if role == GEMM:
                    worker.send("measure", seconds=gemm_seconds)
                    gemm.update(worker.receive())
                else:
                    sides[role].add(
                        rows, len(texts), *worker.encode([texts[i] for i in rows], progress)
                    )
        for role, side in sides.items():
            if queries:
                side.queries = workers[role].encode(queries)[0]
    baseline, patched = sides.values()
    if baseline.tokens != patched.tokens:
        raise ValueError(
            f"tokens: expected {PATCHED} to count {baseline.tokens} as {BASELINE} does, "
            f"got {patched.tokens}"
        )
    return Comparison(
        baseline, patched, gemm["threads"], gemm["flop_per_token"], gemm["case"], gemm["rates"]
    )


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self, role: str, folder: Path, threads: int | None) -> None:
        self.role, self.folder = role, folder
        self.stderr = (folder / f"{role}.stderr").open("w+b")
        environment = dict(os.environ, HF_HUB_OFFLINE="1", PYTHONWARNINGS="ignore")
        if threads is not None:
            names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")
            environment.update(dict.fromkeys(names, str(threads)))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "neobert.comparison", role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.stderr,
            text=True,
            encoding="utf-8",
            env=environment,
        )

    def __enter__(self) -> "_Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.stderr.close()

    def send(self, action: str, **arguments: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # the next receive says why
            assert self.process.stdin is not None
            print(json.dumps({"action": action, **arguments}), file=self.process.stdin, flush=True)

    def receive(self, progress: Progress | None = None) -> dict[str, Any]:
        """The answer to the last request; on the way, progress is passed on."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            message: dict[str, Any] = json.loads(line)
            if "done" in message:
                return message
            if progress is not None:
                progress(message["texts"], message["tokens"])
        self.process.wait()
        self.stderr.seek(0)
        words = self.stderr.read().decode("utf-8", "replace").strip().splitlines()
        reason = words[-1] if words else f"exit code {self.process.returncode}"
        raise ChildProcessError(f"{self.role}: the process stopped: {reason}")

    def encode(
        self, texts: Sequence[str], progress: Progress | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        source, target = self.folder / f"{self.role}.json", self.folder / f"{self.role}.npy"
        source.write_text(json.dumps(list(texts)), encoding="utf-8")
        self.send("encode", texts=str(source), embeddings=str(target))
        result = self.receive(progress)
        return np.load(target, allow_pickle=False), result


class _Embedder(abc.ABC):
    """A side's process: load a model folder, embed texts."""

    @abc.abstractmethod
    def load(self, model: str) -> dict[str, Any]:
        """Get ready; what it returns goes to the parent."""

    @abc.abstractmethod
    def encode(self, texts: list[str], report: Report) -> tuple[np.ndarray, Callable[[], int]]:
        """The embeddings, and what counts the texts' tokens, to be called outside the timing."""


class _Baseline(_Embedder):
    """sentence-transformers with its defaults, as its users call it."""

    def load(self, model: str) -> dict[str, Any]:
        from sentence_transformers import SentenceTransformer

        self.model = SentenceTransformer(model, device="cpu")
        return {}

    def encode(self, texts: list[str], report: Report) -> tuple[np.ndarray, Callable[[], int]]:
        def finished(_: object, __: object, features: dict[str, Any]) -> None:
            tokens = int(features["attention_mask"].sum())
            report(texts=len(features["sentence_embedding"]), tokens=tokens)

        with self.model.register_forward_hook(finished):
            embeddings = self.model.encode(texts)
        return np.asarray(embeddings), lambda: self._tokens(texts)

    def _tokens(self, texts: list[str]) -> int:
        ids = self.model.tokenizer(texts, truncation=True, max_length=self.model.max_seq_length)
        return sum(map(len, ids["input_ids"]))


class _Patched(_Embedder):
    """`neobert.encode.Encoder`, which patches the model it loads."""

    def load(self, model: str) -> dict[str, Any]:
        from neobert.encode import Encoder

        self.encoder = Encoder.load(model, device="cpu", dtype="float32", patched=True)
        return {}

    def encode(self, texts: list[str], report: Report) -> tuple[np.ndarray, Callable[[], int]]:
        def finished(texts: int, tokens: int) -> None:
            report(texts=texts, tokens=tokens)

        chunks = list(self.encoder.stream(texts, progress=finished))
        return np.concatenate([c.embeddings for c in chunks]), lambda: sum(c.tokens for c in chunks)


class _Gemm:
    """The rate of ``F.linear`` at the shapes of the model's layers."""

    def load(self, model: str) -> dict[str, Any]:
        import torch
        from transformers import AutoConfig, AutoModel

        import neobert  # noqa: F401  registers its model with transformers
        from neobert.cost import GemmMeter, linear_shapes

        with torch.device("meta"):
            shapes = linear_shapes(AutoModel.from_config(AutoConfig.from_pretrained(model)))
        self.meter = GemmMeter(shapes)
        return {"threads": self.meter.threads, "flop_per_token": self.meter.flop_per_token}

    def measure(self, seconds: float) -> dict[str, Any]:
        self.meter.measure(seconds)
        return {"case": self.meter.best.name, "rates": self.meter.best.rates}


def peak_bytes() -> int:
    """The most memory this process has ever held (resident set); 0 where nobody knows."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


ROLES: dict[str, type[_Embedder | _Gemm]] = {BASELINE: _Baseline, PATCHED: _Patched, GEMM: _Gemm}


def _serve(role: str, requests: IO[str], report: Report) -> None:
    """Answer requests until the parent closes the pipe."""
    worker = ROLES[role]()
    for line in requests:
        request = json.loads(line)
        action = request.pop("action")
        if isinstance(worker, _Embedder) and action == "encode":
            answer = _timed_encode(worker, report, **request)
        else:
            answer = getattr(worker, action)(**request)
        report(done=action, **answer)


def _timed_encode(worker: _Embedder, report: Report, texts: str, embeddings: str) -> dict[str, Any]:
    """Embed the texts of one file into another; loading and saving are not timed."""
    passages = json.loads(Path(texts).read_text(encoding="utf-8"))
    began = time.perf_counter()
    rows, count_tokens = worker.encode(passages, report)
    seconds = time.perf_counter() - began
    answer = {"seconds": seconds, "texts": len(passages), "peak_bytes": peak_bytes()}
    np.save(embeddings, rows, allow_pickle=False)
    return {**answer, "tokens": count_tokens()}


@contextlib.contextmanager
def _reports() -> Iterator[Report]:
    """A JSON-lines writer on standard output, which nothing else in the process can then reach."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock = threading.Lock()  # progress comes from several threads

    def report(**message: Any) -> None:
        with lock:
            print(json.dumps(message), file=channel, flush=True)

    with channel:
        yield report


if __name__ == "__main__":
    with _reports() as send_report:
        _serve(sys.argv[1], sys.stdin, send_report)
