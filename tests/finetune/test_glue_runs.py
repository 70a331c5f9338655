"""The grid: resumed, shared, refused where it is another one; the best model; the command."""

import contextlib
import json
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import texts
import torch
from encoders import ENCODERS
from glue_files import write_task
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from neobert import cli, files
from neobert.finetuning.glue import predictions, sweep
from neobert.finetuning.glue.grid import GRIDS, make_grid
from neobert.finetuning.glue.runs import Run, read_best
from neobert.finetuning.glue.tasks import MNLI_CLASSES, TASKS
from neobert.finetuning.schedule import Setting
from neobert.readers import InputError

Finetune = Callable[..., int]
SEEDS = ("--seeds", "0", "1", "2")


def results(root: Path) -> dict[str, Any]:
    """Every point's result without times, and the best one's name."""
    found = {}
    for path in sorted(root.glob("out*/Tiny/*/points/*.json")):
        content = json.loads(path.read_text())
        found[path.stem] = {k: v for k, v in content.items() if not k.endswith("s_s")}
        for key in ("training_s", "seconds", "machine"):
            del found[path.stem][key]
    return found


def test_the_papers_grid_has_sixty_points_under_its_protocol() -> None:
    grid = make_grid("paper", width=384)
    settings = grid.settings((0,))
    assert len({setting.name for setting in settings}) == 60
    assert settings[0] == Setting(5e-6, 2, 1e-2, 0)
    assert {s.lr for s in settings} == {5e-6, 6e-6, 8e-6, 1e-5, 2e-5, 3e-5}
    protocol = grid.protocol.record()
    assert protocol == {
        "epochs": 10, "evaluations": 10, "interval": 500, "patience": 15,
        "warmup": 0.06, "floor": 0.1, "floor_at": 0.9, "clip": 1.0,
    }  # fmt: skip
    assert set(GRIDS) == {"paper", "small", "one"}


