"""GLUE's tasks from the benchmark's files and from the hub."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from glue_files import columns, header, rows, write_rows, write_task

from neobert.finetuning.glue.data import TaskData, load
from neobert.finetuning.glue.tasks import AVERAGED, TASKS, Task, find_task, find_tasks
from neobert.readers import InputError

RTE, MRPC, STSB, COLA = (TASKS[name] for name in ("RTE", "MRPC", "STS-B", "CoLA"))


def train_file(root: Path, task: Task, *lines: list[str], bom: bool = False) -> Path:
    """A good task whose training file is these rows."""
    write_task(root, task.name)
    head = [] if task.headless else [header(task)]
    write_rows(root / task.name / "train.tsv", [*head, *lines], bom)
    return root


def row(task: Task, **cells: str) -> list[str]:
    (made,) = rows(task, 1)
    for name, value in cells.items():
        made[columns(task).index(name)] = value
    return made


@pytest.mark.parametrize("task", TASKS.values(), ids=lambda task: task.name)
def test_every_task_is_read_in_order_with_its_labels(task: Task, tmp_path: Path) -> None:
    data = load(task, write_task(tmp_path, task.name, 12, 6, test=3))
    assert len(data.train) == 12
    assert [len(split) for split in data.dev.values()] == [6] * len(task.dev)
    assert len(data.train.texts) == len(task.texts)
    assert data.train.labels is not None
    classes = len(task.labels) or 6
    assert data.train.labels.tolist() == [i % classes for i in range(12)]
    expected = [line[columns(task).index(task.texts[-1])] for line in rows(task, 12, 0)]
    assert data.train.texts[-1] == expected
    assert [split.ids for split in data.test.values()] == [["0", "1", "2"]] * len(task.test_parts)
    assert data.notes == ()


def test_a_folder_may_be_the_tasks_own(tmp_path: Path) -> None:
    write_task(tmp_path, "RTE")
    own, parent = load(RTE, tmp_path / "RTE"), load(RTE, tmp_path)
    assert own.fingerprint == parent.fingerprint


def test_a_byte_order_mark_is_not_part_of_the_first_column(tmp_path: Path) -> None:
    data = load(MRPC, train_file(tmp_path, MRPC, *rows(MRPC, 4), bom=True))
    assert len(data.train) == 4


def test_stray_quotes_merge_no_rows(tmp_path: Path) -> None:
    texts = ['"an opening quote', "nothing", 'a closing one"', 'in the " middle']
    lines = [row(MRPC, **{"#1 String": text, "#2 String": '"'}) for text in texts]
    data = load(MRPC, train_file(tmp_path, MRPC, *lines))
    assert data.train.texts == (texts, ['"'] * 4)


def test_windows_line_ends_are_no_part_of_the_label(tmp_path: Path) -> None:
    write_task(tmp_path, "RTE")
    path = tmp_path / "RTE" / "train.tsv"
    plain = load(RTE, tmp_path).fingerprint
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert load(RTE, tmp_path).fingerprint == plain


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    root = write_task(tmp_path, "RTE")
    write_rows(root / "RTE" / "dev.tsv", [["index", "sentence1", "label"], ["0", "a", "b"]])
    with pytest.raises(InputError, match=r"dev\.tsv: expected a column 'sentence2', got index"):
        load(RTE, root)


@pytest.mark.parametrize(
    ("task", "cells", "message"),
    [
        (RTE, {"label": "maybe"}, r"train\.tsv:3: expected one of entailment, not_entailment as"),
        (COLA, {"label": "2"}, r"train\.tsv:2: expected one of 0, 1 as label, got '2'"),
        (STSB, {"score": "5.1"}, r"train\.tsv:3: expected a number from 0 to 5 as score, got '5.1"),
        (STSB, {"score": "nan"}, "expected a number from 0 to 5"),
        (STSB, {"score": ""}, "expected a number from 0 to 5 as score, got ''"),
    ],
)
def test_a_label_outside_the_set_is_an_error_with_its_line(
    task: Task, cells: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        load(task, train_file(tmp_path, task, row(task), row(task, **cells)))


def test_a_row_without_all_fields_is_an_error_with_its_line(tmp_path: Path) -> None:
    lines = [row(RTE), row(RTE)[:-1], row(RTE)]
    with pytest.raises(InputError, match=r"train\.tsv:3: expected 4 fields, got 3"):
        load(RTE, train_file(tmp_path, RTE, *lines))


def test_very_few_such_rows_are_left_out_and_told(tmp_path: Path) -> None:
    lines = rows(RTE, 2000)
    lines.insert(9, ["a", "b"])
    data = load(RTE, train_file(tmp_path, RTE, *lines))
    assert len(data.train) == 2000
    assert data.notes == ("RTE/train.tsv: 1 rows without all columns left out (lines 11)",)


def test_a_test_set_must_be_whole(tmp_path: Path) -> None:
    root = write_task(tmp_path, "RTE", test=2000)
    path = root / "RTE" / "test.tsv"
    path.write_text(path.read_text() + "2000\tonly one\n")
    with pytest.raises(InputError, match=r"test\.tsv:2002: expected 3 fields, got 2"):
        load(RTE, root)


def test_empty_texts_are_kept_and_told(tmp_path: Path) -> None:
    data = load(RTE, train_file(tmp_path, RTE, row(RTE, sentence2=""), *rows(RTE, 3)))
    assert data.train.texts[1][0] == ""
    assert data.notes == ("RTE/train.tsv: 1 rows with an empty text, kept",)


def test_a_split_of_one_class_is_told(tmp_path: Path) -> None:
    data = load(RTE, train_file(tmp_path, RTE, *[row(RTE)] * 3))
    assert data.notes == ("RTE/train.tsv: every label is entailment",)


def test_missing_files_are_listed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"dev_matched\.tsv, dev_mismatched.* got no train"):
        load(TASKS["MNLI"], tmp_path)
    with pytest.raises(InputError, match=r"expected a folder with RTE/train\.tsv"):
        load(RTE, tmp_path / "nowhere")
    with pytest.raises(InputError, match="expected a header, got an empty file"):
        load(RTE, _with_empty_train(tmp_path))


def _with_empty_train(root: Path) -> Path:
    write_task(root, "RTE")
    (root / "RTE" / "train.tsv").write_text("")
    return root


def test_the_fingerprint_sees_texts_labels_and_order(tmp_path: Path) -> None:
    first = rows(RTE, 4)
    variants = [first, first[::-1], [*first[:3], row(RTE, sentence1="z")], [*first, row(RTE)]]
    prints = {
        load(RTE, train_file(tmp_path / str(i), RTE, *lines)).fingerprint
        for i, lines in enumerate(variants)
    }
    assert len(prints) == 4


def test_task_names_are_found_in_any_spelling() -> None:
    assert [find_task(name).name for name in ("sst2", "STS-B", "cola")] == [
        "SST-2",
        "STS-B",
        "CoLA",
    ]
    assert [task.name for task in find_tasks(["all"])] == list(AVERAGED)
    assert [task.name for task in find_tasks(["wnli", "rte", "mnli"])] == ["MNLI", "RTE", "WNLI"]
    with pytest.raises(InputError, match=r"expected one of MNLI, .*, WNLI or all, got 'glue'"):
        find_task("glue")


def hub(monkeypatch: pytest.MonkeyPatch, task: Task, data: TaskData, **changes: Any) -> None:
    """The hub's form of ``data``."""
    splits = {(task.hub, "train"): data.train}
    splits |= {(task.hub, part.hub): data.dev[part.name] for part in task.dev}
    splits |= {
        (part.hub_config or task.hub, part.hub): data.test[part.name]
        for part in task.test_parts
        if part.name in data.test
    }
    made: dict[str, dict[str, Any]] = {}
    for (config, name), split in splits.items():
        labels = np.full(len(split), -1) if split.labels is None else split.labels
        content = dict(zip(task.hub_texts, split.texts, strict=True))
        content |= {"label": labels.tolist(), "idx": list(range(len(split)))} | changes
        content = {k: v for k, v in content.items() if v is not None}
        made.setdefault(config, {})[name] = datasets.Dataset.from_dict(content)

    def load_dataset(name: str, config: str) -> Any:
        assert name == "nyu-mll/glue"
        if config not in made:
            raise ConnectionError(f"Couldn't reach {config}")
        return datasets.DatasetDict(made[config])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.mark.parametrize("name", ["MNLI", "STS-B", "SST-2"])
