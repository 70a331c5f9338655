"""MTEB: our encoder as a model of mteb, and the table beside the paper's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import texts
import torch
from encoders import ENCODERS

from neobert import cli
from neobert.commands.mteb import _tasks
from neobert.encode import Encoder
from neobert.evaluation.mteb_report import (
    KINDS,
    PAPER,
    Result,
    Scores,
    collect,
    scores_table,
    tasks_table,
)
from neobert.readers import InputError


def result(name: str, asked: str, tasks: tuple[str, ...], scores: Scores) -> Result:
    return Result(name, (asked,), tasks, scores, {"mteb": "2"})


def test_means_are_given_for_whole_kinds_only() -> None:
    ours: Scores = {"a": ("STS", 0.5), "b": ("STS", 0.7), "x": ("STS", 0.1)}
    shown = [result("m", "B", ("a", "b", "c"), ours), result("BERT-base", "a", ("a",), {})]
    rows = {(row[0], row[1]): row[2:] for row in scores_table(shown).rows}
    assert rows["NeoBERT-4096", "paper"][-1] == "51.3"
    assert rows["NeoBERT-4096", "ours"] == ["not run"] * 8
    assert rows["m", "ours, B"][list(KINDS).index("STS")] == "60.0"
    assert rows["m", "ours, B"][-1] == "2 of 3 tasks"
    assert rows["BERT-base", "ours, a"] == ["not run"] * 8
    assert tasks_table([result("m", "a", ("a",), {"a": ("STS", None)})]).rows == [
        ["a", "STS", "not run"]
    ]
    assert len(PAPER) == 8


def test_a_result_is_found_again_and_a_double_refused(tmp_path: Path) -> None:
    first = result("org/m", "MTEB(eng, v1)", ("a",), {"a": ("STS", 0.5)})
    second = result("org/m", "a", ("a",), {"a": ("STS", None)})
    for each in (first, second, second):  # the second command of a kind replaces the first
        each.write(tmp_path / "here")
    assert collect(tmp_path, tmp_path / "here") == [first, second]
    first.write(tmp_path / "there")
    with pytest.raises(InputError, match=r"expected one folder for org/m and MTEB\(eng, v1\)"):
        collect(tmp_path)
    path = second.write(tmp_path / "damaged")
    path.write_text('{"kind": "neobert mteb", "version": 1, "scores": []}')
    with pytest.raises(InputError, match=r"run\.json: expected a run of neobert evaluate mteb"):
        collect(tmp_path / "damaged")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = ENCODERS["bert"].base(num_hidden_layers=1)
    return texts.save("bert", model, tmp_path_factory.mktemp("tiny"))


# mteb's own: it copies tensors with torch.tensor.
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
def test_every_kind_of_task_runs_and_prompts_reach_the_texts(folder: Path) -> None:
    mteb = pytest.importorskip("mteb")
    from mteb.mocks.mock_run import ALL_MOCK_TASK_TEST_GRID

    from neobert.evaluation.mteb_encoder import MTEBEncoder

    encoder = Encoder.load(folder, device="cpu")
    model = MTEBEncoder(encoder, "tiny", {"query": "find: "})
    results = mteb.mock_run(model)
    failed = {name: status for name, status in results.items() if hasattr(status, "exception")}
    assert failed == {}
    kinds = {task.metadata.name: task.metadata.type for task in ALL_MOCK_TASK_TEST_GRID}
    passed = {kinds[name] for name, status in results.items() if status is not None}
    assert passed >= {*KINDS, "BitextMining", "InstructionRetrieval", "MultilabelClassification"}
    (task,) = mteb.get_tasks(tasks=["STSBenchmark"])
    given = {"task_metadata": task.metadata, "hf_split": "test", "hf_subset": "default"}
    batches = [{"text": ["a cat", "a dog"]}, {"text": ["x"]}]
    plain = model.encode(batches, **given)
    np.testing.assert_array_equal(plain, encoder.encode(["a cat", "a dog", "x"]))
    asked = model.encode(batches, **given, prompt_type=mteb.types.PromptType.query)
    np.testing.assert_allclose(
        asked, encoder.encode(["find: a cat", "find: a dog", "find: x"]), atol=1e-6
    )


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor:UserWarning")
def test_the_command_runs_a_task_once_and_leaves_its_score_to_the_report(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("mteb")
    from mteb.mocks.mock_run import ALL_MOCK_TASK_TEST_GRID

    tasks = [t for t in ALL_MOCK_TASK_TEST_GRID if t.metadata.name == "MockSTSTask"]
    monkeypatch.setattr("neobert.commands.mteb._tasks", lambda mteb, names: tasks)
    calls = []
    encode = Encoder.encode

    def counted(self: Encoder, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(Encoder, "encode", counted)
    given = ["--model", str(folder), "--name", "BERT-base", "--output", str(tmp_path)]
    given += ["--benchmark", "MockSTSTask", "--device", "cpu"]
    assert cli.main(["evaluate", "mteb", *given]) == 0
    first, (found,) = len(calls), collect(tmp_path)
    assert first > 0
    assert (found.name, found.asked, found.tasks) == ("BERT-base", ("MockSTSTask",), found.asked)
    (score,) = [score for kind, score in found.scores.values() if kind == "STS"]
    assert score is not None
    assert f"| MockSTSTask | STS | {100 * score:.1f} |" in capsys.readouterr().out
    assert cli.main(["evaluate", "mteb", *given]) == 0
    assert len(calls) == first
    (again,) = collect(tmp_path)  # as the cache has it, rounded
    assert again.scores["MockSTSTask"] == ("STS", pytest.approx(score))


@pytest.mark.filterwarnings("ignore:All tasks of CQADupstackRetrieval:UserWarning")  # mteb's own
def test_a_task_whose_parts_all_failed_is_named_and_run_again(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mteb = pytest.importorskip("mteb")
    tasks = mteb.get_tasks(tasks=["CQADupstackRetrieval"])
    monkeypatch.setattr("neobert.commands.mteb._tasks", lambda mteb, names: [*tasks])
    monkeypatch.setattr(mteb.AbsTask, "load_data", lambda *_, **__: 1 / 0)
    given = ["--model", str(folder), "--output", str(tmp_path), "--device", "cpu"]
    given += ["--benchmark", "CQADupstackRetrieval"]
    for _ in range(2):
        assert cli.main(["evaluate", "mteb", *given]) == 1
        assert "CQADupstackRetrieval failed: all of its parts failed" in capsys.readouterr().err
        assert not list(tmp_path.rglob("CQADupstackRetrieval.json"))


def test_superseded_tasks_are_found_and_the_english_parts_of_each_if_it_has_some() -> None:
    mteb = pytest.importorskip("mteb")
    names = ["STSBenchmark", "SICK-R", "STS17", "BUCC", "GermanSTSBenchmark"]
    found = {task.metadata.name: task for task in _tasks(mteb, names)}
    assert list(found) == names
    assert found["STS17"].hf_subsets == ["en-en"]
    parts = found["BUCC"].hf_subsets  # each with another language
    assert len(parts) > 1
    assert all("en" in part.split("-") for part in parts)
    assert found["GermanSTSBenchmark"].languages == ["deu"]


def test_an_unknown_benchmark_has_near_names(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("mteb")
    given = ["--model", str(folder), "--output", str(tmp_path / "out")]
    assert cli.main(["evaluate", "mteb", *given, "--benchmark", "STSBenchmarc"]) == 2
    assert "STSBenchmark" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
