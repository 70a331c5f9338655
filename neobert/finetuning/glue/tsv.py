"""Readers of the benchmark's original .tsv files.

They are lines split at tabs, with or without a byte order mark. Quotes mean nothing: a reader of
CSV would merge rows of MRPC and QQP between two stray ones.
"""

import math
from pathlib import Path

import numpy as np

from neobert.finetuning.glue.data import Split, TaskData, empty_texts, one_class
from neobert.finetuning.glue.tasks import HIGHEST_SCORE, LOWEST_SCORE, Task
from neobert.readers import InputError, LineReader, ReadOptions, Row, escaped

# QQP's files have some rows without all columns; more of them than this is a broken file.
BROKEN_ROWS = 1 / 1000


def load_folder(task: Task, folder: Path) -> TaskData:
    """Read ``folder/TASK`` or, where that is missing, ``folder`` itself.

    Raises:
        InputError: A file is missing or breaks a rule; the message names file and line.
    """
    if not folder.is_dir():
        raise InputError(f"data: expected a folder with {task.name}/train.tsv, got {folder}")
    if (folder / task.name).is_dir():
        folder = folder / task.name
    needed = ["train", *(part.file for part in task.dev)]
    missing = [f"{name}.tsv" for name in needed if not (folder / f"{name}.tsv").is_file()]
    if missing:
        rule = f"{', '.join(f'{name}.tsv' for name in needed)} in {folder}"
        raise InputError(f"data: expected {rule}, got no {missing[0]}")
    notes: list[str] = []
    train = _read(folder / "train.tsv", task, notes)
    dev = {part.name: _read(folder / f"{part.file}.tsv", task, notes) for part in task.dev}
    test = {
        part.name: _read(path, task, notes, labelled=False)
        for part in task.test_parts
        if (path := part.find(folder)) is not None
    }
    return TaskData(train, dev, test, tuple(notes))


def _read(path: Path, task: Task, notes: list[str], labelled: bool = True) -> Split:
    with open(path, "rb") as stream:
        rows = [row for row in LineReader(stream, str(path), ReadOptions()) if row.text]
    if labelled and task.headless:
        columns = list(task.headless)
    else:
        if not rows:
            raise InputError(f"{path}: expected a header, got an empty file")
        columns = rows.pop(0).text.split("\t")
    wanted = [*task.texts, task.label] if labelled else [*task.texts]
    for name in wanted:
        if name not in columns:
            got = ", ".join(columns)[:200]
            raise InputError(f"{path}: expected a column {name!r}, got {escaped(got)}")
    complete, broken = [], []
    for row in rows:
        fields = row.text.split("\t")
        if len(fields) == len(columns):
            complete.append((row, fields))
        else:
            broken.append((row, len(fields)))
    if broken and (not labelled or len(broken) > BROKEN_ROWS * len(rows)):
        row, count = broken[0]
        raise InputError(f"{row.place}: expected {len(columns)} fields, got {count}")
    if not complete:
        raise InputError(f"{path}: expected rows, got none")
    name = f"{path.parent.name}/{path.name}"
    if broken:
        lines = ", ".join(str(row.number) for row, _ in broken)
        notes.append(f"{name}: {len(broken):,} rows without all columns left out (lines {lines})")
    at = {column: i for i, column in enumerate(columns)}
    texts = tuple([fields[at[column]] for _, fields in complete] for column in task.texts)
    notes += empty_texts(name, texts)
    labels = None
    if labelled:
        read = _score if task.is_regression else _class
        labels = np.array([read(task, row, fields[at[task.label]]) for row, fields in complete])
        notes += one_class(task, name, labels)
    # The first column of a test set is what a submission names; QQP calls it id.
    ids = [str(i) if labelled else fields[0] for i, (_, fields) in enumerate(complete)]
    return Split(texts, labels, ids)


def _class(task: Task, row: Row, field: str) -> int:
    if field not in task.labels:
        rule = f"one of {', '.join(task.labels)} as {task.label}"
        raise InputError(f"{row.place}: expected {rule}, got {escaped(field)[:50]!r}")
    return task.labels.index(field)


def _score(task: Task, row: Row, field: str) -> float:
    try:
        score = float(field)
    except ValueError:
        score = math.nan
    if not LOWEST_SCORE <= score <= HIGHEST_SCORE:
        rule = f"a number from {LOWEST_SCORE:g} to {HIGHEST_SCORE:g} as {task.label}"
        raise InputError(f"{row.place}: expected {rule}, got {escaped(field)[:50]!r}")
    return score