def test_the_hub_gives_what_the_files_give(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TASKS[name]
    from_files = load(task, write_task(tmp_path, name, test=2))
    hub(monkeypatch, task, from_files)
    from_hub = load(task, None)
    assert from_hub.fingerprint == from_files.fingerprint
    assert from_hub.sizes == from_files.sizes
    assert {k: s.ids for k, s in from_hub.test.items()} == {
        k: s.ids for k, s in from_files.test.items()
    }


@pytest.mark.parametrize("place", ["diagnostic/diagnostic.tsv", "AX/AX.tsv", "MNLI/AX.tsv"])
def test_the_diagnostics_are_a_test_set_of_mnli(place: str, tmp_path: Path) -> None:
    root = write_task(tmp_path, "MNLI", test=3)
    given = root / "diagnostic" / "diagnostic.tsv"
    assert [*load(TASKS["MNLI"], root).test] == ["m", "mm", "ax"]
    (root / place).parent.mkdir(exist_ok=True)
    given.rename(root / place)
    assert load(TASKS["MNLI"], root).test["ax"].ids == ["0", "1", "2"]
    (root / place).unlink()
    assert [*load(TASKS["MNLI"], root).test] == ["m", "mm"]


def test_without_the_diagnostics_the_hub_gives_the_rest_and_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = TASKS["MNLI"]
    from_files = load(task, write_task(tmp_path, "MNLI", test=2))
    del from_files.test["ax"]
    hub(monkeypatch, task, from_files)
    from_hub = load(task, None)
    assert [*from_hub.test] == ["m", "mm"]
    (note,) = from_hub.notes
    assert "no predictions of AX: data: expected nyu-mll/glue, 'ax', from the hub" in note


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": [0, 1, 2, 1]}, "expected labels 0 to 1, got 2 in row 2"),
        ({"label": None}, "expected a column 'label', got sentence1, sentence2, idx"),
        ({"sentence2": None}, "expected a column 'sentence2', got sentence1, label, idx"),
    ],
)
def test_a_data_set_of_another_form_is_an_error(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(monkeypatch, RTE, load(RTE, write_task(tmp_path, "RTE", 4, 4)), **changes)
    with pytest.raises(InputError, match=f"nyu-mll/glue rte train: {message}"):
        load(RTE, None)


def test_without_a_network_the_error_says_which_files_to_pass(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load_dataset(name: str, config: str) -> None:
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"reach.*pass --data DIR with train.tsv, dev.tsv"):
        load(RTE, None)
