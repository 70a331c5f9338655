"""A run is AdamW on the mean loss of a step's labelled tokens, however it is computed."""

import contextlib
import itertools
import json
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import training_runs as runs
from torch import nn
from torch.nn import functional as F

from neobert.heads import NeoBERTForMaskedLM
from neobert.pretraining import evaluation, objective, optimizer, start
from neobert.pretraining.batches import MicroBatch, held_out, steps
from neobert.pretraining.checkpoint import read
from neobert.pretraining.ranks import Ranks
from neobert.pretraining.recipe import Recipe
from neobert.pretraining.run import train
from neobert.pretraining.signals import Signals
from neobert.pretraining.store import Store
from neobert.pretraining.trainer import DivergedError, Trainer
from neobert.readers import InputError
from neobert_kernels import _runtime, patching

Small = Callable[..., Recipe]
EVERY = {"every": 1, "evaluate": 0}


def logits_and_labels(
    model: NeoBERTForMaskedLM, batch: MicroBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """At the labelled tokens, from one document or padded batch at a time."""
    if batch.attention_mask is not None:
        logits = model(batch.input_ids, batch.attention_mask).logits.flatten(0, 1)
    else:
        assert batch.cu_seqlens is not None
        bounds = batch.cu_seqlens.tolist()
        parts = [batch.input_ids[:, a:b] for a, b in itertools.pairwise(bounds)]
        logits = torch.cat([model(part).logits[0] for part in parts])
    labels = batch.labels.flatten()
    return logits[labels != -100], labels[labels != -100]


def plain_losses(recipe: Recipe, store: Store) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of a loop without any of our machinery, in float64."""
    model = start.new_model(recipe, start.model_config(recipe, store, None), None).double()
    adam = optimizer.build(model, recipe.optimizer)
    losses, norms = [], []
    for number, step in zip(range(recipe.schedule.steps), steps(store, recipe), strict=False):
        optimizer.set_lr(adam, recipe.schedule.lr_at(number))
        logits, labels = zip(
            *(logits_and_labels(model, b) for b in step.micro_batches), strict=True
        )
        loss = F.cross_entropy(torch.cat(logits), torch.cat(labels))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.optimizer.clip)
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
        norms.append(norm.item())
    return losses, norms


SETTINGS: dict[str, dict[str, Any]] = {
    "packed": {},
    "padded": {"batch": {"layout": "padded"}},
    "one document a micro-batch": {"batch": {"tokens": 40, "layout": "padded", "bins": 3}},
    "unpatched": {"train": {"patch": False}},
    "unpatched and padded": {"train": {"patch": False}, "batch": {"layout": "padded"}},
    "gradient checkpointing": {"train": {"gradient_checkpointing": True}},
    "compiled checkpointing": {"train": {"compile": True, "gradient_checkpointing": True}},
    "clipped": {"optimizer": {"clip": 0.1}},
}


# torch's compiler asks tensors that are no leaves for a gradient.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_has_the_losses_of_a_plain_loop(
    name: str, small: Small, counting: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = partialmethod(nn.Module.compile, backend="eager")
    monkeypatch.setattr(nn.Module, "compile", compiled)
    torch.compiler.reset()
    changes = SETTINGS[name]
    recipe = small(schedule={"steps": 6}, log=EVERY, **changes)
    train(recipe, quiet=True)
    found = runs.records(recipe.train.run, "train")
    losses, norms = plain_losses(recipe, counting)
    assert [record["loss"] for record in found] == pytest.approx(losses, rel=1e-5)
    assert [record["grad_norm"] for record in found] == pytest.approx(norms, rel=1e-4)


def test_bfloat16_keeps_float32_weights_and_the_same_course(small: Small) -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        recipe = small(precision, train={"precision": precision}, schedule={"steps": 6}, log=EVERY)
        train(recipe, quiet=True)
        saved = read(Path(recipe.train.run) / "checkpoints" / "step-00000006")
        for name in ("model.safetensors", "optimizer.safetensors"):
            tensors = saved.tensors(name)
            assert {t.dtype for k, t in tensors.items() if "rng" not in k} == {torch.float32}
        losses[precision] = [r["loss"] for r in runs.records(recipe.train.run, "train")]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=5e-3)
    assert losses["bfloat16"] != pytest.approx(losses["float32"], rel=1e-6)


def test_a_record_sums_up_all_steps_since_the_last(small: Small) -> None:
    train(small("each", log=EVERY), quiet=True)
    train(small("fourth", log={"every": 4, "evaluate": 0}), quiet=True)
    each, fourth = (runs.records(small(name).train.run, "train") for name in ("each", "fourth"))
    assert [r["step"] for r in fourth] == [4, 8, 12]
    for number, record in enumerate(fourth, 1):
        those = each[4 * number - 4 : 4 * number]
        for key in ("tokens", "lr", "grad_norm"):
            assert record[key] == those[-1][key]
        assert min(r["loss"] for r in those) < record["loss"] < max(r["loss"] for r in those)
        assert record["utilisation"] is None


def test_scores_are_those_of_complete_logits(small: Small, counting: Store) -> None:
    recipe = small(data={"held_out": 33}, batch={"layout": "packed"})
    final, scores, _ = train(recipe, quiet=True)
    assert scores is not None
    model = NeoBERTForMaskedLM.from_pretrained(final).double()
    with torch.no_grad():
        pairs = [logits_and_labels(model, batch) for batch in held_out(counting, recipe)]
    logits, labels = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    assert scores.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert scores.accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    frequent = evaluation.most_frequent(counting, recipe)
    assert scores.unigram_accuracy == pytest.approx((labels == frequent).double().mean().item())
    (last,) = [r for r in runs.records(recipe.train.run, "eval") if r["step"] == 12]
    assert last["accuracy"] == scores.accuracy


def test_the_most_frequent_token_is_an_ordinary_one(small: Small, counting: Store) -> None:
    frequent = evaluation.most_frequent(counting, small())
    apart = {n for b in held_out(counting, small()) for n in b.documents.tolist()}
    tokens = [
        token
        for number in set(range(len(counting))) - apart
        for token in counting._shards[0][counting.offsets[number] :][: counting.lengths()[number]]
    ]
    counts = torch.bincount(torch.tensor([int(token) for token in tokens]))
    assert counts[frequent] == counts[5:].max()


def test_a_step_reads_nothing_back_from_its_device(
    small: Small, counting: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device a read is an error, and kernels only know shapes."""
    monkeypatch.setattr(_runtime, "INTERPRET", True)
    monkeypatch.setattr(patching, "_check_parameters", lambda *_: None)
    monkeypatch.setattr(objective, "autocast", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    recipe = small(train={"gradient_checkpointing": True})
    model = start.new_model(recipe, start.model_config(recipe, counting, None), None)
    ranks = Ranks(0, 1, torch.device("meta"))
    trainer = Trainer(recipe, counting, model, ranks, Signals(), None)
    for step, _ in zip(steps(counting, recipe), range(2), strict=False):
        trainer._step(step)
    with pytest.raises(NotImplementedError, match="meta tensor"):
        trainer._read()


@pytest.mark.parametrize("background", [True, False])
def test_checkpoints_stay_as_long_as_the_recipe_says(background: bool, small: Small) -> None:
    recipe = small(
        checkpoint={"every": 1, "keep_last": 2, "keep_every": 5, "background": background}
    )
    train(recipe, quiet=True)
    folders = sorted((Path(recipe.train.run) / "checkpoints").iterdir())
    assert [int(f.name.removeprefix("step-")) for f in folders] == [5, 10, 11, 12]


@pytest.mark.parametrize(
    ("every", "bad", "seen"),
    [(1, 7, 7), (5, 7, 8), (100, 8, 8)],
    ids=["a record", "steps before a checkpoint", "the step of a checkpoint"],
)
def test_a_loss_that_is_not_finite_stops_before_it_is_saved(
    every: int, bad: int, seen: int, small: Small, counting: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Trainer._step
    monkeypatch.setattr(Trainer, "_step", real)  # for monkeypatch to put it back
    runs.before_step(bad - 1, runs.poison)
    recipe = small(log={"every": every, "evaluate": 0}, checkpoint={"every": 4})
    folder = Path(recipe.train.run)
    message = rf"step {bad}: the loss is nan; .* state after step {seen} .* is step-00000004"
    with pytest.raises(DivergedError, match=message):
        train(recipe, quiet=True)
    (stopped,) = (folder / "stopped").iterdir()
    assert read(stopped).step == seen
    report = json.loads((stopped / "report.json").read_bytes())
    batches = next(itertools.islice(steps(counting, recipe), bad - 1, None)).micro_batches
    assert report["step"] == bad
    assert report["documents by rank and micro-batch"] == [[b.documents.tolist() for b in batches]]
    texts = runs.counting_texts()
    numbers = np.unique(np.concatenate([batch.documents for batch in batches]))
    shown = {str(d): " ".join(texts[d].split()[:32]) for d in numbers.tolist()}
    assert report["beginnings"] == shown
    assert any(len(texts[d].split()) > 32 for d in numbers.tolist())
    # The run can go on from a checkpoint all of whose weights are numbers.
    (newest,) = (folder / "checkpoints").iterdir()
    assert all(t.isfinite().all() for t in read(newest).tensors("model.safetensors").values())
    monkeypatch.setattr(Trainer, "_step", real)
    train(recipe, resume=True, quiet=True)


BAD = [
    (
        {"model": {"hidden_size": 33}},
        "model.hidden_size: expected num_attention_heads",
    ),
    ({"model": {"vocab_size": 99}}, r"data.tokenizer: expected at most 99 tokens .*got 100"),
    ({"model": {"max_length": 39}}, r"model.max_length: expected at least batch.max_length \(40\)"),
    ({"model": {"init_from": "/none"}}, "model.init_from: expected a run, .*, got '/none'"),
    ({"data": {"store": "/none"}}, "data.store: expected a finished store .*, got none in /none"),
    ({"data": {"held_out": 400}}, "data.held_out: expected fewer than the store's 400"),
    ({"train": {"run": ""}}, "train.run: expected a folder for the run, got none"),
    ({"batch": {"views": {">=500": 1.0}}}, "batch.views: expected documents of at least 500"),
    ({"data": {"tokenizer": "/none"}}, "tokenizer: expected a folder or a hub id"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_what_cannot_be_trained_is_refused_before_anything_is_written(
    change: dict[str, Any], message: str, small: Small
) -> None:
    with pytest.raises((InputError, OSError), match=message):
        train(small(**change), quiet=True)
    assert not Path(small().train.run).exists()


def test_another_tokenizer_than_the_stores_is_refused(small: Small, tmp_path: Path) -> None:
    from small_recipe import write_tokenizer

    (tmp_path / "other").mkdir()
    other = write_tokenizer(tmp_path / "other", sep_token="w3")
    with pytest.raises(InputError, match=r"data.tokenizer: expected the tokenizer of .*store, got"):
        train(small(data={"tokenizer": str(other)}), quiet=True)


def test_two_jobs_do_not_share_a_run(small: Small) -> None:
    from neobert import files

    recipe = small()
    folder = Path(recipe.train.run)
    folder.mkdir()
    with files.lock(folder), pytest.raises(InputError, match=r"train\.run: expected one job"):
        train(recipe, quiet=True)
