"""A run ends in a model that others load, and a second stage begins with it."""

import json
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_runs as runs
import yaml
from safetensors.torch import load_file
from small_recipe import write_tokenizer
from tokenizers.processors import BertProcessing
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer

from neobert.cli import main
from neobert.encode import Encoder
from neobert.pretraining.batches import view_of_step
from neobert.pretraining.recipe import Recipe
from neobert.pretraining.run import train
from neobert.pretraining.start import frame_texts
from neobert.pretraining.trainer import StoppedError, Trainer
from neobert.readers import InputError

Small = Callable[..., Recipe]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, counting: Any, tokenizer: Path) -> Path:
    """The run of a first stage, through the command."""
    folder = tmp_path_factory.mktemp("first")
    recipe = folder / "recipe.yaml"
    content = {
        "data": {
            "path": str(counting.folder.parent / "in.txt"), "tokenizer": str(tokenizer),
            "store": str(folder / "store"), "held_out": 20,
        },
        "batch": {"max_length": 30, "tokens": 128, "bins": 2, "workers": 0},
        "model": {
            "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "intermediate_size": 64,
        },
        "schedule": {"lr": 3e-3, "warmup": 2, "steps": 100},
        "train": {"run": str(folder / "run"), "precision": "float32"},
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump(content))
    assert main(["pretrain", str(recipe), "schedule.steps=8"]) == 0
    return folder / "run"


def test_the_command_makes_the_store_and_the_folder_of_a_run(first: Path) -> None:
    assert (first.parent / "store" / "index.json").is_file()
    settings = yaml.safe_load((first / "recipe.yaml").read_text())
    assert settings["schedule"]["steps"] == 8
    assert {path.name for path in first.iterdir()} == {
        "checkpoints", "final", "lock", "log.jsonl", "recipe.yaml",
    }  # fmt: skip
    assert [r["step"] for r in runs.records(first, "eval")] == [8]


