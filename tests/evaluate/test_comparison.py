"""The joint report: models as rows, the paper's figures beside ours, nothing made up."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from glue_files import record_scores

from neobert import cli
from neobert.evaluation import report, speed
from neobert.evaluation.mteb_report import Result
from neobert.evaluation.pseudo_perplexity import Document, Job
from neobert.finetuning.glue.report import COLUMNS
from neobert.readers import InputError


def write_speeds(
    root: Path, *cases: tuple[str, float], date: str = "2026-01-02", **more: Any
) -> Path:
    """A results file of the benchmarks: "inference" at these cases and tokens per second."""
    results = [
        {
            "name": "inference",
            "case": case,
            "values": {"patched_tokens_per_s": rate, "sdpa_tokens_per_s": rate / 2},
            "commit": "0123456789abc",
        }
        for case, rate in cases
    ]
    machine = {"device": "A CPU", "threads": 2}
    content = {"machine": machine, "versions": {}, "date": date, "results": results, **more}
    path = root / "a-cpu" / f"{len(list(root.rglob('*.json')))}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_perplexity(
    folder: Path, name: str, *documents: tuple[int, float], texts: str = "articles"
) -> None:
    source = {"input": f"/somewhere/{texts}", "input bytes": 1234}
    with Job(folder, {"name": name, "positions": None, "input": source}) as job:
        for tokens, loss in documents:
            job.append(Document("x", tokens, tokens - 2, loss))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Some of everything."""
    for i, task in enumerate(COLUMNS):
        record_scores(tmp_path, "NeoBERT-4096", task, 0.5 + i / 100)
    record_scores(tmp_path, "NeoBERT-4096", "RTE", 0.9, grid="one")
    record_scores(tmp_path, "<i>mine</i>", "CoLA", None, grid="one")
    scores, made = {"a": ("STS", 0.5), "b": ("Retrieval", 0.3)}, {"mteb": "2"}
    Result("NeoBERT-4096", ("MTEB(eng, v1)",), ("a", "b"), scores, made).write(tmp_path)
    Result("BERT-base", ("a",), ("a",), {"a": ("STS", 0.5)}, made).write(tmp_path)
    write_perplexity(tmp_path / "p" / "1", "chandar-lab/NeoBERT", (60, 1.0), (200, 2.0))
    write_perplexity(tmp_path / "p" / "2", "<i>mine</i>", (5000, 1e9))
    write_speeds(tmp_path, ("neobert-250m, fixed 512, float32, cpu", 1234.0))
    return tmp_path


def test_every_model_has_a_row_with_the_papers_figures_and_ours(results: Path) -> None:
    table = report.overview_table(report.collect([results]))
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["NeoBERT-4096"] == [
        "89.0", "53.5 (grid paper)",
        "51.3", "40.0",
        "4.48 (2 documents)",
        "24.5", "1.23 (A CPU, 2 threads, float32)",
        "17.2", "not measured",
    ]  # fmt: skip
    assert rows["BERT-base"] == [
        "79.6", "not run",
        "48.1", "not run; a below",
        "not run",
        "27.6", "not measured",
        "not given", "too long",
    ]  # fmt: skip
    assert rows["<i>mine</i>"][:4] == [
        "not given",
        "0 of 8 tasks (grid one)",
        "not given",
        "not run",
    ]
    assert rows["<i>mine</i>"][4] == "1.01e+304 (1 documents)"
    assert len(rows) == 10


def test_perplexities_of_other_texts_are_not_put_side_by_side(results: Path) -> None:
    write_perplexity(results / "q", "other", (60, 1.0), texts="books")
    cells = report.overview(report.collect([results]))["pseudo-perplexity"]
    assert cells["other"].text == "2.72 (1 documents of books, 1,234 bytes)"
    assert {cell.ours for cell in cells.values()} == {None}


def test_perplexity_has_its_lengths_in_order(results: Path) -> None:
    found = report.collect([results]).perplexity
    table = report.perplexity_table(found)
    assert table.columns[4:] == ("to 64", "to 256", "to 8,192", "all")
    assert table.rows[0][4:] == ["2.72", "7.39", "no documents", "4.48"]


