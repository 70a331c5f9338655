"""MTEB results beside the paper's table: means by kind of task, in percent.

OUTPUT/runs/MODEL/BENCHMARK/run.json    the scores of one command, for the reports
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from neobert import files
from neobert.readers import InputError, one_line
from neobert.tables import Table

# The paper's table (arXiv 2502.19587), MTEB(eng, v1), the same fine-tuning for every model.
KINDS = {
    "Classification": "class.",
    "Clustering": "clust.",
    "PairClassification": "pair",
    "Reranking": "rerank",
    "Retrieval": "retr.",
    "STS": "STS",
    "Summarization": "summ.",
}
AVERAGE = "average"
COLUMNS = (*KINDS.values(), AVERAGE)
PAPER = {
    "BERT-base": (60.6, 37.0, 71.5, 48.9, 28.3, 69.9, 31.1, 48.1),
    "RoBERTa-base": (58.7, 36.7, 71.2, 49.8, 26.9, 71.8, 29.1, 47.7),
    "NomicBERT-2048": (55.0, 35.3, 69.0, 48.8, 30.5, 70.1, 30.1, 47.1),
    "ModernBERT-base": (58.9, 38.1, 63.8, 48.5, 21.0, 66.2, 30.1, 45.0),
    "NeoBERT-4096": (61.6, 40.8, 76.2, 51.2, 31.6, 74.8, 30.7, 51.3),
    "BERT-large": (59.8, 39.3, 70.9, 49.7, 29.6, 71.4, 31.2, 49.1),
    "RoBERTa-large": (57.1, 39.3, 72.5, 51.3, 30.0, 71.7, 31.1, 48.9),
    "ModernBERT-large": (62.4, 38.7, 65.5, 50.1, 23.1, 68.3, 27.8, 46.9),
}
PAPER_BENCHMARK = "MTEB(eng, v1)"
NOT_RUN = "not run"
KIND, VERSION = "neobert mteb", 1

# By task: its kind, and its main score or None.
Scores = Mapping[str, tuple[str, float | None]]


@dataclass(frozen=True)
class Result:
    """One model on one benchmark, or on tasks of the user's choice.

    Attributes:
        name: The model's.
        asked: What the user named: a benchmark, or tasks.
        tasks: The names of all its tasks.
        scores: What there is of them.
        settings: What else decides the numbers.
    """

    name: str
    asked: tuple[str, ...]
    tasks: tuple[str, ...]
    scores: Scores
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.asked[0] if len(self.asked) == 1 else f"{len(self.asked)} tasks"

    @property
    def kinds(self) -> list[Scores]:
        """The scores of each kind of task, in the order of `KINDS`, and of all."""
        ours = {task: self.scores.get(task, ("", None)) for task in self.tasks}
        parts = [{k: v for k, v in ours.items() if v[0] == kind} for kind in KINDS]
        return [*parts, ours]

    def write(self, output: Path) -> Path:
        """The file that `collect` finds under ``output``."""
        asked = ", ".join(self.asked)
        digest = hashlib.sha256(asked.encode()).hexdigest()[:8]
        short = re.sub(r"[^A-Za-z0-9.]+", "-", asked).strip("-")[:60]
        folder = output / "runs" / self.name.replace("/", "--") / f"{short}-{digest}"
        folder.mkdir(parents=True, exist_ok=True)
        content = {"kind": KIND, "version": VERSION, **vars(self)}
        files.write_object(folder / "run.json", content)
        return folder / "run.json"


def read(folder: Path) -> Result:
    path = folder / "run.json"
    content = files.read_object(path)
    try:
        if (content["kind"], content["version"]) != (KIND, VERSION):
            raise ValueError(f"{content['kind']} {content['version']}")
        return Result(
            content["name"],
            tuple(content["asked"]),
            tuple(content["tasks"]),
            {task: (kind, score) for task, (kind, score) in content["scores"].items()},
            content["settings"],
        )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        got = one_line(error)
        raise InputError(f"{path}: expected a run of neobert evaluate mteb, got {got}") from None


def collect(*roots: Path) -> list[Result]:
    """All results under ``roots``.

    Raises:
        InputError: Two folders hold the same model and benchmark.
    """
    found: dict[tuple[str, tuple[str, ...]], tuple[Path, Result]] = {}
    for folder in files.find_runs(KIND, *roots):
        result = read(folder)
        key = result.name, result.asked
        if key in found:
            raise InputError(
                f"runs: expected one folder for {result.name} and {result.label}, got "
                f"{found[key][0]} and {folder}"
            )
        found[key] = folder, result
    return [result for _, result in found.values()]


def scores_table(results: Sequence[Result]) -> Table:
    """Rows of the paper, and ours below them, a row per benchmark.

    A mean is given where every task of its kind (of the whole benchmark) has a score.
    """
    rows: list[list[str]] = []
    names = {result.name for result in results}
    for name in [*PAPER, *sorted(names - set(PAPER))]:
        if name in PAPER:
            rows.append([name, "paper", *(f"{value:.1f}" for value in PAPER[name])])
        if name not in names:
            rows.append([name, "ours", *[NOT_RUN] * len(COLUMNS)])
        for result in results:
            if result.name == name:
                cells = [shown_mean(scores) for scores in result.kinds]
                rows.append([name, f"ours, {result.label}", *cells])
    return Table(("model", "from", *COLUMNS), rows, numbers_from=2)


def mean(scores: Scores) -> float | None:
    """In percent; None unless every task has a score."""
    known = [value for _, value in scores.values() if value is not None]
    return 100 * sum(known) / len(known) if known and len(known) == len(scores) else None


def shown_mean(scores: Scores) -> str:
    value = mean(scores)
    if value is not None:
        return f"{value:.1f}"
    known = sum(score is not None for _, score in scores.values())
    return f"{known} of {len(scores)} tasks" if known else NOT_RUN


def tasks_table(results: Sequence[Result]) -> Table:
    """Every task's main score by model."""
    models: dict[str, dict[str, tuple[str, float | None]]] = {}
    for result in results:
        models.setdefault(result.name, {}).update(result.scores)
    kinds = {task: kind for scores in models.values() for task, (kind, _) in scores.items()}
    rows = [
        [
            task,
            kinds[task],
            *(_shown(scores.get(task, ("", None))[1]) for scores in models.values()),
        ]
        for task in sorted(kinds, key=lambda task: (kinds[task], task))
    ]
    return Table(("task", "kind", *models), rows, numbers_from=2)


