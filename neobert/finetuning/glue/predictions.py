"""Predictions of the test sets, in the form that the benchmark's site takes."""

import io
import zipfile
from pathlib import Path

import numpy as np

from neobert import files
from neobert.finetuning.glue.runs import Run
from neobert.finetuning.glue.sweep import Sweep, predictions_of, tokens_of
from neobert.finetuning.glue.tasks import SUBMISSION, Task
from neobert.finetuning.training import predict

HEADER = "index\tprediction\n"


def write_predictions(run: Run, sweep: Sweep) -> list[Path]:
    """Predict every test set with the model in ``best``; the files written.

    Processes that finish a grid together do so one after the other.
    """
    with files.turn(run.folder / "lock"):
        return _write(run, sweep)


def _write(run: Run, sweep: Sweep) -> list[Path]:
    best = run.folder / "best"
    if not sweep.data.test or not best.is_dir():
        return []
    from neobert.finetuning.classifier import load_classifier

    classifier = load_classifier(
        best,
        sweep.task.labels,
        device=sweep.device,
        patched=sweep.source.patched,
        max_length=sweep.source.max_length,
    )
    folder = run.folder / "predictions"
    folder.mkdir(exist_ok=True)
    written = []
    for part in sweep.task.test_parts:
        split = sweep.data.test.get(part.name)
        if split is None:
            continue
        logits = predict(classifier, tokens_of(classifier, split.texts), sweep.source.precision)
        lines = submission(sweep.task, split.ids, predictions_of(sweep.task, logits))
        path = folder / f"{part.submission}.tsv"
        files.write_atomically(path, lines)
        written.append(path)
    return written


def submission(task: Task, ids: list[str], predictions: np.ndarray) -> str:
    """The file's text: a line per example, labels by name where the site wants names."""

    def shown(value: np.generic) -> str:
        if task.is_regression:
            return f"{value:.3f}"
        return task.labels[int(value)] if task.spelled else str(int(value))

    rows = [f"{i}\t{shown(value)}\n" for i, value in zip(ids, predictions, strict=True)]
    return HEADER + "".join(rows)


def write_submission(folder: Path) -> tuple[Path, list[str]] | None:
    """Put all predictions of the model in ``folder`` into one archive, as the site takes them.

    Returns:
        The archive, and the names of the benchmark's files that are not there yet; None where
        there are no predictions at all.
    """
    found = {path.name: path for path in sorted(folder.glob("*/predictions/*.tsv"))}
    if not found:
        return None
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, path in sorted(found.items()):
            # A fixed date: the same predictions are the same archive.
            archive.writestr(zipfile.ZipInfo(name), path.read_bytes(), zipfile.ZIP_DEFLATED)
    path = folder / "submission.zip"
    with files.turn(folder / "lock"):
        files.write_atomically(path, content.getvalue())
    return path, [name for name in SUBMISSION if f"{name}.tsv" not in found]
