"""The report: the paper's figures beside ours, averages of all tasks only, nothing made up."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from glue_files import record_scores as add

from neobert import cli, pictures
from neobert.finetuning.glue import report
from neobert.finetuning.glue.paper import AVERAGE, PAPER, TEST_SERVER
from neobert.readers import InputError


def rows(root: Path) -> dict[tuple[str, str], list[str]]:
    table = report.scores_table(report.collect(root))
    return {(row[0], row[1]): list(row[2:]) for row in table.rows}


def test_the_papers_averages_are_the_means_of_its_rows() -> None:
    for name, row in PAPER.items():
        tasks = [value for column, value in row.items() if column != AVERAGE]
        if name in TEST_SERVER:  # there both parts of MNLI count
            tasks.append(row["MNLI"])
        assert sum(tasks) / len(tasks) == pytest.approx(row[AVERAGE], abs=0.15), name


def test_without_results_every_model_of_the_paper_is_not_run(tmp_path: Path) -> None:
    shown = rows(tmp_path)
    assert shown["NeoBERT-4096", "paper"] == [
        "89.0", "93.7", "90.7", "91.3", "95.6", "93.4", "66.2", "91.8", "89.0",
    ]  # fmt: skip
    assert shown["NeoBERT-4096", "ours"] == ["not run"] * 9
    assert len(shown) == 2 * len(PAPER)


def test_our_row_stands_below_the_papers(tmp_path: Path) -> None:
    add(tmp_path, "NeoBERT-4096", "RTE", 0.9, 0.8)
    add(tmp_path, "my/model", "CoLA", None)
    shown = rows(tmp_path)
    ours = shown["NeoBERT-4096", "ours, grid paper"]
    assert ours == [*["not run"] * 3, "85.0", *["not run"] * 4, "1 of 8 tasks"]
    assert shown["my/model", "ours, grid paper"][6] == "undefined"
    assert ("my/model", "paper") not in shown
    details = report.settings_table(report.collect(tmp_path)).rows
    columns = report.settings_table({}).columns
    by_task = {row[1]: dict(zip(columns, row, strict=True)) for row in details}
    assert by_task["RTE"]["seeds"] == "0 1"
    assert by_task["RTE"]["metrics"] == "accuracy 85.0"
    assert by_task["CoLA"]["metrics"] == "accuracy: no <label>"
    assert by_task["CoLA"]["seeds"] == "undefined"
    add(tmp_path, "my/model", "SST-2")
    details = report.settings_table(report.collect(tmp_path)).rows
    (row,) = [row for row in details if row[1] == "SST-2"]
    assert row[3:5] == ["0", "not run"]
    assert "" not in row


def test_an_average_needs_all_eight_tasks(tmp_path: Path) -> None:
    for i, task in enumerate(report.COLUMNS):
        add(tmp_path, "m", task, 0.5 + i / 100)
    add(tmp_path, "m", "WNLI", 0.1)
    assert rows(tmp_path)["m", "ours, grid paper"][-1] == "53.5"


def test_grids_have_rows_of_their_own_and_doubles_are_refused(tmp_path: Path) -> None:
    add(tmp_path, "m", "RTE", 0.5)
    add(tmp_path, "m", "RTE", 0.6, grid="one")
    assert [key for key in rows(tmp_path) if key[0] == "m"] == [
        ("m", "ours, grid one"),
        ("m", "ours, grid paper"),
    ]
    add(tmp_path / "again", "m", "RTE", 0.7)
    with pytest.raises(InputError, match="expected one folder for m, RTE and grid paper"):
        report.collect(tmp_path)


def test_the_page_needs_no_other_file_and_nothing_in_it_is_nan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add(tmp_path / "glue", "<b>m</b>", "RTE", None)
    add(tmp_path / "glue", "BERT-base", "RTE", 0.7)
    given = ["--report", "--runs", str(tmp_path / "glue"), "--output", str(tmp_path / "out")]
    assert cli.main(["evaluate", "glue", *given]) == 0
    page, text = ((tmp_path / "out" / f"glue.{kind}").read_text() for kind in ("html", "md"))
    assert capsys.readouterr().out == text + "\n"
    assert "<b>" not in page
    assert "&lt;b&gt;m" in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "nan" not in (re.sub(r"base64,[^\"]*", "", page) + text).lower()
    assert page.count("<tr>") == text.count("\n|") - 2 + 1 - 1


def test_a_missing_folder_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["evaluate", "glue", "--report", "--runs", "nowhere"]) == 2
    expected = "runs: expected a folder of neobert finetune glue, got nowhere"
    assert expected in capsys.readouterr().err


def drawn(path: Path) -> bytes:
    pytest.importorskip("matplotlib")
    return path.read_bytes()


def test_pictures_are_drawn_where_matplotlib_is(tmp_path: Path) -> None:
    bars: Callable[..., Any] = pictures.bars
    bars(tmp_path / "a.png", "t", "u", ["x", "y"], {"one": [1.0, "not run"], "two": [2.0, 3.0]})
    lines = {"m": [(1.0, 2.0), (3.0, 4.0)]}
    pictures.curves(tmp_path / "b.png", "t", "x", "y", lines, {"m": [(1.0, 2.0)]})
    assert all(drawn(tmp_path / name)[1:4] == b"PNG" for name in ("a.png", "b.png"))
