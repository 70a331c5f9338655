"""A run that was killed, anywhere, goes on to the bits of one that was not."""

import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import training_runs as runs

from neobert import files
from neobert.pretraining.prepare import prepare
from neobert.pretraining.recipe import Recipe
from neobert.pretraining.run import train
from neobert.readers import InputError

Small = Callable[..., Recipe]
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, counting: Any, tokenizer: Path) -> Path:
    """The run without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = runs.recipe_of(counting, tokenizer, folder / "run")
    assert runs.finish(runs.start(runs.die_at_call, recipe, 0)) == 0
    return folder / "run"


def goes_on_as(whole: Path, recipe: Recipe) -> None:
    assert runs.finish(runs.start(runs.run, recipe, True)) == 0
    assert runs.records(recipe.train.run) == runs.records(whole)
    assert runs.weights(f"{recipe.train.run}/final") == runs.weights(whole / "final")


def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(
    small: Small, whole: Path
) -> None:
    recipe = small()
    calls = int((whole / "calls").read_text())
    # From a third on: what comes before is imports and the first step.
    moments = [random.Random().randrange(calls // 3, calls) for _ in range(4)]
    for number, moment in enumerate(moments):
        process = runs.start(runs.die_at_call, recipe, moment, number > 0)
        assert runs.finish(process) in (KILLED, 0), moments
    goes_on_as(whole, recipe)


@pytest.mark.parametrize("number", [2, 5, 7, 9, 12])
def test_a_kill_in_the_middle_of_writing_costs_no_bit(
    number: int, small: Small, whole: Path
) -> None:
    recipe = small()
    assert runs.finish(runs.start(runs.die_at_fsync, recipe, number)) == KILLED
    goes_on_as(whole, recipe)


@pytest.mark.parametrize("number", [3, 4, 5, 6, 12])
def test_a_kill_between_two_renames_costs_no_bit(number: int, small: Small, whole: Path) -> None:
    recipe = small()
    assert runs.finish(runs.start(runs.die_at_rename, recipe, number)) == KILLED
    goes_on_as(whole, recipe)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_at_once_and_ends(number: int, small: Small, whole: Path) -> None:
    recipe = small(checkpoint={"every": 100})
    process = runs.start(runs.signal_at, recipe, 6, number)
    assert runs.finish(process) == 128 + number
    folder = Path(recipe.train.run)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000007"]
    (note,) = [r for r in runs.records(folder, "note") if "stopped" in r["text"]]
    assert note["text"].startswith(f"stopped by {signal.Signals(number).name} at step 7; saved")
    goes_on_as(whole, recipe)


def test_workers_live_on_when_the_signal_reaches_them_too(small: Small, whole: Path) -> None:
    recipe = small(batch={"workers": 1, "prefetch": 1}, checkpoint={"every": 100})
    assert runs.finish(runs.start(runs.signal_all_at, recipe, 3, 6)) == 143
    goes_on_as(whole, recipe)


def test_a_resumed_run_waits_for_the_workers_of_the_killed_one(
    small: Small, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    held = files.lock(tmp_path / "run")
    waits: list[float] = []
    sleep = lambda seconds: (waits.append(seconds), held.close())  # noqa: E731
    monkeypatch.setattr("neobert.pretraining.run.time.sleep", sleep)
    train(small(), resume=True, quiet=True)
    assert len(waits) == 1


def test_a_finished_run_has_nothing_left_to_do(small: Small, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    goes_on_as(whole, small())


@pytest.mark.parametrize("what", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_passed_over(
    what: str, small: Small, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-00000012" / what
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    train(small(), resume=True)
    said = capsys.readouterr().err
    assert "checkpoint: expected" in said
    assert f"step-00000012/{what}" in said
    assert "trying the checkpoint before it" in said
    assert "step-00000009 on 1 rank" in said
    assert runs.records(tmp_path / "run") == runs.records(whole)


def test_without_a_whole_checkpoint_a_run_begins_again(
    small: Small, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        (path / "state.json").write_text("{}")
    train(small(), resume=True, quiet=True)
    assert runs.records(tmp_path / "run") == runs.records(whole)
    notes = [r["text"] for r in runs.records(tmp_path / "run", "note")]
    assert "no whole checkpoint to resume from" in notes


REFUSED = [
    ({"model": {"hidden_size": 64}}, "resume: .* got model.hidden_size was 32, now 64$"),
    ({"model": {"num_hidden_layers": 3}}, "resume: .*model.num_hidden_layers was 2, now 3"),
    ({"batch": {"tokens": 256}}, "resume: .*batch.tokens was 128, now 256"),
    ({"batch": {"seed": 1}}, "resume: .*batch.seed was 0, now 1"),
    ({"data": {"held_out": 3}}, "resume: .*data.held_out was 20, now 3"),
]
HARMLESS = [
    ({"schedule": {"steps": 14}}, "schedule.steps was 12, now 14"),
    ({"optimizer": {"weight_decay": 0.0}}, "optimizer.weight_decay was 0.1, now 0.0"),
    ({"batch": {"mask_rate": 0.3}}, "batch.mask_rate was 0.2, now 0.3"),
    ({"train": {"precision": "bfloat16"}}, "train.precision was 'float32', now 'bfloat16'"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED + HARMLESS)
def test_changed_data_shape_and_settings_are_refused_by_name(
    change: dict[str, Any], message: str, small: Small, whole: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    before = (tmp_path / "run" / "log.jsonl").read_bytes()
    allowed = (change, message) in HARMLESS
    with pytest.raises(InputError, match=message) as caught:
        train(small(**change), resume=True, quiet=True)
    assert ("--allow-change" in str(caught.value)) == allowed
    assert (tmp_path / "run" / "log.jsonl").read_bytes() == before
    if not allowed:
        with pytest.raises(InputError, match=message):
            train(small(**change), resume=True, allow_change=True, quiet=True)


def test_an_allowed_change_is_noted_and_goes_on(small: Small, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    train(small(schedule={"steps": 14}), resume=True, allow_change=True, quiet=True)
    assert runs.records(tmp_path / "run")[:8] == runs.records(whole)[:8]
    assert runs.records(tmp_path / "run", "train")[-1]["step"] == 14
    texts = [record["text"] for record in runs.records(tmp_path / "run", "note")]
    assert "changed: schedule.steps was 12, now 14" in texts


def test_other_data_is_refused(small: Small, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    recipe = small(data={"store": str(tmp_path / "other")})
    (tmp_path / "in.txt").write_text("w1 w2 w3\n" * 40)
    prepare(small(data={"store": str(tmp_path / "other"), "path": str(tmp_path / "in.txt")}).data)
    with pytest.raises(InputError, match=r"resume: .*got store was '.*', now '"):
        train(recipe, resume=True, quiet=True)


def test_what_changes_no_number_may_change(small: Small, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "step-00000012")
    recipe = small(
        "moved",
        batch={"workers": 1},
        checkpoint={"every": 5, "background": False},
        log={"every": 2, "evaluate": 4},
    )
    train(recipe, resume=True, quiet=True)
    assert runs.records(tmp_path / "moved") == runs.records(whole)


def test_a_run_is_not_begun_over_another(small: Small, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "run")
    with pytest.raises(InputError, match=r"train.run: expected a new folder, .*\(--resume goes on"):
        train(small(), quiet=True)


def test_the_state_names_what_it_needs(whole: Path) -> None:
    stated = json.loads((whole / "checkpoints" / "step-00000012" / "state.json").read_bytes())
    assert stated["state"]["files"].keys() == {
        "config.json", "model.safetensors", "optimizer.safetensors",
    }  # fmt: skip
