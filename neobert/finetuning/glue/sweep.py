"""Work through a grid: one task, one model, every point that is not finished yet."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import neobert_kernels
from neobert.finetuning.batches import Tokens, tokenize
from neobert.finetuning.classifier import Classifier, load_classifier
from neobert.finetuning.glue import metrics
from neobert.finetuning.glue.data import TaskData
from neobert.finetuning.glue.grid import Grid
from neobert.finetuning.glue.metrics import Scores, shown
from neobert.finetuning.glue.runs import Point, Run, read_best
from neobert.finetuning.glue.tasks import HIGHEST_SCORE, LOWEST_SCORE, Task
from neobert.finetuning.schedule import Setting
from neobert.finetuning.training import Evaluation, Fit, fit, predict
from neobert.loading import digest, quiet_loading

Say = Callable[[str], None]

SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True)
class Source:
    """The model of a grid.

    Attributes:
        name: What the report calls it; also the name of its folder.
        model: As the user named it.
        folder: Where its files are.
        mnli: The folder of the best MNLI checkpoint to start from, or None.
        patched: Whether it runs on our operators.
        max_length: Tokens kept of a text, or None for the default.
        precision: Of `neobert.finetuning.training.fit`.
    """

    name: str
    model: str
    folder: Path
    mnli: Path | None = None
    patched: bool = True
    max_length: int | None = None
    precision: str = "float32"


@dataclass(eq=False)
class Sweep:
    """A grid over one task; `points` works, whoever else does."""

    task: Task
    data: TaskData
    source: Source
    grid: Grid
    grid_name: str
    seeds: Sequence[int]
    device: torch.device

    @cached_property
    def settings(self) -> list[Setting]:
        return self.grid.settings(self.seeds)

    def identity(self) -> dict[str, Any]:
        """What decides the results, as `Run.open` compares it."""
        source = self.source
        return {
            "task": self.task.name,
            "name": source.name,
            "model": source.model,
            "model_files": digest(source.folder),
            "start": None if source.mnli is None else f"MNLI {digest(source.mnli)}",
            "data": self.data.fingerprint,
            "sizes": self.data.sizes,
            "grid": self.grid_name,
            "protocol": self.grid.protocol.record(),
            "max_length": source.max_length,
            "patched": source.patched,
            "precision": source.precision,
            "attention_dropout": 0.0,
        }

    def load(self) -> Classifier:
        source = self.source
        return load_classifier(
            source.folder,
            self.task.labels,
            device=self.device,
            patched=source.patched,
            max_length=source.max_length,
            head=source.mnli,
        )

    def work(self, run: Run, say: Say) -> int:
        """Train every point that is neither finished nor held; the number of points trained.

        Args:
            run: Where results go.
            say: Called with a line now and then.
        """
        metrics.require()
        trained = 0
        tokens: dict[str, Tokens] | None = None
        for number, setting in enumerate(self.settings, 1):
            with run.claim(setting) as is_ours:
                if not is_ours:
                    continue
                torch.manual_seed(setting.seed)
                classifier = self.load()
                if tokens is None:
                    tokens = self._tokenized(classifier)
                    for note in (*self.data.notes, *classifier.notes, *_cut(tokens)):
                        say(f"{self.task.name}: {note}")
                where = f"{self.task.name} {number}/{len(self.settings)} ({setting})"
                result = self._train(classifier, tokens, setting, _Lines(where, say))
                if result.best is not None:
                    run.keep_best(setting, result.best.score, _saver(classifier))
                run.record(setting, {**result.record(), "machine": machine(self.device)})
                trained += 1
                say(f"{where}: {_outcome(result)}")
        return trained

    def _tokenized(self, classifier: Classifier) -> dict[str, Tokens]:
        splits = {"train": self.data.train}
        splits |= {f"dev {name}".strip(): split for name, split in self.data.dev.items()}
        return {name: tokens_of(classifier, split.texts) for name, split in splits.items()}

    def _train(
        self, classifier: Classifier, tokens: dict[str, Tokens], setting: Setting, lines: "_Lines"
    ) -> Fit:
        labels = {name: _labels(split.labels) for name, split in self.data.dev.items()}

        def judge() -> tuple[float | None, dict[str, float | None], dict[str, str]]:
            predictions = {
                name: predictions_of(
                    self.task,
                    predict(classifier, tokens[f"dev {name}".strip()], self.source.precision),
                )
                for name in labels
            }
            scores = metrics.evaluate(self.task, labels, predictions)
            return scores.score, scores.values, scores.undefined

        return fit(
            classifier,
            tokens["train"],
            _labels(self.data.train.labels),
            setting,
            self.grid.protocol,
            judge,
            precision=self.source.precision,
            report=lines,
        )


def tokens_of(classifier: Classifier, texts: Sequence[Sequence[str]]) -> Tokens:
    return tokenize(classifier.tokenizer, texts, classifier.max_length, classifier.with_types)


def predictions_of(task: Task, logits: np.ndarray) -> np.ndarray:
    """Class numbers, or scores within the scale; NaN where a logit is not finite."""
    found: np.ndarray
    if task.is_regression:
        found = logits[:, 0].clip(LOWEST_SCORE, HIGHEST_SCORE).astype(np.float64)
    else:
        found = logits.argmax(1)
    finite = np.isfinite(logits).all(1)
    return found if finite.all() else np.where(finite, found, np.nan)


def best_points(points: Sequence[Point]) -> list[Point]:
    """The points of the best setting, one per seed: the highest mean over its seeds.

    A setting counts only where every seed of it has a score.
    """
    by_setting: dict[tuple[float, int, float], list[Point]] = {}
    for point in points:
        s = point.setting
        by_setting.setdefault((s.lr, s.batch_size, s.weight_decay), []).append(point)
    best: list[Point] = []
    highest = -np.inf
    for same in by_setting.values():
        mean = mean_score(same)
        if mean is not None and mean > highest:
            best, highest = same, mean
    return best


def mean_score(points: Sequence[Point]) -> float | None:
    scores = [point.score for point in points if point.score is not None]
    return sum(scores) / len(scores) if scores and len(scores) == len(points) else None


def is_finished(run: Run, sweep: Sweep) -> bool:
    return all(run.find(setting) is not None for setting in sweep.settings)


def summary(run: Run, sweep: Sweep) -> list[str]:
    """Lines for the user: how far the grid is, and what was best."""
    finished = [point for s in sweep.settings if (point := run.find(s)) is not None]
    name, total = sweep.task.name, len(sweep.settings)
    if len(finished) < total:
        lines = [f"{name}: {len(finished)} of {total} points are finished, others in work"]
    else:
        lines = [f"{name}: all {total} points are finished"]
    best = best_points(finished)
    if not best:
        return [*lines, f"{name}: score undefined at every point"]
    scores = Scores(best[0].result["metrics"])
    kept = read_best(run.folder)
    lines.append(
        f"{name}: best score {shown(mean_score(best))} ({scores.line()}) at {best[0].setting}, "
        f"step {best[0].result['best_step']} of {best[0].result['planned_steps']}"
    )
    if kept is not None:
        lines.append(f"{name}: its model is in {run.folder / 'best'}")
    return lines


def machine(device: torch.device) -> dict[str, str]:
    """What a result was made on, and with."""
    import transformers

    name = f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": f"{device.type}: {name}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "neobert_kernels": neobert_kernels.__version__,
    }


class _Lines:
    """A line now and then for the evaluations of one point."""

    def __init__(self, where: str, say: Say) -> None:
        self._where, self._say = where, say
        self._last = time.monotonic()

    def __call__(self, done: Fit, evaluation: Evaluation) -> None:
        now = time.monotonic()
        if now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        assert done.best is not None
        rate = done.tokens / max(done.training_s, 1e-9)
        left = (done.planned_steps - done.steps) * done.training_s / done.steps
        self._say(
            f"{self._where}: step {done.steps:,}/{done.planned_steps:,}, "
            f"loss {evaluation.loss:.4f}, {Scores(evaluation.metrics).line()} "
            f"(best score {shown(done.best.score)}), {rate:,.0f} tokens/s, "
            f"at most {left:,.0f} s left of training"
        )


def _outcome(result: Fit) -> str:
    rate = result.tokens / max(result.training_s, 1e-9)
    ends = {"early": " (stopped early)", "diverged": " (the loss is not finite)"}
    end = f"{result.steps:,} steps{ends.get(result.stopped, '')}, {rate:,.0f} tokens/s"
    if result.best is None:
        return f"no score; {end}"
    reasons = "".join(f"; {name}: {why}" for name, why in result.best.undefined.items())
    scores = Scores(result.best.metrics)
    return f"score {shown(result.best.score)} ({scores.line()}){reasons}; {end}"


def _cut(tokens: dict[str, Tokens]) -> list[str]:
    return [
        f"{name}: {each.truncated:,} of {len(each):,} texts are longer than the model takes, cut"
        for name, each in tokens.items()
        if each.truncated
    ]


def _saver(classifier: Classifier) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        with quiet_loading():
            classifier.model.save_pretrained(folder)
            classifier.tokenizer.save_pretrained(folder)

    return save


def _labels(labels: np.ndarray | None) -> np.ndarray:
    assert labels is not None  # only test sets have none
    return labels
