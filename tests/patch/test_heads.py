"""Every head of every family: logits, losses, gradients and training of the unpatched model."""

import copy

import pytest
import torch
from encoders import (
    ENCODERS,
    LENGTHS,
    head_cases,
    padded,
    randomized,
    widened,
    with_labels,
)
from parity import assert_same, assert_same_gradients
from torch.nn import functional as F

import neobert_kernels as nk

cases = pytest.mark.parametrize(("family", "kind"), head_cases())
per_token = [(family, kind) for family, kind in head_cases() if kind in ("mlm", "token")]
without_choices = [(family, kind) for family, kind in head_cases() if kind != "choice"]


def make(family, kind, **changes):
    if kind in ("sequence", "token"):
        changes["num_labels"] = 3
    return ENCODERS[family].head(kind, **changes)


def logits_of(output):
    """``[..., L]`` of any head."""
    if "start_logits" in output:
        return torch.stack([output.start_logits, output.end_logits], -1)
    return output.logits


def alone(model, ids, mask):
    """What the model says of each document by itself: ``[T, L]``, or ``[B, L]`` per document."""
    outputs = []
    for row, real in zip(ids, mask == 1, strict=True):
        inputs = {"input_ids": row[None, real]}
        if model.config.model_type == "bert":  # a token's position is its column, padding included
            inputs["position_ids"] = real.nonzero().T
        outputs.append(logits_of(model(**inputs)))
    return torch.cat([out[0] if out.ndim == 3 else out for out in outputs])


def references(model, ids, mask):
    """`alone` in float64 and in float32."""
    return alone(copy.deepcopy(model).double(), ids, mask), alone(model, ids, mask)


@pytest.mark.parametrize(("family", "kind"), without_choices)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_logits_are_those_of_each_document_alone(family, kind, side, supports):
    supports(family, kind, "padded")
    model = randomized(make(family, kind)).eval()
    ids, mask = padded(family, side=side)
    exact, rounded = references(model, ids, mask)
    nk.patch(model)
    out = logits_of(model(input_ids=ids, attention_mask=mask))
    if out.ndim == 3:
        padding = out[mask == 0]
        lowest = torch.finfo(out.dtype).min
        assert (padding == (lowest if kind == "question" else 0)).all()
        out = out[mask == 1]
    assert_same(out, rounded, exact)


@pytest.mark.parametrize(("family", "kind"), without_choices)
def test_packed_logits_are_those_of_each_document_alone(family, kind, supports):
    supports(family, kind, "packed")
    model = randomized(make(family, kind)).eval()
    ids, mask = padded(family)
    exact, rounded = references(model, ids, mask)
    nk.patch(model)
    packing = nk.unpad(mask)
    lengths = {"cu_seq_lens_q": packing.cu_seqlens, "max_length_q": packing.max_seqlen}
    out = logits_of(model(input_ids=packing.pack(ids)[None], **lengths))
    assert_same(out[0] if out.ndim == 3 else out, rounded, exact)


@pytest.mark.parametrize("family", [f for f, e in ENCODERS.items() if e.has("choice")])
def test_choices_are_scored_as_by_the_unpatched_model(family, supports):
    supports(family, "choice", "padded")
    model = randomized(ENCODERS[family].head("choice")).eval()
    inputs = with_labels("choice", *padded(family))
    exact = copy.deepcopy(model).double()(**inputs)
    rounded = model(**inputs)
    nk.patch(model)
    out = model(**inputs)
    assert_same(out.logits, rounded.logits, exact.logits)
    assert_same(out.loss, rounded.loss, exact.loss, "loss")
    with pytest.raises(ValueError, match="input_ids: expected 3 dimensions"):
        model(input_ids=inputs["input_ids"][0])


@cases
def test_loss_and_every_gradient(family, kind, supports):
    """Also with gradient checkpointing."""
    supports(family, kind, "train")
    model = make(family, kind).train()  # as initialized: saturated softmaxes would amplify rounding
    # A span's loss is taken over the row: without padding both models have the same rows.
    lengths = (9, 9, 9, 9) if kind == "question" else LENGTHS
    inputs = with_labels(kind, *padded(family, lengths))
    exact, rounded, checkpointed = widened(model), copy.deepcopy(model), copy.deepcopy(model)
    checkpointed.gradient_checkpointing_enable()
    nk.patch(model)
    nk.patch(checkpointed)
    losses = []
    for each in (model, rounded, exact, checkpointed):
        loss = each(**inputs).loss
        loss.backward()
        losses.append(loss)
    assert_same(*losses[:3], "loss")
    assert_same(losses[3], *losses[1:3], "loss")
    assert_same_gradients(model, rounded, exact)
    assert_same_gradients(checkpointed, rounded, exact)