def test_the_command_says_what_it_did(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(first.parent / "recipe.yaml")
    arguments = ["pretrain", recipe, "schedule.steps=3", f"train.run={tmp_path / 'run'}"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "neobert: new weights of seed 0, " in said.err
    assert "step 3/3  loss 4." in said.err
    assert f"the model is in {tmp_path / 'run' / 'final'}" in said.err
    assert said.out.startswith("held out: loss 4.")
    assert "the most frequent token: " in said.out
    assert main(arguments) == 2
    assert "train.run: expected a new folder" in capsys.readouterr().err
    assert main([*arguments, "--resume", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main([*arguments, "--resume", "batch.seed=5"]) == 2
    assert "batch.seed was 0, now 5" in capsys.readouterr().err
    assert main([*arguments, "--restart"]) == 2


@pytest.mark.parametrize(
    ("end", "code", "line"),
    [("signal", 143, "neobert: stopped by SIGTERM at "), ("poison", 1, "neobert: error: step 2: ")],
)
def test_the_command_says_once_why_it_ended(
    end: str,
    code: int,
    line: str,
    first: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Trainer, "_step", Trainer._step)  # to have it back
    stop = lambda _: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    runs.before_step(1, stop if end == "signal" else runs.poison)
    run = tmp_path / "run"
    recipe = str(first.parent / "recipe.yaml")
    arguments = ["schedule.steps=3", "log.every=1", f"train.run={run}"]
    assert main(["pretrain", recipe, *arguments]) == code
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith(line)
    (note,) = [r["text"] for r in runs.records(run, "note") if r["step"] == 2]
    assert said.count(note) == 1


@pytest.mark.parametrize("folder", ["final", "checkpoints/step-00000008"])
def test_transformers_loads_a_run(folder: str, first: Path) -> None:
    head = AutoModelForMaskedLM.from_pretrained(first / folder)
    base = AutoModel.from_pretrained(first / folder)
    tensors = load_file(first / folder / "model.safetensors")
    assert tensors.keys() == head.state_dict().keys()
    assert "model.transformer_encoder.1.ffn.w12.weight" in tensors
    for name, tensor in base.state_dict().items():
        assert torch.equal(tensor, tensors[f"model.{name}"])
    assert json.loads((first / folder / "config.json").read_text())["architectures"] == [
        "NeoBERTForMaskedLM"
    ]


def test_sentence_transformers_and_encode_give_the_same_vectors(first: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    texts = ["w1 w2 w3", "w7", "w9 " * 50]
    tokenizer = AutoTokenizer.from_pretrained(first / "final")
    assert tokenizer.model_max_length == 30
    vectors = Encoder.load(str(first / "final")).encode(texts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a plain folder gets mean pooling
        other = sentence_transformers.SentenceTransformer(str(first / "final"), device="cpu")
    assert np.allclose(vectors, other.encode(texts), atol=1e-5)
    assert vectors.shape == (3, 32)


def test_the_models_tokenizer_frames_texts_as_training_did(first: Path, tokenizer: Path) -> None:
    assert AutoTokenizer.from_pretrained(tokenizer)("w1")["input_ids"] == [6]
    published = AutoTokenizer.from_pretrained(first / "final")
    assert published("w1")["input_ids"] == [2, 6, 3]
    assert published("w1", "w2 w3")["input_ids"] == [2, 6, 3, 7, 8, 3]
    again = AutoTokenizer.from_pretrained(tokenizer)
    again.backend_tokenizer.post_processor = BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    before = again.backend_tokenizer.to_str()
    frame_texts(again)
    assert again.backend_tokenizer.to_str() == before


def test_a_second_stage_begins_with_the_firsts_weights_and_says_so(
    first: Path, small: Small, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = small(
        model={"init_from": str(first)},
        batch={"views": {"all": 0.5, ">=20": 0.5}},
        schedule={"kind": "constant", "lr": 1e-9, "warmup": 0, "steps": 1},
    )
    final, _, _ = train(recipe)
    assert f"weights from {first / 'final'}, " in capsys.readouterr().err
    (note,) = runs.records(recipe.train.run, "note")
    assert note["text"].startswith(f"weights from {first / 'final'}")
    before = load_file(first / "final" / "model.safetensors")
    for name, tensor in load_file(final / "model.safetensors").items():
        assert torch.allclose(tensor, before[name], atol=1e-7)
    # The longer context of the second stage.
    assert json.loads((first / "final" / "config.json").read_text())["max_length"] == 30
    assert json.loads((final / "config.json").read_text())["max_length"] == 40


@pytest.mark.parametrize("source", ["checkpoint", "folder"])
def test_weights_come_from_an_unfinished_run_or_a_model_folder(
    source: str, first: Path, small: Small, tmp_path: Path
) -> None:
    folder = first / "final"
    if source == "checkpoint":
        folder = tmp_path / "unfinished"
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "checkpoints" / "step-00000008").symlink_to(
            first / "checkpoints" / "step-00000008"
        )
    recipe = small(model={"init_from": str(folder)}, schedule={"steps": 1, "warmup": 0})
    train(recipe, quiet=True)
    (note,) = runs.records(recipe.train.run, "note")
    assert str(folder) in note["text"]


def test_a_second_stage_resumes_without_the_first(
    first: Path, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(first, tmp_path / "first")
    recipe = small(model={"init_from": str(tmp_path / "first")}, checkpoint={"every": 100})
    monkeypatch.setattr(Trainer, "_step", Trainer._step)  # to have it back
    runs.before_step(4, lambda _: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StoppedError, match="stopped by SIGTERM at step 5; saved"):
        train(recipe, quiet=True)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "first")
    train(recipe, resume=True, quiet=True)
    assert runs.records(recipe.train.run)[-1]["step"] == 12


def test_a_second_stage_of_several_views_goes_on_to_the_same_bits(
    first: Path, small: Small, tmp_path: Path
) -> None:
    def stage(name: str) -> Recipe:
        views = {"all": 0.2, ">=20": 0.4, ">=30": 0.4}
        return small(name, model={"init_from": str(first)}, batch={"views": views, "bins": 2})

    whole, recipe = stage("whole"), stage("run")
    # Every view is drawn before, between and after the two kills.
    for steps in (range(4), range(4, 8), range(8, 12)):
        assert {view_of_step(recipe.batch, s) for s in steps} == recipe.batch.views.keys()
    assert runs.finish(runs.start(runs.run, whole)) == 0
    for step, resume in ((4, False), (8, True)):
        process = runs.start(runs.signal_at, recipe, step, signal.SIGKILL, resume)
        assert runs.finish(process) == -signal.SIGKILL
    assert runs.finish(runs.start(runs.run, recipe, True)) == 0
    resumed = [r for r in runs.records(recipe.train.run, "note") if "resumed" in r["text"]]
    assert [note["step"] for note in resumed] in ([3, 6], [3, 3], [6])
    assert runs.records(recipe.train.run) == runs.records(whole.train.run)
    assert runs.weights(f"{recipe.train.run}/final") == runs.weights(f"{whole.train.run}/final")


WRONG = [
    ({"hidden_size": 64}, "model.init_from: expected weights of .*hidden_size was 32, now 64"),
    ({"num_hidden_layers": 3}, "model.init_from: expected weights .*layers was 2, now 3"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_another_shape_than_the_weights_is_refused(
    change: dict[str, int], message: str, first: Path, small: Small
) -> None:
    with pytest.raises(InputError, match=message):
        train(small(model={"init_from": str(first), **change}), quiet=True)


def test_weights_of_another_kind_are_refused(first: Path, small: Small, tmp_path: Path) -> None:
    def refused(name: str, message: str) -> None:
        with pytest.raises(InputError, match=f"model.init_from: {message}"):
            train(small(model={"init_from": str(tmp_path / name)}), quiet=True)

    shutil.copytree(first / "final", tmp_path / "bert")
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "bert" / "tokenizer.json").unlink()
    refused("bert", "expected a NeoBERT model, got bert in ")
    shutil.copytree(first / "final", tmp_path / "other")
    (tmp_path / "words").mkdir()
    write_tokenizer(tmp_path / "words")
    content = (tmp_path / "words" / "tokenizer.json").read_text().replace('"w7"', '"v7"')
    (tmp_path / "other" / "tokenizer.json").write_text(content)
    refused("other", "expected the vocabulary of data.tokenizer, got another one in ")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    refused("empty", "expected a run with a whole checkpoint, got none")
    refused("run", "expected another run than train.run")
