"""A checkpoint is whole or not there, and a full disk costs none of the earlier ones."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import training_runs as runs
from transformers import AutoTokenizer

from neobert import files
from neobert.outputs import OutputError
from neobert.pretraining import checkpoint, log
from neobert.pretraining.checkpoint import Checkpoints, Content, read
from neobert.pretraining.run import train
from neobert.readers import InputError

resource = pytest.importorskip("resource")  # not on Windows


def content(step: int = 1, size: int = 1000) -> Content:
    tensors = {"model.safetensors": {"a": torch.full((size,), float(step))}}
    return Content(step, tensors, {"config.json": "{}"}, {"data": {"step": step}})


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writing beyond fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("background", [True, False])
def test_what_was_saved_is_read(background: bool, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "all")
    checkpoints.save(content(7), background)
    checkpoints.wait()
    (folder,) = checkpoints.all()
    saved = read(folder)
    assert (saved.step, saved.state["data"]) == (7, {"step": 7})
    assert torch.equal(saved.tensors("model.safetensors")["a"], torch.full((1000,), 7.0))
    assert (folder / "config.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all"]


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_told_and_leaves_the_one_before(background: bool, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(content(1))
    message = "step-00000002: File too large; make room and go on with --resume from step-00000001"

    def save() -> None:
        checkpoints.save(content(2, 10_000), background)
        checkpoints.wait()

    with files_of_at_most(2000), pytest.raises(OutputError, match=message):
        save()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    read(tmp_path / "step-00000001")


def test_a_run_on_a_full_disk_goes_on_when_there_is_room(small: Any) -> None:
    train(small("whole"), quiet=True)
    recipe = small()
    for size in (10_000, 200_000):  # the model does not fit; the optimizer's means do not
        with files_of_at_most(size), pytest.raises(OutputError, match="make room and go on with"):
            train(recipe, resume=True, quiet=True)
    train(recipe, resume=True, quiet=True)
    assert runs.records(recipe.train.run) == runs.records(small("whole").train.run)


def test_a_full_disk_under_the_log_is_told_with_its_name(small: Any) -> None:
    recipe = small(checkpoint={"every": 100}, log={"every": 1, "evaluate": 0})
    # The recipe fits, and so do the first records.
    for size, name in ((100, "recipe.yaml"), (2200, "log.jsonl")):
        message = f"run/{name}: File too large; make room and go on with --resume"
        with files_of_at_most(size), pytest.raises(OutputError, match=message):
            train(recipe, resume=True, quiet=True)
    assert log.read(recipe.train.run)[-1]["kind"] == "train"
    train(recipe, resume=True, quiet=True)
    steps = [record["step"] for record in runs.records(recipe.train.run, "train")]
    assert steps == list(range(1, 13))


def test_a_full_disk_under_a_tokenizer_is_told(tmp_path: Path, tokenizer: Path) -> None:
    fast = AutoTokenizer.from_pretrained(tokenizer)
    message = "final: File too large; make room and go on with --resume from the start"
    writing = checkpoint.writing(tmp_path / "final", Checkpoints(tmp_path))
    with files_of_at_most(1000), pytest.raises(OutputError, match=message), writing:
        fast.save_pretrained(tmp_path / "final.partial")
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_ours_is_no_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), checkpoint.writing(tmp_path, Checkpoints(tmp_path)):
        raise ZeroDivisionError


def test_a_background_write_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_write = threading.Event()
    real = checkpoint.write_folder

    def patient(target: Path, what: Content) -> None:
        assert may_write.wait(30)
        real(target, what)

    monkeypatch.setattr(checkpoint, "write_folder", patient)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(content(1), background=True)
    assert checkpoints.all() == []
    checkpoints.raise_if_failed()
    may_write.set()
    checkpoints.save(content(2))  # waits for the first
    assert [path.name for path in checkpoints.all()] == ["step-00000002"]


def test_an_unfinished_folder_does_not_count_and_goes(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(content(1))
    for name in ("step-00000002.partial", "step-00000000.removed"):
        (tmp_path / name).mkdir()
    found = checkpoints.newest(pytest.fail)
    assert found is not None
    assert found.step == 1
    checkpoints.clean()
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def damage(folder: Path, kind: str) -> str:
    state, model = folder / "state.json", folder / "model.safetensors"
    if kind == "a changed number":
        state.write_text(state.read_text().replace('"step": 1', '"step": 2', 1))
        return "got other content than its sha256 says"
    if kind == "no state":
        state.unlink()
        return "expected a state in .*, got none"
    if kind == "another version":
        body = {"version": 99}
        text = f'{{"state": {{"version": 99}}, "sha256": "{checkpoint._digest(body)}"}}'
        state.write_text(text)
        return "got version 99"
    if kind == "half a file":
        os.truncate(model, model.stat().st_size // 2)
    elif kind == "no file":
        model.unlink()
        return "got No such file or directory"
    return r"expected sha256 \w{16} of .*model.safetensors, got"


@pytest.mark.parametrize(
    "kind", ["a changed number", "no state", "another version", "half a file", "no file"]
)
def test_damage_is_found_and_named(kind: str, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    checkpoints.save(content(0))
    checkpoints.save(content(1))
    message = damage(tmp_path / "step-00000001", kind)
    with pytest.raises(InputError, match=message):
        read(tmp_path / "step-00000001")
    told: list[str] = []
    found = checkpoints.newest(told.append)
    assert found is not None
    assert found.step == 0
    assert len(told) == 1
    checkpoints.drop_after(0)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000000"]


def test_a_folder_is_replaced_by_a_whole_one(tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    files.replace_folder(tmp_path / "new", tmp_path / "old")
    assert [path.name for path in tmp_path.rglob("*")] == ["old", "new"]
