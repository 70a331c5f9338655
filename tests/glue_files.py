"""Made-up GLUE: files in the benchmark's layout, small enough to train on in a test."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from neobert.finetuning.glue.runs import Run
from neobert.finetuning.glue.tasks import TASKS, Task
from neobert.finetuning.schedule import Setting

HEADERS = {
    "MNLI": "index promptID sentence1 sentence2 label1 gold_label",
    "QNLI": "index question sentence label",
    "QQP": "id qid1 qid2 question1 question2 is_duplicate",
    "RTE": "index sentence1 sentence2 label",
    "SST-2": "sentence label",
    "MRPC": "Quality,#1 ID,#2 ID,#1 String,#2 String",
    "CoLA": "source label star sentence",
    "STS-B": "index genre filename sentence1 sentence2 score",
    "WNLI": "index sentence1 sentence2 label",
}
WORDS = ("able", "bee", "cold", "dog", "egg", "far", "gold", "hat")
Text = Callable[[str, int], str]


def columns(task: Task) -> list[str]:
    header = HEADERS[task.name]
    return header.split("," if "," in header else " ")


def write_rows(path: Path, lines: Sequence[Sequence[str]], bom: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join("\t".join(line) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8-sig" if bom else "utf-8")


def rows(task: Task, count: int, seed: int = 0, labelled: bool = True) -> list[list[str]]:
    """Rows whose first word tells the label."""
    draw = np.random.default_rng(seed)
    names = columns(task)
    made = []
    for i in range(count):
        label = i % (len(task.labels) or 6)
        texts = [" ".join(draw.choice(WORDS, draw.integers(1, 5))) for _ in task.texts]
        texts[0] = f"{WORDS[label]} {texts[0]}"
        cells = dict.fromkeys(names, "-") | dict(zip(task.texts, texts, strict=True))
        cells |= {"index": str(i), "id": str(i)}
        cells[task.label] = task.labels[label] if task.labels else f"{label}.000"
        made.append([cells[name] for name in names if labelled or name != task.label])
    if not labelled and "index" not in names and "id" not in names:
        made = [[str(i), *row] for i, row in enumerate(made)]
    return made


def header(task: Task, labelled: bool = True) -> list[str]:
    names = [name for name in columns(task) if labelled or name != task.label]
    return names if labelled or names[0] in ("index", "id") else ["index", *names]


def write_task(root: Path, name: str, train: int = 24, dev: int = 12, test: int = 0) -> Path:
    """``root/TASK/*.tsv``; ``root``."""
    task = TASKS[name]
    sizes = {"train": train} | {part.file: dev for part in task.dev}
    for seed, (file, count) in enumerate(sizes.items()):
        head = [] if task.headless else [header(task)]
        write_rows(root / name / f"{file}.tsv", [*head, *rows(task, count, seed)])
    for part in task.test_parts if test else ():
        lines = [header(task, labelled=False), *rows(task, test, 9, labelled=False)]
        path = part.elsewhere[0] if part.elsewhere else f"{name}/{part.file}.tsv"
        write_rows(root / path, lines)
    return root


def record_scores(
    root: Path, name: str, task: str, *scores: float | None, grid: str = "paper"
) -> None:
    """The folder of a run with a point for each score, as its command leaves it."""
    identity = {
        "task": task, "name": name, "grid": grid,
        "start": None, "patched": True, "precision": "float32",
    }  # fmt: skip
    run = Run.open(root / name.replace("/", "--") / grid / task, identity)
    for seed, score in enumerate(scores):
        values = {
            "score": score, "metrics": {"accuracy": score}, "best_step": 3, "planned_steps": 9,
            "undefined": {} if score is not None else {"accuracy": "no <label>"},
            "machine": {"device": "cpu: x", "torch": "1"},
        }  # fmt: skip
        run.record(Setting(1e-5, 8, 0.01, seed), values)
