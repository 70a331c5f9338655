"""One point: packed equals padded, the schedule, the best state, the same result twice."""

import copy
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import texts
import torch
from encoders import ENCODERS, randomized, widened
from glue_files import WORDS
from parity import assert_same, assert_same_gradients

import neobert_kernels as nk
from neobert.finetuning.batches import Collator, Tokens, by_length, shuffled, tokenize
from neobert.finetuning.classifier import Classifier, load_classifier
from neobert.finetuning.schedule import Protocol, Setting
from neobert.finetuning.training import Fit, clip_gradients, fit, make_optimizer, predict

FAMILIES = [name for name, encoder in ENCODERS.items() if encoder.has("sequence")]
SETTING = Setting(1e-3, 4, 0.01)
SHORT = Protocol(epochs=2, evaluations=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A base model of each family with its tokenizer, made when it is first asked for."""
    root, made = tmp_path_factory.mktemp("models"), {}

    def folder(family: str) -> Path:
        if family not in made:
            torch.manual_seed(0)
            model = randomized(ENCODERS[family].base())
            made[family] = texts.save(family, model, root / family)
        return made[family]

    return folder


def pair_texts(count: int) -> list[list[str]]:
    draw = np.random.default_rng(0)
    return [
        [" ".join(draw.choice(WORDS, draw.integers(1, 6))) for _ in range(count)] for _ in range(2)
    ]


def pairs(classifier: Classifier, count: int = 12) -> Tokens:
    return tokenize(
        classifier.tokenizer, pair_texts(count), classifier.max_length, classifier.with_types
    )


def run(classifier: Classifier, judge: Any = None, **changes: Any) -> Fit:
    tokens = pairs(classifier)
    labels = np.arange(len(tokens)) % 2
    values = {"setting": SETTING, "protocol": SHORT} | changes
    judge = judge or (lambda: (0.5, {"accuracy": 0.5}, {}))
    return fit(classifier, tokens, labels, judge=judge, **values)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_gives_the_loss_and_gradients_of_padded(family: str) -> None:
    plain: Any = randomized(ENCODERS[family].head("sequence", num_labels=2)).eval()
    wide, ours = widened(plain), copy.deepcopy(plain)
    nk.patch(ours)
    tokenizer = texts.tokenizer(family)
    tokens = tokenize(tokenizer, pair_texts(12), texts.LONGEST, with_types=family == "bert")
    rows, labels = np.array([7, 0, 3, 10, 2]), torch.tensor([0, 1, 1, 0, 1])
    padded, packed = (
        Collator(torch.device("cpu"), kind, tokenizer.pad_token_id)(tokens, rows)
        for kind in (False, True)
    )
    assert packed["input_ids"].shape[1] == tokens.lengths[rows].sum() < padded["input_ids"].numel()
    assert ("token_type_ids" in packed) == (family == "bert")
    results = [
        model(**inputs, labels=labels)
        for model, inputs in ((ours, packed), (plain, padded), (wide, padded))
    ]
    assert_same(*(output.logits for output in results), "logits")
    for output in results:
        output.loss.backward()
    assert_same_gradients(ours, plain, wide)


def test_token_types_go_to_models_that_have_them(folders: Any) -> None:
    for family, has in (("bert", True), ("roberta", False), ("neobert", False)):
        classifier = load_classifier(folders(family), ["a", "b"])
        assert classifier.with_types == has
        assert (pairs(classifier).types is not None) == has


def test_a_supported_family_runs_packed_and_others_can_run_padded(folders: Any) -> None:
    assert load_classifier(folders("bert"), ["a", "b"]).packed
    assert not load_classifier(folders("bert"), ["a", "b"], patched=False).packed


@pytest.mark.parametrize("patched", [True, False])
def test_predictions_are_in_the_order_of_the_texts(patched: bool, folders: Any) -> None:
    classifier = load_classifier(folders("bert"), ["a", "b"], patched=patched)
    tokens = pairs(classifier)
    together = predict(classifier, tokens)
    alone = Collator(classifier.device, classifier.packed)
    for row in range(len(tokens)):
        with torch.no_grad():
            logits = classifier.model(**alone(tokens, np.array([row]))).logits
        torch.testing.assert_close(torch.from_numpy(together[row]), logits[0])


def test_the_schedule_rises_falls_and_stays() -> None:
    protocol, steps = Protocol(), 1000
    factors = [protocol.factor(step, steps) for step in range(steps)]
    peak = int(np.argmax(factors))
    assert peak == 60
    assert factors[60] == 1
    assert 0 < factors[0] < 0.02
    assert all(a < b for a, b in itertools.pairwise(factors[:61]))
    assert all(a > b for a, b in itertools.pairwise(factors[60:901]))
    assert factors[480] == pytest.approx(0.55)  # half-way between 60 and 900
    assert factors[900:] == [0.1] * 100


def test_evaluations_come_ten_times_an_epoch_and_every_500_steps_at_least() -> None:
    protocol = Protocol()
    assert protocol.steps(1000, 16) == 10 * 63
    assert protocol.evaluate_every(1000, 16) == 6
    assert protocol.evaluate_every(392_702, 16) == 500
    assert protocol.evaluate_every(20, 16) == 1


def test_an_epoch_has_every_row_once_in_an_order_of_its_own() -> None:
    epochs = [list(shuffled(11, 4, seed=3, epoch=epoch)) for epoch in range(2)]
    assert [len(batch) for batch in epochs[0]] == [4, 4, 3]
    orders = [np.concatenate(epoch).tolist() for epoch in epochs]
    assert [sorted(order) for order in orders] == [list(range(11))] * 2
    assert orders[0] != orders[1]
    assert orders[0] == np.concatenate(list(shuffled(11, 4, seed=3, epoch=0))).tolist()
    assert orders[0] != np.concatenate(list(shuffled(11, 4, seed=4, epoch=0))).tolist()


def test_batches_by_length_hold_every_row_within_the_budget() -> None:
    lengths = np.array([3, 50, 1, 7, 7, 20, 2])
    batches = [batch.tolist() for batch in by_length(lengths, 21)]
    assert sorted(itertools.chain.from_iterable(batches)) == list(range(7))
    assert all(lengths[batch].sum() <= 21 for batch in batches if len(batch) > 1)


def test_a_pair_too_long_is_cut_and_counted(folders: Any) -> None:
    classifier = load_classifier(folders("bert"), ["a", "b"], max_length=20)
    tokens = tokenize(classifier.tokenizer, [["a" * 30, "b"], ["c" * 3, "d"]], 20, True)
    assert tokens.lengths.tolist() == [20, 5]
    assert tokens.truncated == 1
    assert tokens.types is not None
    assert tokens.types[:20].tolist() == [0] * 16 + [1] * 4  # the shorter text is whole


def test_only_matrices_decay(folders: Any) -> None:
    model = load_classifier(folders("bert"), ["a", "b"]).model
    decayed, plain = make_optimizer(model, Setting(1e-3, 4, 0.3)).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith("weight") for p in decayed["params"])
    assert all("bias" in names[id(p)] or "Norm" in names[id(p)] for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_gradients_are_clipped_as_pytorch_clips_them(scale: float) -> None:
    ours = torch.nn.Linear(5, 3)
    (ours(torch.ones(2, 5)).sum() * scale).backward()
    theirs = copy.deepcopy(ours)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    clip_gradients(ours, 3.0)
    torch.nn.utils.clip_grad_norm_(theirs.parameters(), 3.0)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert p.grad is not None
        assert torch.equal(p.grad, q.grad)


def test_the_best_evaluation_is_what_stays(folders: Any) -> None:
    classifier = load_classifier(folders("bert"), ["a", "b"])
    scores, states = [0.2, 0.7, 0.7, None, 0.1, 0.7], []

    def judge() -> tuple:
        assert not classifier.model.training
        states.append(copy.deepcopy(classifier.model.state_dict()))
        return scores[len(states) - 1], {}, {}

    done = run(classifier, judge)
    assert [e.score for e in done.evaluations] == scores
    assert done.best is done.evaluations[1]
    for name, value in classifier.model.state_dict().items():
        assert torch.equal(value, states[1][name]), name
    assert any(not torch.equal(value, states[1][name]) for name, value in states[2].items())


def test_training_stops_after_evaluations_without_gain(folders: Any) -> None:
    classifier = load_classifier(folders("bert"), ["a", "b"])
    done = run(classifier, protocol=Protocol(epochs=9, evaluations=3, patience=2))
    assert (done.stopped, done.steps, done.planned_steps) == ("early", 3, 27)


def test_a_loss_that_is_not_finite_ends_the_point(folders: Any) -> None:
    classifier = load_classifier(folders("bert"), ["a", "b"])
    with torch.no_grad():
        classifier.model.classifier.weight.fill_(math.inf)
    done = run(classifier)
    assert done.stopped == "diverged"
    assert done.record()["score"] is None


@pytest.mark.parametrize("patched", [True, False])
def test_a_point_depends_on_its_seed_and_on_nothing_before_it(patched: bool, folders: Any) -> None:
    folder = folders("neobert")

    def losses(seed: int) -> list[float]:
        torch.manual_seed(seed)
        classifier = load_classifier(folder, ["a", "b"], patched=patched)
        classifier.model.dropout.p = 0.3
        return [e.loss for e in run(classifier, setting=Setting(1e-3, 4, 0.0, seed)).evaluations]

    first = losses(0)
    assert losses(1) != first
    assert losses(0) == first


def test_scores_are_regressed(folders: Any) -> None:
    torch.manual_seed(0)
    classifier = load_classifier(folders("bert"), [])
    tokens = pairs(classifier)
    labels = np.linspace(0, 5, len(tokens))

    def error() -> float:
        return float(((predict(classifier, tokens)[:, 0] - labels) ** 2).mean())

    before = error()
    protocol = Protocol(epochs=8, evaluations=1)
    done = fit(
        classifier, tokens, labels, Setting(3e-3, 4, 0.0), protocol,
        lambda: (-error(), {}, {}),
    )  # fmt: skip
    assert done.best is not None
    assert error() < before / 2


def test_attention_dropout_is_off_and_other_dropout_stays(folders: Any, tmp_path: Path) -> None:
    config = {"attention_probs_dropout_prob": 0.1, "hidden_dropout_prob": 0.2}
    folder = texts.save("bert", ENCODERS["bert"].base(**config), tmp_path)
    for patched in (True, False):
        config = load_classifier(folder, ["a", "b"], patched=patched).model.config
        assert (config.attention_probs_dropout_prob, config.hidden_dropout_prob) == (0.0, 0.2)


def test_new_weights_are_told_and_a_missing_layer_is_an_error(folders: Any, tmp_path: Path) -> None:
    assert load_classifier(folders("bert"), ["a", "b"]).notes == ("new weights: classifier",)
    base = ENCODERS["bert"].base(num_hidden_layers=2)
    base.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match=r"expected bert.encoder.layer.2.*, got none"):
        load_classifier(texts.save("bert", base, tmp_path), ["a", "b"])


def test_a_pooler_that_was_not_saved_is_new(tmp_path: Path) -> None:
    base = ENCODERS["bert"].base()
    base.pooler = None
    folder = texts.save("bert", base, tmp_path)
    assert "bert.pooler.dense" in load_classifier(folder, ["a", "b"]).notes[0]


def test_a_head_for_other_classes_leaves_its_last_layer_behind(
    folders: Any, tmp_path: Path
) -> None:
    donor = load_classifier(folders("neobert"), ["a", "b", "c"])
    randomized(donor.model)
    donor.model.save_pretrained(tmp_path)
    taken = load_classifier(folders("neobert"), ["no", "yes"], head=tmp_path)
    assert taken.notes == ("new weights: classifier",)
    before, after = donor.model.state_dict(), taken.model.state_dict()
    same = {name for name in after if torch.equal(before[name], after[name])}
    assert set(after) - same == {"classifier.weight", "classifier.bias"}
    assert taken.model.config.id2label == {0: "no", 1: "yes"}
