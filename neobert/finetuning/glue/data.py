"""A task's examples, from a folder of the original .tsv files or from the hub."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from neobert.finetuning.glue.tasks import Task

HUB = "nyu-mll/glue"


@dataclass(frozen=True, eq=False)
class Split:
    """Examples in their file's order.

    Attributes:
        texts: One column of texts, or two for pairs.
        labels: int64 class numbers or float64 scores; None in a test set.
        ids: What a submission calls each example.
    """

    texts: tuple[list[str], ...]
    labels: np.ndarray | None
    ids: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    def __post_init__(self) -> None:
        assert all(len(column) == len(self.ids) for column in self.texts)
        assert self.labels is None or len(self.labels) == len(self.ids)


@dataclass(frozen=True, eq=False)
class TaskData:
    """Attributes:
    train: Labelled examples.
    dev: By the part's name.
    test: By the part's name; empty where there are none.
    notes: What was left out or looks odd, one line each.
    """

    train: Split
    dev: dict[str, Split]
    test: dict[str, Split]
    notes: tuple[str, ...] = ()

    @cached_property
    def fingerprint(self) -> str:
        """A short hash of every training and dev text and label."""
        hashed = hashlib.sha256()
        for name, split in (("train", self.train), *self.dev.items()):
            hashed.update(f"{name} {len(split)}\n".encode())
            for column in split.texts:
                for text in column:
                    hashed.update(text.encode() + b"\n")
            assert split.labels is not None
            hashed.update(split.labels.astype("<f8").tobytes())
        return hashed.hexdigest()[:16]

    @property
    def sizes(self) -> dict[str, int]:
        """Of what decides the scores: a test set may come later, or change."""
        dev = {f"dev {name}".strip(): len(split) for name, split in self.dev.items()}
        return {"train": len(self.train), **dev}


def load(task: Task, folder: Path | None) -> TaskData:
    """A task's data: ``folder/TASK/*.tsv``, ``folder/*.tsv``, or the hub where ``folder`` is None.

    Raises:
        InputError: A file is missing or breaks a rule, or the hub cannot be reached.
    """
    if folder is None:
        from neobert.finetuning.glue.hub import load_hub

        return load_hub(task)
    from neobert.finetuning.glue.tsv import load_folder

    return load_folder(task, folder)


def empty_texts(name: str, texts: tuple[list[str], ...]) -> Iterator[str]:
    """A note where texts are empty: they are kept, as the benchmark's own data has some."""
    rows = sum(any(not text.strip() for text in row) for row in zip(*texts, strict=True))
    if rows:
        yield f"{name}: {rows:,} rows with an empty text, kept"


def one_class(task: Task, name: str, labels: np.ndarray) -> Iterator[str]:
    """A note where every label is the same."""
    if len(set(labels.tolist())) == 1:
        shown = labels[0].item() if task.is_regression else task.labels[labels[0]]
        yield f"{name}: every label is {shown}"