def test_the_newest_full_run_of_a_machine_counts(tmp_path: Path) -> None:
    case = "bert-base, fixed 512, float32, cpu"
    write_speeds(tmp_path, (case, 3000.0), date="2026-03-01")
    write_speeds(tmp_path, (case, 1000.0), ("other, fixed 4096, float32, cpu", 500.0))
    write_speeds(tmp_path, (case, 9000.0), date="2026-04-01", quick=True)
    write_speeds(tmp_path, ("bert-base, ragged, float32, cpu", 7000.0), date="2026-05-01")
    rows = {(row[0], row[1]): row[2:] for row in speed.table(speed.collect(tmp_path)).rows}
    machine = "A CPU, 2 threads, float32"
    assert rows["BERT-base", f"ours, {machine}"] == ["3.00", *["too long"] * 4]
    assert rows["BERT-base", f"SDPA, {machine}"] == ["1.50", *["too long"] * 4]
    assert rows["other", f"ours, {machine}"][3:] == ["0.500", "not measured"]
    assert rows["ModernBERT-base", "ours"] == ["not measured"] * 5


def test_the_page_needs_no_other_file_and_nothing_in_it_is_nan(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    output = tmp_path / "out"
    assert cli.main(["evaluate", "report", str(results), "--output", str(output)]) == 0
    page, text = ((output / f"comparison.{kind}").read_text() for kind in ("html", "md"))
    assert capsys.readouterr().out == text + "\n"
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert page.count("data:image/png") == 4
    assert "<i>" not in page
    shown = re.sub(r"base64,[^\"]*", "", page) + text
    assert not re.search(r"\bnan\b|\binf\b", shown, re.IGNORECASE)
    pictures = sorted(path.name for path in output.glob("*.png"))
    names = ("-glue", "-mteb", "-pseudo-perplexity", "")
    assert pictures == [f"comparison{name}.png" for name in names]
    assert all((output / name).read_bytes()[1:4] == b"PNG" for name in pictures)


def test_every_cell_and_bar_says_something_the_same_in_tables_and_pictures(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    texts = {}

    def kept(figure: Any, path: Path) -> Path:
        texts[path.stem] = [text.get_text() for axes in figure.axes for text in axes.texts]
        return path

    monkeypatch.setattr("neobert.pictures._save", kept)
    found = report.collect([results])
    tables = [each.table for each in report.sections(found, {}) if each.table is not None]
    assert len(tables) == 8
    assert [row for table in tables for row in table.rows if "" in row] == []
    report.draw(found, tmp_path)
    shown = [text for text in texts["comparison"] if text]
    assert {"89.0", "51.3", "53.5", "40.0", "4.48", "1.23", "not run", "too long"} < set(shown)
    cells = [cell for cells in report.overview(found).values() for cell in cells.values()]
    assert len(shown) == len(cells) + sum(cell.paper is not None for cell in cells)
    glue, mteb = ([t for t in texts[f"comparison-{kind}"] if t] for kind in ("glue", "mteb"))
    # Of a row: <i>mine</i> with CoLA undefined, NeoBERT in grid one with RTE alone.
    assert sorted(glue) == ["not run"] * 14 + ["undefined"]
    # BERT-base has STS alone, NeoBERT also retrieval.
    assert sorted(mteb) == ["not run"] * 11 + ["other tasks"]


def test_folders_are_taken_together_and_one_inside_another_counts_once(tmp_path: Path) -> None:
    record_scores(tmp_path / "a", "m", "RTE", 0.5)
    record_scores(tmp_path / "b", "n", "RTE", 0.5)
    found = report.collect([tmp_path / "a", tmp_path / "b", tmp_path])
    assert sorted(found.glue) == [("m", "paper"), ("n", "paper")]
    (tmp_path / "empty").mkdir()
    for folder, message in (("empty", "got none in"), ("nowhere", "a folder of results, got")):
        with pytest.raises(InputError, match=message):
            report.collect([tmp_path / "a", tmp_path / folder])


@pytest.mark.parametrize("content", ['{"machine": {}, "versions": ', "no case"])
def test_a_damaged_results_file_is_named(content: str, tmp_path: Path) -> None:
    path = write_speeds(tmp_path, ("bert-base, fixed 512, float32, cpu", 1.0))
    if content == "no case":
        content = path.read_text().replace('"case"', '"place"')
    path.write_text(content)
    with pytest.raises(InputError, match=rf"{path.name}: expected "):
        report.collect([tmp_path])
