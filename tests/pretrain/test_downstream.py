"""A model that was pre-trained here goes through fine-tuning and evaluation as any other does."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from glue_files import write_task

from neobert import cli
from neobert.evaluation import report
from neobert.pretraining.recipe import Recipe
from neobert.pretraining.run import train


def test_a_pretrained_model_goes_through_every_command(
    small: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sentence_transformers")
    train(small("run"), quiet=True)
    final, results = tmp_path / "run" / "final", tmp_path / "results"
    data = tmp_path / "data"
    for task in ("RTE", "STS-B"):
        write_task(data, task, test=3)
    pairs = [{"query": f"w{i} w{i + 1}", "positive": f"w{i + 1}"} for i in range(0, 40, 2)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("w1 w2 w3 w4 w5 w6")

    def run(*arguments: str, output: str | None = None) -> None:
        given = ["--output", str(results / output)] if output else []
        assert cli.main([*arguments, *given]) == 0, capsys.readouterr().err

    model = ["--model", str(final), "--device", "cpu"]
    run("finetune", "contrastive", *model, "--data", str(tmp_path / "pairs.jsonl"),
        "--steps", "2", "--batch-size", "4", output="encoder")  # fmt: skip
    for each in (final, results / "encoder" / "final"):
        given = ["--model", str(each), "--name", f"of {each.parent.name}"]
        run("finetune", "glue", *given, "--data", str(data), "--task", "RTE", "STS-B",
            "--grid", "one", "--epochs", "1", "--devices", "cpu", output="glue")  # fmt: skip
        run("evaluate", "sts", *given[:2], "--device", "cpu", "--data", str(data))
    run("evaluate", "pseudo-perplexity", *model, "--name", "of run",
        "--input", str(tmp_path / "texts"), output="perplexity")  # fmt: skip
    capsys.readouterr()
    run("evaluate", "report", str(results))
    shown = capsys.readouterr().out
    found = report.collect([results])
    assert {name for name, _ in found.glue} == {"of run", "of encoder"}
    rows = {row[0]: row for row in report.overview_table(found).rows}
    assert rows["of run"][2] == "2 of 8 tasks (grid one)"
    assert rows["of run"][5].endswith("(1 documents)")
    assert rows["of encoder"][5] == "not run"
    assert "| of run | RTE | one | 1 |" in shown