def test_one_point_trains_predicts_and_leaves_a_model(
    finetune: Finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path / "data", "RTE", test=5)
    assert finetune("rte") == 0
    out = capsys.readouterr()
    assert "RTE: all 1 points are finished" in out.out
    assert "best score 0." in out.out
    assert "no MNLI result in the output" in out.err
    here = tmp_path / "out" / "Tiny" / "RTE"
    lines = (here / "predictions" / "RTE.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert [line.split("\t")[0] for line in lines[1:]] == ["0", "1", "2", "3", "4"]
    assert {line.split("\t")[1] for line in lines[1:]} <= {"entailment", "not_entailment"}
    model = AutoModelForSequenceClassification.from_pretrained(here / "best")
    assert model.config.id2label == {0: "entailment", 1: "not_entailment"}


def test_logits_that_are_not_finite_have_no_score(
    finetune: Finetune,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def predict(_: Any, tokens: Any, *__: Any) -> np.ndarray:
        return np.full((len(tokens), 2), np.nan, np.float32)

    write_task(tmp_path / "data", "RTE")  # half of its dev set is of class 0, as argmax has NaN
    monkeypatch.setattr(sweep, "predict", predict)
    assert finetune("RTE") == 0
    out = capsys.readouterr()
    assert "RTE: score undefined at every point" in out.out
    assert "accuracy: a prediction is not finite" in out.err
    assert not (tmp_path / "out" / "Tiny" / "RTE" / "best").exists()
    overflow = np.array([[np.inf], [1.0]], np.float32)
    np.testing.assert_array_equal(sweep.predictions_of(TASKS["STS-B"], overflow), [np.nan, 1.0])


@pytest.mark.parametrize("name", ["MNLI", "STS-B", "MRPC", "CoLA"])
def test_every_kind_of_task_goes_through(
    name: str, finetune: Finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path / "data", name, test=4)
    assert finetune(name, "--quiet") == 0
    assert "best score" in capsys.readouterr().out
    written = {path.name for path in (tmp_path / "out/Tiny" / name / "predictions").iterdir()}
    mnli = {"MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"}
    assert written == (mnli if name == "MNLI" else {f"{name}.tsv"})
    with zipfile.ZipFile(tmp_path / "out/Tiny/submission.zip") as archive:
        assert set(archive.namelist()) == written
    for path in (tmp_path / "out/Tiny" / name / "predictions").iterdir():
        values = [line.split("\t")[1] for line in path.read_text().splitlines()[1:]]
        if name == "STS-B":
            assert all(0 <= float(value) <= 5 for value in values)
        elif name == "MNLI":
            assert set(values) <= {"entailment", "neutral", "contradiction"}
        else:
            assert set(values) <= {"0", "1"}


def test_a_test_set_may_come_later_and_a_submission_says_what_it_lacks(
    finetune: Finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "out/Tiny/submission.zip"
    write_task(tmp_path / "data", "MNLI")
    assert finetune("MNLI") == 0
    assert not archive.exists()
    write_task(tmp_path / "data", "MNLI", test=4)
    assert finetune("MNLI") == 0
    error = capsys.readouterr().err.splitlines()[-1]
    assert "(without QNLI, QQP, RTE, SST-2, MRPC, CoLA, STS-B, WNLI)" in error
    with zipfile.ZipFile(archive) as files_of:
        lines = files_of.read("AX.tsv").decode().splitlines()
    assert lines[0] == "index\tprediction"
    assert {line.split("\t")[1] for line in lines[1:]} <= set(MNLI_CLASSES)
    assert len(lines) == 5


def test_a_killed_grid_goes_on_and_ends_as_if_it_had_not_been(
    finetune: Finetune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_task(tmp_path / "data", "CoLA")
    assert finetune("CoLA", *SEEDS, "--quiet") == 0
    whole, best = results(tmp_path), read_best(tmp_path / "out/Tiny/CoLA")
    weights = load_file(tmp_path / "out/Tiny/CoLA/best/model.safetensors")
    (tmp_path / "out").rename(tmp_path / "first")
    fit, trained = sweep.fit, []

    def killed(*args: Any, **kwargs: Any) -> Any:
        trained.append(args[3].seed)
        done = fit(*args, **kwargs)
        if len(trained) == 2:
            raise KeyboardInterrupt  # after all its work, before its result is on disk
        return done

    monkeypatch.setattr(sweep, "fit", killed)
    assert finetune("CoLA", *SEEDS, "--quiet") == 130
    assert len(results(tmp_path)) == 1
    assert finetune("CoLA", *SEEDS, "--quiet") == 0
    assert trained == [0, 1, 1, 2]
    assert results(tmp_path) == whole
    assert read_best(tmp_path / "out/Tiny/CoLA") == best
    for name, value in load_file(tmp_path / "out/Tiny/CoLA/best/model.safetensors").items():
        assert torch.equal(value, weights[name]), name


def test_every_device_gets_the_same_command(
    finetune: Finetune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_task(tmp_path / "data", "RTE")
    commands = []

    class Process(contextlib.nullcontext[Any]):
        def __init__(self, arguments: list[str]) -> None:
            super().__init__(self)
            commands.append(arguments)

        def wait(self) -> int:
            return cli.main(commands[0])

    monkeypatch.setattr("neobert.parent.start", Process)
    options = ("--no-patch", "--max-length", "30", "--batch-size", "8", "--quiet")
    assert finetune("RTE", *SEEDS, *options, "--devices", "cpu", "cpu") == 0
    assert commands[0] == commands[1]
    assert len(results(tmp_path)) == 3  # of the very run that this process began
    assert not list(tmp_path.glob("out/**/*.lock"))


def test_devices_share_the_points_and_end_with_a_parent_killed_by_9(
    model_folder: Path, finetune: Finetune, tmp_path: Path
) -> None:
    write_task(tmp_path / "data", "RTE", train=100)
    command = [sys.executable, "-m", "neobert", "finetune", "glue", "--task", "RTE"]
    command += ["--model", str(model_folder), "--name", "Tiny", "--grid", "one", "--epochs", "1"]
    command += ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out"), "--quiet"]
    command += ["--seeds", *map(str, range(400)), "--devices", "cpu", "cpu"]
    points = tmp_path / "out" / "Tiny" / "RTE" / "points"
    process = subprocess.Popen(command)
    while len(held(points)) < 2 and process.poll() is None:
        time.sleep(0.01)
    assert finetune("RTE", "--quiet", "--seeds", "398", "399") == 0
    while len(results(tmp_path)) < 4 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while held(points):  # by children, which are nobody's now
        assert time.monotonic() < deadline
        time.sleep(0.1)
    before = results(tmp_path)
    assert {name[-3:] for name in before} >= {"398", "399"}
    assert 4 <= len(before) < 400
    assert finetune("RTE", "--quiet", "--seeds", *map(str, range(4)), "398") == 0
    assert before.items() <= results(tmp_path).items()


def held(points: Path) -> list[Path]:
    """The locks that some process has."""
    found = []
    for path in points.glob("*.lock"):
        lock = files.try_lock(path)
        if lock is None:
            found.append(path)
        else:
            lock.close()
    return found


def test_processes_that_finish_together_predict_one_after_the_other(
    finetune: Finetune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_task(tmp_path / "data", "RTE", test=3)
    write, taken = predictions._write, []

    def watched(run: Run, sweep: sweep.Sweep) -> list[Path]:
        lock = files.try_lock(run.folder / "lock")
        taken.append(lock)
        return write(run, sweep)

    monkeypatch.setattr(predictions, "_write", watched)
    assert finetune("RTE", "--quiet", "--points-only") == 0
    assert taken == []
    assert finetune("RTE", "--quiet") == 0
    assert taken == [None]


def test_a_point_that_another_process_holds_is_left_to_it(
    finetune: Finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path / "data", "RTE")
    assert finetune("RTE", "--quiet") == 0
    (point,) = tmp_path.glob("out/Tiny/RTE/points/*.json")
    point.unlink()
    held = files.try_lock(point.with_suffix("").with_name(f"{point.stem}.lock"))
    assert held is not None
    with held:
        capsys.readouterr()
        assert finetune("RTE", "--quiet") == 0
        assert "0 of 1 points are finished, others in work" in capsys.readouterr().out
        assert finetune("RTE", "--quiet", "--restart") == 2
        assert "expected no other process" in capsys.readouterr().err
    assert finetune("RTE", "--quiet") == 0
    assert point.exists()


def test_results_of_other_data_or_settings_are_refused_until_a_restart(
    finetune: Finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path / "data", "RTE")
    assert finetune("RTE", "--quiet") == 0
    write_task(tmp_path / "data", "RTE", train=20)
    for arguments, what in (((), "data was"), (("--no-patch",), "patched was True, now False")):
        assert finetune("RTE", *arguments) == 2
        assert what in capsys.readouterr().err
    assert finetune("RTE", "--quiet", "--restart", "--seeds", "5") == 0
    assert [name[-5:] for name in results(tmp_path)] == ["seed5"]


def test_a_folder_of_something_else_is_not_touched(
    finetune: Finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path / "data", "RTE")
    other = tmp_path / "out" / "Tiny" / "RTE" / "thesis.txt"
    other.parent.mkdir(parents=True)
    other.write_text("mine")
    for arguments in ((), ("--restart",)):
        assert finetune("RTE", *arguments) == 2
        assert "expected an empty folder or an earlier run" in capsys.readouterr().err
    assert other.read_text() == "mine"


def test_rte_starts_from_the_best_mnli_model(
    finetune: Finetune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MNLI", "RTE", "CoLA"):
        write_task(tmp_path / "data", name)
    assert finetune("MNLI", "--quiet", "--lr", "0.01") == 0
    mnli = load_file(tmp_path / "out/Tiny/MNLI/best/model.safetensors")
    starts = {}
    fit = sweep.fit

    def watched(classifier: Any, *args: Any, **kwargs: Any) -> Any:
        state = classifier.model.state_dict()
        equal = {k for k, v in state.items() if v.shape == mnli[k].shape and v.equal(mnli[k])}
        starts[len(starts)] = set(state) - equal
        return fit(classifier, *args, **kwargs)

    monkeypatch.setattr(sweep, "fit", watched)
    assert finetune("RTE", "--quiet") == 0
    assert finetune("CoLA", "--quiet") == 0
    assert finetune("RTE", "--quiet", "--no-transfer", "--restart") == 0
    assert starts[0] == {"classifier.weight", "classifier.bias"}
    assert "model.transformer_encoder.0.qkv.weight" in starts[1] & starts[2]


def test_tasks_that_start_from_mnli_wait_for_its_points_at_other_processes(
    finetune: Finetune,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("MNLI", "RTE"):
        write_task(tmp_path / "data", name)
    assert finetune("MNLI", "--quiet") == 0
    (point,) = tmp_path.glob("out/Tiny/MNLI/points/*.json")
    content = point.read_bytes()
    point.unlink()
    held = files.try_lock(point.with_name(f"{point.stem}.lock"))
    assert held is not None

    def other_finishes(seconds: float) -> None:
        assert not (tmp_path / "out/Tiny/RTE").exists()
        point.write_bytes(content)

    monkeypatch.setattr("neobert.commands.finetune.time.sleep", other_finishes)
    with held:
        assert finetune("MNLI", "--task", "MNLI", "RTE") == 0
    out = capsys.readouterr()
    assert out.err.count("MNLI: waits for the points of other processes") == 1
    assert "RTE: all 1 points are finished" in out.out


@pytest.fixture
def point_folder(tmp_path: Path) -> Run:
    return Run.open(tmp_path / "run", {"task": "RTE", "name": "m", "grid": "one"})


def keep(run: Run, setting: Setting, score: float | None) -> None:
    run.keep_best(setting, score, lambda folder: (folder / "model").write_text(setting.name))


def test_the_best_model_is_kept_whatever_the_order(tmp_path: Path) -> None:
    scores = {Setting(lr, 4, 0.0): score for lr, score in ((1.0, 0.5), (2.0, 0.9), (3.0, 0.9))}
    for number, order in enumerate((list(scores), list(scores)[::-1])):
        run = Run.open(tmp_path / str(number), {})
        keep(run, Setting(9.0, 4, 0.0), None)
        assert read_best(run.folder) is None
        for setting in order:
            keep(run, setting, scores[setting])
        assert (run.folder / "best" / "model").read_text() == Setting(2.0, 4, 0.0).name
        assert not list(run.folder.glob("best.*"))


def test_a_kill_between_two_renames_loses_no_model(point_folder: Run) -> None:
    keep(point_folder, Setting(1.0, 4, 0.0), 0.5)
    folder = point_folder.folder
    (folder / "best").rename(folder / "best.old")
    (folder / "best.new").mkdir()
    Run.open(folder, point_folder.identity)
    assert read_best(folder) is not None
    keep(point_folder, Setting(2.0, 4, 0.0), 0.6)
    assert (folder / "best" / "model").read_text() == Setting(2.0, 4, 0.0).name


def test_a_damaged_result_is_named(point_folder: Run) -> None:
    (point_folder.folder / "points" / "x.json").write_text('{"score": 1')
    with pytest.raises(InputError, match=r"x\.json: expected a JSON object"):
        point_folder.points()
    (point_folder.folder / "run.json").write_text('{"kind": "cooking"}')
    with pytest.raises(InputError, match="expected a run of neobert finetune glue"):
        Run.open(point_folder.folder, point_folder.identity)


def test_the_best_setting_has_the_highest_mean_over_its_seeds() -> None:
    def point(lr: float, seed: int, score: float | None) -> sweep.Point:
        return sweep.Point(Setting(lr, 4, 0.0, seed), {"score": score})

    lucky = [point(1.0, 0, 0.9), point(1.0, 1, 0.1)]
    steady = [point(2.0, 0, 0.6), point(2.0, 1, 0.6)]
    failed = [point(3.0, 0, 0.99), point(3.0, 1, None)]
    assert sweep.best_points(lucky + steady + failed) == steady
    assert sweep.best_points([point(1.0, 0, None)]) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "nope"], "task: expected one of MNLI, QNLI, QQP, RTE"),
        (["--lr", "-1"], "argument --lr: expected a number of at least 0"),
        (["--name", ".."], "name: expected a name that a folder can have, got '..'"),
        (["--devices", "tpu"], "device: expected cpu, cuda or cuda:N, got 'tpu'"),
        (["--data", "nowhere"], "data: expected a folder with RTE/train.tsv, got nowhere"),
        (["--model", "no/model"], "model: expected a folder or a hub id, got 'no/model' (the hub"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: list[str],
    message: str,
    finetune: Finetune,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert finetune("RTE", *arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_no_option_is_named_that_the_command_does_not_have(
    finetune: Finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_task(tmp_path / "data", "RTE") / "RTE" / "train.tsv"
    path.write_bytes(path.read_bytes() + "caf\xe9".encode("latin-1"))
    assert finetune("RTE") == 2
    error = capsys.readouterr().err
    assert "train.tsv:26: expected UTF-8, got byte 0xe9 at column 4" in error
    assert "--errors" not in error


def test_without_data_and_network_the_files_to_pass_are_named(
    model_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    given = ["--model", str(model_folder), "--task", "RTE", "--output", str(tmp_path / "out")]
    assert cli.main(["finetune", "glue", *given]) == 2
    error = capsys.readouterr().err
    assert "data: expected nyu-mll/glue, 'rte', from the hub" in error
    assert "pass --data DIR with train.tsv, dev.tsv in DIR/RTE" in error


def test_a_family_without_the_head_or_without_support_is_an_error(
    finetune: Finetune, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path / "data", "RTE")
    from transformers import CLIPVisionConfig, DistilBertConfig, DistilBertModel

    sizes = {"dim": 48, "n_layers": 1, "n_heads": 3, "hidden_dim": 80, "vocab_size": 97}
    other = texts.save("bert", DistilBertModel(DistilBertConfig(**sizes)), tmp_path / "distil")
    assert finetune("RTE", "--model", str(other)) == 2
    assert "model: expected a supported family (bert, " in capsys.readouterr().err
    assert finetune("RTE", "--model", str(other), "--no-patch", "--quiet") == 0
    vision = texts.save("bert", ENCODERS["bert"].base(num_hidden_layers=1), tmp_path / "vision")
    CLIPVisionConfig().save_pretrained(vision)
    assert finetune("RTE", "--model", str(vision), "--no-patch") == 2
    assert "expected a family with a sequence classification head" in capsys.readouterr().err
