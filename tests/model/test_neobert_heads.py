"""Heads: their logits on padded and packed input, their losses, their weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import neobert_oracle as oracle
import pytest
import torch
from neobert_oracle import Shape
from parity import assert_within_budget
from torch import Tensor
from torch.nn import functional as F

from neobert import (
    NeoBERTConfig,
    NeoBERTForMaskedLM,
    NeoBERTForQuestionAnswering,
    NeoBERTForSequenceClassification,
    NeoBERTForTokenClassification,
    NeoBERTModel,
)

Results = tuple[dict[str, Any], dict[str, Any]]


@pytest.fixture
def results(ids: Tensor, mask: Tensor) -> Callable[[str], Results]:
    """The oracle's float32 and float64 outputs with a given head."""

    def run(head: str) -> Results:
        weights = oracle.draw(Shape(), head)
        rounded = oracle.forward(weights, Shape(), ids, mask, torch.float32)
        return rounded, oracle.forward(weights, Shape(), ids, mask)

    return run


@pytest.fixture
def classifier(head_folder: Callable[[str], Path]) -> NeoBERTForSequenceClassification:
    return NeoBERTForSequenceClassification.from_pretrained(head_folder("classes"), num_labels=3)


def flipped(ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The same documents, padded on the left."""
    left, left_mask = torch.zeros_like(ids), torch.zeros_like(mask)
    for i, length in enumerate(mask.sum(1).tolist()):
        left[i, -length:], left_mask[i, -length:] = ids[i, :length], 1
    return left, left_mask


@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_sequence_classification_reads_the_first_token_of_every_document(
    layout: str,
    classifier: NeoBERTForSequenceClassification,
    ids: Tensor,
    mask: Tensor,
    packed: dict[str, Any],
    results: Callable[[str], Results],
):
    rounded, exact = results("classes")
    if layout == "packed":
        logits = classifier(**packed).logits
    else:
        logits = classifier(*((ids, mask) if layout == "right" else flipped(ids, mask))).logits
    assert_within_budget(logits, rounded["classes"][:, 0], exact["classes"][:, 0], ulps=4)


def test_token_classification(
    head_folder: Callable[[str], Path],
    ids: Tensor,
    mask: Tensor,
    packed: dict[str, Any],
    results: Callable[[str], Results],
):
    model = NeoBERTForTokenClassification.from_pretrained(head_folder("classes"), num_labels=3)
    rounded, exact = (r["classes"] for r in results("classes"))
    real = mask.bool()
    labels = torch.randint(0, 3, ids.shape).masked_fill(~real, -100)
    padded = model(ids, mask, labels=labels)
    assert_within_budget(padded.logits, rounded, exact)
    loss = F.cross_entropy(exact[real], labels[real])
    assert_within_budget(padded.loss, F.cross_entropy(rounded[real], labels[real]), loss)
    row = model(**packed, labels=labels[real][None])
    assert_within_budget(row.logits[0], rounded[real], exact[real])
    assert_within_budget(row.loss, F.cross_entropy(rounded[real], labels[real]), loss)


def test_question_answering(
    head_folder: Callable[[str], Path],
    ids: Tensor,
    mask: Tensor,
    packed: dict[str, Any],
    results: Callable[[str], Results],
):
    model = NeoBERTForQuestionAnswering.from_pretrained(head_folder("answer"))
    rounded, exact = (r["answer"] for r in results("answer"))
    start, end = torch.tensor([1, 3, 0, 99]), torch.tensor([4, 3, 0, 99])  # the last: no answer
    out = model(ids, mask, start_positions=start, end_positions=end)
    assert_within_budget(out.start_logits, rounded[..., 0], exact[..., 0])
    assert_within_budget(out.end_logits, rounded[..., 1], exact[..., 1])

    def loss(logits: Tensor) -> Tensor:
        halves = (F.cross_entropy(logits[:3, :, i], (start, end)[i][:3]) for i in range(2))
        return sum(halves, torch.zeros(())) / 2

    assert_within_budget(out.loss, loss(rounded), loss(exact))
    row = model(**packed)
    real = mask.bool()
    assert_within_budget(row.start_logits[0], rounded[..., 0][real], exact[..., 0][real])
    with pytest.raises(ValueError, match="start_positions: expected None when packed"):
        model(**packed, start_positions=start, end_positions=end)


@pytest.fixture
def labels(ids: Tensor, mask: Tensor) -> Tensor:
    """Every third real token is to be predicted."""
    skipped = (torch.arange(ids.shape[1]) % 3 != 0) | (mask == 0)
    return ids.masked_fill(skipped, -100)


def test_masked_lm_loss_is_the_mean_over_labelled_tokens(
    model: NeoBERTForMaskedLM,
    ids: Tensor,
    mask: Tensor,
    packed: dict[str, Any],
    labels: Tensor,
    exact: dict,
    rounded: dict,
):
    chosen = labels != -100
    near, true = (F.cross_entropy(r["logits"][chosen], labels[chosen]) for r in (rounded, exact))
    assert_within_budget(model(ids, mask, labels=labels).loss, near, true)
    row = model(**packed, labels=labels[mask.bool()][None])
    assert_within_budget(row.loss, near, true)


def test_losses_are_float32_in_a_bfloat16_model(
    model: Any, ids: Tensor, mask: Tensor, labels: Tensor
):
    out = model.to(torch.bfloat16)(ids, mask, labels=labels)
    assert out.logits.dtype == torch.bfloat16
    assert out.loss.dtype == torch.float32
    chosen = labels != -100
    torch.testing.assert_close(
        out.loss, F.cross_entropy(out.logits[chosen].float(), labels[chosen])
    )


def test_no_label_at_all_is_no_loss(model: NeoBERTForMaskedLM, ids: Tensor, mask: Tensor):
    loss = model(ids, mask, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss == 0
    assert not any(p.grad is None or p.grad.any() for p in model.parameters())


def test_accumulated_losses_add_up_to_that_of_the_whole_batch(
    model: NeoBERTForMaskedLM, ids: Tensor, mask: Tensor, labels: Tensor
):
    items = (labels != -100).sum()
    parts = [
        model(ids[rows], mask[rows], labels=labels[rows], num_items_in_batch=items).loss
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(parts), model(ids, mask, labels=labels).loss)


@pytest.mark.parametrize(
    ("num_labels", "kind", "labels", "loss"),
    [
        (1, "regression", torch.randn(4), lambda x, y: F.mse_loss(x[:, 0], y)),
        (3, "single_label_classification", torch.tensor([0, 2, 1, 1]), F.cross_entropy),
        (
            3,
            "multi_label_classification",
            torch.eye(4)[:, :3],
            F.binary_cross_entropy_with_logits,
        ),
    ],
)
def test_the_labels_choose_the_problem_type(
    num_labels: int, kind: str, labels: Tensor, loss: Callable, ids: Tensor, mask: Tensor
):
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 200,
    }
    shape |= {"intermediate_size": 48, "num_labels": num_labels}
    config = NeoBERTConfig(**shape)
    model = NeoBERTForSequenceClassification(config).eval()
    out = model(ids, mask, labels=labels)
    torch.testing.assert_close(out.loss, loss(out.logits, labels))
    assert model.config.problem_type == kind
    count = labels.numel()
    halves = [
        model(ids[rows], mask[rows], labels=labels[rows], num_items_in_batch=count).loss
        for rows in (slice(0, 1), slice(1, 4))
    ]
    torch.testing.assert_close(sum(halves), out.loss)


def test_a_stated_problem_type_stands(
    classifier: NeoBERTForSequenceClassification, ids: Tensor, mask: Tensor
):
    classifier.config.problem_type = "regression"
    labels = torch.randn(4, 3)
    out = classifier(ids, mask, labels=labels)
    torch.testing.assert_close(out.loss, F.mse_loss(out.logits, labels))
    with pytest.raises(ValueError, match="labels: expected 12 values, got 4"):
        classifier(ids, mask, labels=torch.randn(4))


def test_only_the_classification_head_drops_out(
    classifier: NeoBERTForSequenceClassification, ids: Tensor, mask: Tensor
):
    still = classifier(ids, mask).logits
    classifier.train()
    assert not torch.allclose(classifier(ids, mask).logits, still)
    trained = classifier.model(ids, mask).last_hidden_state
    assert torch.equal(trained, classifier.eval().model(ids, mask).last_hidden_state)
    assert classifier.dropout.p == 0.1


@pytest.mark.parametrize("size", [200, 110])
def test_resized_vocabulary(
    size: int, folder: Path, tmp_path: Path, model: NeoBERTForMaskedLM, ids: Tensor, mask: Tensor
):
    ids = ids.clamp(max=109)
    before, shared = model(ids, mask).logits, min(size, Shape().vocab)
    model.resize_token_embeddings(size)
    after = model(ids, mask).logits
    assert after.shape[-1] == model.config.vocab_size == size
    assert model.model.encoder.weight.shape == model.decoder.weight.shape == (size, 48)
    assert model.decoder.bias.shape == (size,)
    torch.testing.assert_close(after[..., :shared], before[..., :shared])
    model.save_pretrained(tmp_path)
    again = NeoBERTForMaskedLM.from_pretrained(tmp_path)(ids, mask).logits
    assert torch.equal(again, after)
    encoder = NeoBERTModel.from_pretrained(folder)
    encoder.resize_token_embeddings(size)
    assert encoder.get_input_embeddings().weight.shape == (size, 48)


def test_embeddings_can_be_replaced(model: NeoBERTForMaskedLM):
    embeddings, decoder = torch.nn.Embedding(7, 48), torch.nn.Linear(48, 7)
    model.set_input_embeddings(embeddings)
    model.set_output_embeddings(decoder)
    assert model.get_input_embeddings() is model.model.encoder is embeddings
    assert model.get_output_embeddings() is model.decoder is decoder


@pytest.mark.parametrize("kind", [NeoBERTForMaskedLM, NeoBERTForSequenceClassification])
def test_initial_weights_are_uniform_in_the_ranges_of_the_config(kind: Any):
    model = kind(
        NeoBERTConfig(
            vocab_size=500,
            hidden_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=96,
            classifier_init_range=0.04,
            embedding_init_range=0.01,
            decoder_init_range=0.02,
        )
    )
    for name, tensor in model.state_dict().items():
        if "norm" in name:
            assert (tensor == 1).all(), name
        elif name.endswith("bias"):
            assert not tensor.any(), name
        else:
            bound = 0.01 if "encoder.weight" in name else 0.02
            bound = 0.04 if name.startswith(("dense", "classifier")) else bound
            assert tensor.abs().max() <= bound, name
            assert tensor.abs().max() > 0.95 * bound, name
            assert abs(tensor.std() / (bound / 3**0.5) - 1) < 0.2, name
