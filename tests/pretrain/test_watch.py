"""A run tells how far it is, on stderr, in its log, and to trackers."""

import io
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from neobert.pretraining import log, watch
from neobert.pretraining.log import Log
from neobert.pretraining.recipe import Recipe
from neobert.pretraining.run import train
from neobert.pretraining.watch import Watch, open_trackers
from neobert.readers import InputError

TRAIN = {
    "tokens": 9, "loss": 2.5, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_s": 12345.6,
    "masked_per_s": 2469.1, "utilisation": None,
}  # fmt: skip
EVAL = {"tokens": 9, "loss": 2.0, "accuracy": 0.25, "unigram_accuracy": 0.1}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_records_go_to_the_log_and_to_lines(tmp_path: Path) -> None:
    stream = io.StringIO()
    told = Watch(Log(tmp_path), 2000, [], stream=stream)
    told.record("train", 10, 3725.0, **TRAIN)
    told.record("train", 20, 65.0, **{**TRAIN, "utilisation": 0.421})  # too soon for a line
    told.record("eval", 20, None, **EVAL)
    told.note(20, "something")
    told.close()
    assert stream.getvalue().splitlines() == [
        "neobert: step 10/2,000  loss 2.5000  lr 1.00e-03  norm 0.50  12,346 tokens/s  "
        "2,469 masked/s  1 h 02 min left",
        "neobert: step 20/2,000  held out: loss 2.0000, accuracy 25.0% "
        "(the most frequent token: 10.0%)",
        "neobert: something",
    ]
    assert [(r["kind"], r["step"]) for r in log.read(tmp_path)] == [
        ("train", 10), ("train", 20), ("eval", 20), ("note", 20),
    ]  # fmt: skip


def test_a_terminal_has_one_line_that_moves(tmp_path: Path) -> None:
    stream = Terminal()
    told = Watch(Log(tmp_path), 20, [], stream=stream)
    told.record("train", 10, 65.0, **{**TRAIN, "utilisation": 0.421})
    told.record("train", 20, 0.0, **TRAIN)
    told.say("the end")
    told.close()
    lines = stream.getvalue().split("\r\x1b[K")
    assert lines[1].endswith("42% of peak  1 min 05 s left")
    assert lines[2].endswith("0 min 00 s left\nneobert: the end\n")


def test_quiet_is_quiet(tmp_path: Path) -> None:
    stream = Terminal()
    told = Watch(Log(tmp_path), 20, [], quiet=True, stream=stream)
    told.record("train", 10, 65.0, **TRAIN)
    told.note(10, "something")
    told.close()
    assert stream.getvalue() == ""


class Tracker:
    """accelerate's, as far as it is used."""

    requires_logging_directory = True

    def __init__(self, name: str, logging_dir: str) -> None:
        self.did: list[Any] = [(name, logging_dir)]
        found.append(self)

    def start(self) -> None:
        self.did.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.did.append(values["schedule.steps"])

    def log(self, values: dict[str, Any], step: int) -> None:
        self.did.append((step, sorted(values)))

    def finish(self) -> None:
        self.did.append("finish")


found: list[Tracker] = []


def test_trackers_get_every_record(
    small: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = pytest.importorskip("accelerate.tracking")
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Tracker)
    monkeypatch.setattr("accelerate.utils.is_tensorboard_available", lambda: True)
    found.clear()
    recipe = small(
        schedule={"steps": 4}, log={"trackers": ("tensorboard",), "every": 2, "evaluate": 0}
    )
    train(recipe, quiet=True)
    (tracker,) = found
    run = Path(recipe.train.run)
    assert tracker.did[:3] == [("run", str(run / "trackers")), "start", 4]
    assert tracker.did[-1] == "finish"
    assert [step for step, _ in tracker.did[3:-1]] == [2, 4, 4]
    assert "train/loss" in tracker.did[3][1]
    assert "eval/unigram_accuracy" in tracker.did[5][1]


def test_tensorboard_shows_the_log(small: Callable[..., Recipe]) -> None:
    pytest.importorskip("accelerate")
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing import event_accumulator

    recipe = small(schedule={"steps": 4}, log={"trackers": ("tensorboard",), "every": 1})
    train(recipe, quiet=True)
    run = Path(recipe.train.run)
    events = event_accumulator.EventAccumulator(str(run / "trackers" / "run")).Reload()
    shown = [(each.step, each.value) for each in events.Scalars("train/loss")]
    told = [(r["step"], r["loss"]) for r in log.read(run) if r["kind"] == "train"]
    assert [step for step, _ in shown] == [1, 2, 3, 4]
    assert shown == [(step, pytest.approx(loss)) for step, loss in told]
    assert "eval/accuracy" in events.Tags()["scalars"]
    settings = yaml.safe_load(next(run.glob("trackers/run/*/hparams.yml")).read_text())
    assert (settings["batch.tokens"], settings["batch.views"]) == (128, "{'all': 1.0}")


def test_wandb_writes_into_the_run_and_goes_on_in_one_of_its_own(
    small: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    ids: list[Any] = []
    real = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **k: ids.append(k["id"]) or real(**k))
    recipe = small(schedule={"steps": 4}, log={"trackers": ("wandb",), "every": 1})
    train(recipe, quiet=True)
    run = Path(recipe.train.run)
    assert len(list(run.glob("trackers/wandb/offline-run-*/*.wandb"))) == 1
    train(recipe, resume=True, quiet=True)
    assert len(ids) == 2
    assert ids[0] == ids[1]


def test_a_tracker_that_does_not_begin_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = pytest.importorskip("accelerate.tracking")

    def fail(name: str, **place: Any) -> None:
        assert place == {
            "dir": str(tmp_path / "trackers"), "id": (tmp_path / "trackers/wandb-id").read_text(),
            "resume": "allow",
        }  # fmt: skip
        raise RuntimeError("no API key\nconfigured")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", fail)
    monkeypatch.setattr("accelerate.utils.is_wandb_available", lambda: True)
    message = "log.trackers: expected wandb to begin, got no API key configured"
    with pytest.raises(InputError, match=message):
        open_trackers(("wandb",), tmp_path, {})


def test_a_tracker_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate")
    monkeypatch.setattr("accelerate.utils.is_wandb_available", lambda: False)
    with pytest.raises(InputError, match=r"log.trackers: expected the package wandb"):
        open_trackers(("wandb",), tmp_path, {})
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(InputError, match=r"log.trackers: .*got no accelerate \(pip install"):
        open_trackers(("wandb",), tmp_path, {})
    assert open_trackers((), tmp_path, {}) == []


def test_the_line_shows_every_number_of_a_record() -> None:
    assert isinstance(watch, types.ModuleType)
    text = watch.described("train", {**TRAIN, "utilisation": 0.5})
    for number in ("2.5000", "1.00e-03", "0.50", "12,346", "2,469", "50%"):
        assert number in text
