"""MTEB results beside the paper's table: means by kind of task, in percent."""

from collections.abc import Mapping, Sequence

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
COLUMNS = (*KINDS.values(), "average")
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
NOT_RUN = "not run"

# By task: its kind, and its main score or None.
Scores = Mapping[str, tuple[str, float | None]]


def scores_table(models: Mapping[str, Scores], benchmark: Sequence[str]) -> Table:
    """Rows of the paper, and ours below them.

    A mean is given where every task of its kind (of the whole benchmark) has a score.

    Args:
        models: Results of each of our models.
        benchmark: The names of the benchmark's tasks.
    """
    rows: list[list[str]] = []
    for name in [*PAPER, *sorted(set(models) - set(PAPER))]:
        if name in PAPER:
            rows.append([name, "paper", *(f"{value:.1f}" for value in PAPER[name])])
        if name not in models:
            rows.append([name, "ours", *[NOT_RUN] * len(COLUMNS)])
            continue
        ours = {task: models[name].get(task, ("", None)) for task in benchmark}
        cells = [_mean({k: v for k, v in ours.items() if v[0] == kind}) for kind in KINDS]
        rows.append([name, "ours", *cells, _mean(ours)])
    return Table(("model", "from", *COLUMNS), rows, numbers_from=2)


def _mean(scores: Scores) -> str:
    known = [value for _, value in scores.values() if value is not None]
    if not known:
        return NOT_RUN
    if len(known) < len(scores):
        return f"{len(known)} of {len(scores)} tasks"
    return f"{100 * sum(known) / len(known):.1f}"


def tasks_table(models: Mapping[str, Scores]) -> Table:
    """Every task's main score by model."""
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