def _shown(score: float | None) -> str:
    return NOT_RUN if score is None else f"{100 * score:.1f}"


def settings_table(results: Sequence[Result]) -> Table:
    """How each of our rows was made."""
    rows = []
    for result in results:
        known = sum(score is not None for _, score in result.scores.values())
        settings = ", ".join(f"{name} {value}" for name, value in result.settings.items())
        tasks = f"{known} of {len(result.tasks)}"
        rows.append([result.name, ", ".join(result.asked), tasks, settings])
    return Table(("model", "benchmark", "tasks", "settings"), rows)


def draw(results: Sequence[Result], path: Path) -> Path | None:
    """Bars per kind of task: each of our rows, and the paper's where it has the model."""
    from neobert import pictures

    if not results:
        return None
    series: dict[str, Sequence[float | str]] = {}
    for result in results:
        if result.name in PAPER:
            series.setdefault(f"{result.name}, paper", PAPER[result.name])
        ours: list[float | str] = []
        for scores in result.kinds:
            value = mean(scores)
            ours.append(shown_mean(scores) if value is None else value)
        if result.asked != (PAPER_BENCHMARK,):
            ours[-1] = "other tasks"  # than those of the paper's average
        series[f"{result.name}, ours ({result.label})"] = ours
    return pictures.bars(path, "MTEB", "main score, percent", COLUMNS, series)
