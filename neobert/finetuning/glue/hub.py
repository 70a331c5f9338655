"""GLUE from the hub, through the ``datasets`` library."""

import os
from typing import Any

import numpy as np

from neobert.finetuning.glue.data import HUB, Split, TaskData, empty_texts, one_class
from neobert.finetuning.glue.tasks import HIGHEST_SCORE, LOWEST_SCORE, Task
from neobert.readers import InputError, one_line


def load_hub(task: Task) -> TaskData:
    """Download (once; later runs read the local cache) and check one task.

    Raises:
        InputError: ``datasets`` is not installed, the hub cannot be reached, or the data set has
            other columns or labels than expected.
    """
    splits = _download(task, task.hub)
    notes: list[str] = []

    def read(split: str) -> Split:
        if split not in splits:
            raise InputError(f"data: expected a split {split!r} in {HUB}, got {', '.join(splits)}")
        return _split(task, splits[split], f"{task.hub} {split}", notes)

    train = read("train")
    dev = {part.name: read(part.hub) for part in task.dev}
    test = {}
    for part in task.test_parts:
        try:
            found = _download(task, part.hub_config) if part.hub_config else splits
        except InputError as error:
            notes.append(f"no predictions of {part.submission}: {error}")
            continue
        if part.hub in found:
            where = f"{part.hub_config or task.hub} {part.hub}"
            test[part.name] = _split(task, found[part.hub], where, notes, labelled=False)
    return TaskData(train, dev, test, tuple(notes))


def _download(task: Task, config: str) -> Any:
    files = ", ".join(["train.tsv", *(f"{part.file}.tsv" for part in task.dev)])
    instead = f"pass --data DIR with {files} in DIR/{task.name}"
    try:
        import datasets
    except ImportError:
        rule = "the package datasets, pip install 'neobert-kernels[train]'"
        raise InputError(f"data: expected {rule}, got none; or {instead}") from None
    shown = datasets.utils.logging.is_progress_bar_enabled()
    try:
        return datasets.load_dataset(HUB, config)
    # Whatever goes wrong on a network comes as one of these; so does a hub that is switched off.
    except (OSError, ValueError, RuntimeError) as error:
        offline = "" if not os.environ.get("HF_HUB_OFFLINE") else " (HF_HUB_OFFLINE is set)"
        reason = f"{type(error).__name__}: {one_line(error)[:200]}"
        raise InputError(
            f"data: expected {HUB}, {config!r}, from the hub, got {reason}{offline}; {instead}"
        ) from None
    finally:
        if shown:
            datasets.utils.logging.enable_progress_bar()


def _split(task: Task, rows: Any, name: str, notes: list[str], labelled: bool = True) -> Split:
    where = f"{HUB} {name}"
    for column in (*task.hub_texts, "label"):
        if column not in rows.column_names:
            got = ", ".join(rows.column_names)
            raise InputError(f"{where}: expected a column {column!r}, got {got}")
    if not len(rows):
        raise InputError(f"{where}: expected rows, got none")
    texts = tuple([text or "" for text in rows[column]] for column in task.hub_texts)
    notes += empty_texts(where, texts)
    labels = None
    if labelled:
        labels = np.array(rows["label"], np.float64 if task.is_regression else np.int64)
        _check(task, where, labels)
        notes += one_class(task, where, labels)
    numbers = rows["idx"] if "idx" in rows.column_names else range(len(rows))
    return Split(texts, labels, [str(number) for number in numbers])


def _check(task: Task, where: str, labels: np.ndarray) -> None:
    low, high = 0, len(task.labels) - 1
    if task.is_regression:
        low, high = int(LOWEST_SCORE), int(HIGHEST_SCORE)
    inside = (labels >= low) & (labels <= high)
    if not inside.all():
        at = int(np.argmin(inside))
        raise InputError(f"{where}: expected labels {low} to {high}, got {labels[at]} in row {at}")
