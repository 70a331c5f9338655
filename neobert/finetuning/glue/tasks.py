"""The nine tasks of GLUE (Wang et al. 2018): columns, labels, metrics, files.

Labels are numbered as in the hub's ``nyu-mll/glue``.
"""

from dataclasses import dataclass
from pathlib import Path

from neobert.readers import InputError

CLASSES = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
MNLI_CLASSES = ("entailment", "neutral", "contradiction")


@dataclass(frozen=True)
class Part:
    """One evaluation split.

    Attributes:
        name: What tells it from another of its task: "m" and "mm" of MNLI, else "".
        file: Its ``.tsv`` file, without the ending.
        hub: Its split on the hub.
        submission: The name of its predictions' file, without the ending.
        hub_config: The hub's configuration, where it is not its task's.
        elsewhere: Other places of the file, from the folder that the task's folder is in.
    """

    name: str
    file: str
    hub: str
    submission: str = ""
    hub_config: str = ""
    elsewhere: tuple[str, ...] = ()

    def find(self, folder: Path) -> Path | None:
        """Its file, if there is one for the task in ``folder``."""
        places = [folder / f"{self.file}.tsv", *(folder.parent / name for name in self.elsewhere)]
        return next((path for path in places if path.is_file()), None)


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: As the paper and the benchmark write it; also the name of its folder.
        hub: The hub's configuration.
        labels: Names in the order of their numbers; none for a score to regress.
        metrics: Names of `neobert.finetuning.glue.metrics.METRICS`; the task's score is the mean.
        texts: Text columns of the ``.tsv`` files, one or two.
        label: Label column of the ``.tsv`` files.
        hub_texts: Text columns on the hub.
        headless: Columns of labelled files where those have no header.
        from_mnli: Whether the paper starts it from the best MNLI checkpoint.
        averaged: Whether it counts in the average.
        spelled: Whether a submission has labels by name.
    """

    name: str
    hub: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    texts: tuple[str, ...]
    label: str
    hub_texts: tuple[str, ...]
    dev: tuple[Part, ...] = (Part("", "dev", "validation"),)
    test: tuple[Part, ...] = ()
    headless: tuple[str, ...] = ()
    from_mnli: bool = False
    averaged: bool = True
    spelled: bool = False

    @property
    def is_regression(self) -> bool:
        return not self.labels

    @property
    def outputs(self) -> int:
        """Logits of one text."""
        return len(self.labels) or 1

    @property
    def test_parts(self) -> tuple[Part, ...]:
        return self.test or (Part("", "test", "test", self.name),)


_PAIR = ("sentence1", "sentence2")
_QUESTIONS = ("question1", "question2")
_STRINGS = ("#1 String", "#2 String")
_DIAGNOSTICS = ("diagnostic/diagnostic.tsv", "AX/AX.tsv", "AX.tsv")

# In the order of the paper's table, which has MNLI first: others start from it.
TASKS = {
    task.name: task
    for task in (
        Task(
            name="MNLI",
            hub="mnli",
            labels=MNLI_CLASSES,
            metrics=("accuracy",),
            texts=_PAIR,
            label="gold_label",
            hub_texts=("premise", "hypothesis"),
            dev=(
                Part("m", "dev_matched", "validation_matched"),
                Part("mm", "dev_mismatched", "validation_mismatched"),
            ),
            test=(
                Part("m", "test_matched", "test_matched", "MNLI-m"),
                Part("mm", "test_mismatched", "test_mismatched", "MNLI-mm"),
                # The benchmark's diagnostics, which a submission predicts with the MNLI model.
                Part("ax", "AX", "test", "AX", "ax", _DIAGNOSTICS),
            ),
            spelled=True,
        ),
        Task(
            name="QNLI",
            hub="qnli",
            labels=ENTAILMENT,
            metrics=("accuracy",),
            texts=("question", "sentence"),
            label="label",
            hub_texts=("question", "sentence"),
            from_mnli=True,
            spelled=True,
        ),
        Task("QQP", "qqp", CLASSES, ("accuracy", "f1"), _QUESTIONS, "is_duplicate", _QUESTIONS),
        Task(
            name="RTE",
            hub="rte",
            labels=ENTAILMENT,
            metrics=("accuracy",),
            texts=_PAIR,
            label="label",
            hub_texts=_PAIR,
            from_mnli=True,
            spelled=True,
        ),
        Task("SST-2", "sst2", CLASSES, ("accuracy",), ("sentence",), "label", ("sentence",)),
        Task(
            name="MRPC",
            hub="mrpc",
            labels=CLASSES,
            metrics=("accuracy", "f1"),
            texts=_STRINGS,
            label="Quality",
            hub_texts=_PAIR,
            from_mnli=True,
        ),
        Task(
            name="CoLA",
            hub="cola",
            labels=CLASSES,
            metrics=("matthews",),
            texts=("sentence",),
            label="label",
            hub_texts=("sentence",),
            headless=("source", "label", "star", "sentence"),
        ),
        Task(
            name="STS-B",
            hub="stsb",
            labels=(),
            metrics=("pearson", "spearman"),
            texts=_PAIR,
            label="score",
            hub_texts=_PAIR,
            from_mnli=True,
        ),
        Task("WNLI", "wnli", CLASSES, ("accuracy",), _PAIR, "label", _PAIR, averaged=False),
    )
}

AVERAGED = tuple(name for name, task in TASKS.items() if task.averaged)
SUBMISSION = tuple(part.submission for task in TASKS.values() for part in task.test_parts)
LOWEST_SCORE, HIGHEST_SCORE = 0.0, 5.0  # of STS-B


def find_task(name: str) -> Task:
    """The task of this name, in any case and with or without the hyphen.

    Raises:
        InputError: No such task; the message lists all.
    """
    by_spelling = {_spelling(known): task for known, task in TASKS.items()}
    task = by_spelling.get(_spelling(name))
    if task is None:
        raise InputError(f"task: expected one of {', '.join(TASKS)} or all, got {name!r}")
    return task


def find_tasks(names: list[str]) -> list[Task]:
    """The tasks of these names, MNLI first; "all" stands for those in the average."""
    wanted = {
        task.name
        for name in names
        for task in (
            [TASKS[known] for known in AVERAGED] if name.lower() == "all" else [find_task(name)]
        )
    }
    return [task for name, task in TASKS.items() if name in wanted]


def _spelling(name: str) -> str:
    return name.lower().replace("-", "")
