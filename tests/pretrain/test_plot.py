"""Curves come from logs as they are, and a second stage continues the first."""

import struct
from pathlib import Path
from typing import Any

import pytest

from neobert.cli import main
from neobert.pretraining import log
from neobert.pretraining.plot import curves, plot, smoothed
from neobert.readers import InputError


def write_run(folder: Path, *, init_from: Path | None = None, evaluated: bool = True) -> Path:
    with log.Log(folder) as run:
        for step in range(1, 101):
            run.write(step=step, tokens=1000 * step, loss=10 - step / 20)
            if evaluated and step % 50 == 0:
                scores = {"loss": 9.0, "accuracy": step / 200, "unigram_accuracy": 0.1}
                run.write(step=step, kind="eval", tokens=1000 * step, **scores)
        run.write(step=100, kind="note", text="done")
    model = "{}" if init_from is None else f"{{init_from: {init_from}}}"
    (folder / "recipe.yaml").write_text(f"model: {model}\n")
    return folder


def test_a_run_has_its_losses_and_evaluations_over_tokens(tmp_path: Path) -> None:
    (run,) = curves([write_run(tmp_path / "run")])
    assert run.name == "run"
    assert run.train == [(1000 * s, 10 - s / 20) for s in range(1, 101)]
    assert run.eval == [(50_000, 9.0), (100_000, 9.0)]
    assert run.accuracy == [(50_000, 0.25), (100_000, 0.5)]
    assert run.unigram == [(50_000, 0.1), (100_000, 0.1)]


def test_a_run_continues_the_one_it_began_from_in_any_order(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first")
    second = write_run(tmp_path / "second", init_from=first / "final")
    third = write_run(tmp_path / "third", init_from=second)
    for order in ([first, second, third], [third, second, first]):
        found = {run.name: run.train[0][0] for run in curves(order)}
        assert found == {"first": 1000, "second": 101_000, "third": 201_000}
    (alone,) = curves([second])
    assert alone.train[0][0] == 1000


def test_a_circle_of_runs_ends(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", init_from=tmp_path / "b")
    b = write_run(tmp_path / "b", init_from=a)
    assert len(curves([a, b])) == 2


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / seed / "run") for seed in ("1", "2")]
    assert [run.name for run in curves(folders)] == ["1/run", "2/run"]


def test_a_loss_that_was_not_finite_is_left_out(tmp_path: Path) -> None:
    with log.Log(tmp_path) as run:
        run.write(step=1, tokens=10, loss=3.0)
        run.write(step=2, tokens=20, loss=float("nan"))
    assert curves([tmp_path])[0].train == [(10, 3.0)]


def test_smoothing_keeps_a_line_and_halves_noise() -> None:
    line = [(float(i), 2.0 * i) for i in range(500)]
    assert [y for _, y in smoothed(line)] == pytest.approx([y for _, y in line])
    noisy = [(float(i), float((-1) ** i)) for i in range(500)]
    assert max(abs(y) for _, y in smoothed(noisy)[20:-20]) < 0.2
    assert smoothed([(1.0, 5.0)]) == [(1.0, 5.0)]


@pytest.mark.parametrize("evaluated", [True, False])
def test_the_picture_is_a_png_of_all_runs(evaluated: bool, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first = write_run(tmp_path / "first", evaluated=evaluated)
    second = write_run(tmp_path / "second", init_from=first, evaluated=evaluated)
    picture = plot([first, second], tmp_path / "loss.png")
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG\r\n")
    width, height = struct.unpack(">II", content[16:24])
    assert (width > 2 * height) is evaluated  # two panels
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "loss.png", "second"]


def test_the_command_draws_into_the_last_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    folders = [str(write_run(tmp_path / name)) for name in ("a", "b")]
    assert main(["pretrain", "--plot", *folders]) == 0
    assert Path(capsys.readouterr().out.strip()) == tmp_path / "b" / "loss.png"
    assert main(["pretrain", "--plot", folders[0], "--output", str(tmp_path / "x.png")]) == 0
    assert (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe.yaml", "--plot", "a"], "plot: expected run folders only, got RECIPE recipe.yaml"),
        (["recipe.yaml", "--output", "a.png"], "output: expected none without --plot, got a.png"),
        ([], "pretrain: expected a RECIPE, got none"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pretrain", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_drawn_is_named(tmp_path: Path) -> None:
    with log.Log(tmp_path) as run:
        run.write(step=1, kind="note", text="nothing yet")
    cases: list[tuple[Any, str]] = [
        ([], "plot: expected at least one run folder, got none"),
        ([tmp_path], "plot: expected a run with losses in its log, got "),
        ([tmp_path / "none"], "log: expected a run folder with log.jsonl, got "),
    ]
    for folders, message in cases:
        with pytest.raises(InputError, match=message):
            curves(folders)
    pytest.importorskip("matplotlib")
    with pytest.raises(InputError, match=r"plot output: expected a .png file, got loss.pdf"):
        plot([tmp_path], "loss.pdf")