@cases
def test_training_steps_follow_the_unpatched_model(family, kind, supports):
    """Fifty with one head; what a head adds shows in a few."""
    supports(family, kind, "train")
    model = make(family, kind).train()
    plain = copy.deepcopy(model)
    nk.patch(model)
    lengths = (9, 9, 9, 9) if kind == "question" else LENGTHS
    curves = []
    for each in (model, plain):
        torch.manual_seed(1)
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-3)
        losses = []
        for _ in range(50 if kind == "mlm" else 5):
            loss = each(**with_labels(kind, *padded(family, lengths))).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(torch.tensor(losses))
    # Both curves are float32 rounding apart at step 0 and training amplifies it; a wrong gradient
    # shows as a drift of percents.
    torch.testing.assert_close(curves[0], curves[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("family", [f for f, e in ENCODERS.items() if e.has("question")])
def test_a_spans_loss_does_not_depend_on_padding(family):
    model = randomized(ENCODERS[family].head("question")).eval()
    ids, mask = padded(family)
    inputs = with_labels("question", ids, mask)
    spans = alone(copy.deepcopy(model).double(), ids, mask).split(list(LENGTHS))
    ends = ("start_positions", "end_positions")
    losses = [
        F.cross_entropy(span[None, :, i], inputs[end][row : row + 1])
        for row, span in enumerate(spans)
        for i, end in enumerate(ends)
    ]
    nk.patch(model)
    torch.testing.assert_close(model(**inputs).loss, torch.stack(losses).mean().float())
    packing = nk.unpad(mask)
    lengths = {"cu_seq_lens_q": packing.cu_seqlens, "max_length_q": packing.max_seqlen}
    with pytest.raises(ValueError, match="start_positions: expected None when packed"):
        model(
            input_ids=packing.pack(ids)[None],
            start_positions=inputs[ends[0]],
            end_positions=inputs[ends[1]],
            **lengths,
        )


@cases
def test_compiled_logits_are_those_of_the_patched_model(family, kind, supports):
    supports(family, kind, "compile")
    # Few layers, one shape, captured only: the base model's test has the rest.
    model = randomized(make(family, kind, num_hidden_layers=2)).eval()
    nk.patch(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    inputs = with_labels(kind, *padded(family))
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        expected, actual = logits_of(model(**inputs)), logits_of(compiled(**inputs))
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("family", "kind"), per_token)
def test_packed_output_on_request(family, kind):
    model = randomized(make(family, kind)).eval()
    ids, mask = padded(family)
    inputs = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True}
    with nk.patched(model):
        laid_out = model(**inputs)
    with nk.patched(model, packed_output=True):
        packed = model(**inputs)
    assert torch.equal(packed.logits[0], laid_out.logits[mask == 1])
    for a, b in zip(packed.hidden_states, laid_out.hidden_states, strict=True):
        assert torch.equal(a[0], b[mask == 1])


mlm = pytest.mark.parametrize("family", [f for f, e in ENCODERS.items() if e.has("mlm")])


@mlm
def test_masked_lm_returns_logits_as_asked(family):
    model = ENCODERS[family].head("mlm")
    inputs = with_labels("mlm", *padded(family))
    plain = model.eval()(**inputs)
    for option, training, expected in [
        (None, True, False), (None, False, True), (True, True, True), (False, False, False),
    ]:  # fmt: skip
        with nk.patched(model, mlm_logits=option):
            out = model.train(training)(**inputs)
            assert (out.logits is not None) == expected
            torch.testing.assert_close(out.loss, plain.loss)
            assert model(inputs["input_ids"]).logits is not None


@mlm
def test_labelled_rows_only_changes_no_gradient(family):
    model = ENCODERS[family].head("mlm").train()
    inputs = with_labels("mlm", *padded(family))
    exact, rounded = widened(model), copy.deepcopy(model)
    nk.patch(model, labelled_rows_only=True)
    losses = []
    for each in (model, rounded, exact):
        losses.append(each(**inputs).loss)
        losses[-1].backward()
    assert_same(*losses, "loss")
    assert_same_gradients(model, rounded, exact)
    states = model(**inputs, output_hidden_states=True).hidden_states
    assert [s.shape[:2] for s in states] == [inputs["input_ids"].shape] * 4


@mlm
def test_rows_that_the_collator_knows_change_nothing(family):
    model = ENCODERS[family].head("mlm").train()
    inputs = with_labels("mlm", *padded(family))
    packing = nk.unpad(inputs["attention_mask"])
    packed = {name: packing.pack(inputs[name])[None] for name in ("input_ids", "labels")}
    packed |= {"cu_seq_lens_q": packing.cu_seqlens, "max_length_q": packing.max_seqlen}
    rows = (packed["labels"][0] != -100).nonzero().squeeze(1)
    nk.patch(model)
    expected = model(**packed).loss
    assert torch.equal(model(**packed, labelled_rows=rows).loss, expected)
    with pytest.raises(ValueError, match="labelled_rows: expected the indices of all labelled tok"):
        model(**packed, labelled_rows=rows[1:])
    with pytest.raises(ValueError, match="labelled_rows: expected None unless the input is packed"):
        model(**inputs, labelled_rows=rows)


@mlm
def test_the_trainers_item_count_is_used_where_the_unpatched_model_uses_it(family):
    model = ENCODERS[family].head("mlm").train()
    inputs = with_labels("mlm", *padded(family)) | {"num_items_in_batch": torch.tensor(40)}
    expected = model(**inputs).loss
    for logits in (True, False):
        with nk.patched(model, mlm_logits=logits):
            torch.testing.assert_close(model(**inputs).loss, expected)


@mlm
def test_a_loss_of_the_users_own_is_called(family):
    model = ENCODERS[family].head("mlm").train()
    inputs = with_labels("mlm", *padded(family))
    model.loss_function = lambda logits, labels, **_: (logits * 0).sum() + 7
    expected = model(**inputs).loss  # transformers' older heads do not call it
    with nk.patched(model):
        torch.testing.assert_close(model(**inputs).loss, expected)


@pytest.mark.parametrize(("family", "kind"), [c for c in head_cases() if c[1] == "sequence"])
def test_every_kind_of_problem(family, kind):
    for problem, labels in [
        ("regression", torch.randn(4)),
        ("multi_label_classification", torch.rand(4, 3).round()),
    ]:
        one = problem == "regression"
        model = ENCODERS[family].head(kind, num_labels=1 if one else 3).eval()
        ids, mask = padded(family)
        inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        expected = model(**inputs).loss
        assert model.config.problem_type == problem
        model.config.problem_type = None
        with nk.patched(model):
            torch.testing.assert_close(model(**inputs).loss, expected)
            assert model.config.problem_type == problem
            with pytest.raises(ValueError, match=r"labels: expected one per document .4., got 3"):
                model(input_ids=ids, attention_mask=mask, labels=labels[:3])
            if one and family != "neobert":  # torch would broadcast
                with pytest.raises(ValueError, match="labels: expected 4 values, got 8"):
                    model(input_ids=ids, attention_mask=mask, labels=torch.zeros(4, 2))


@mlm
def test_a_decoder_that_is_more_than_a_linear_is_called(family):
    model = ENCODERS[family].head("mlm").train()
    inputs = with_labels("mlm", *padded(family))
    decoder = model.get_output_embeddings()
    decoder.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    expected = model(**inputs).loss
    with nk.patched(model):
        torch.testing.assert_close(model(**inputs).loss, expected)
    with (
        nk.patched(model, mlm_logits=False),
        pytest.raises(ValueError, match="mlm_logits: expected True or None where the decoder is"),
    ):
        model(**inputs)
    with nk.patched(model), pytest.raises(ValueError, match="labels: expected shape"):
        model(**inputs | {"labels": inputs["labels"][:, :3]})


@pytest.mark.parametrize("family", [f for f, e in ENCODERS.items() if e.has("question")])
def test_spans_under_autocast_and_targets_at_padding(family):
    model = ENCODERS[family].head("question").eval()
    ids, mask = padded(family)
    inputs = with_labels("question", ids, mask)
    with nk.patched(model):
        plain = model(**inputs).loss
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(model(**inputs).loss.float(), plain, rtol=0.05, atol=0)
        inputs["start_positions"][1] = inputs["end_positions"][1] = LENGTHS[1] + 2  # padding
        keep = [0, 2, 3]
        expected = model(**{name: value[keep] for name, value in inputs.items()}).loss
        torch.testing.assert_close(model(**inputs).loss, expected)
