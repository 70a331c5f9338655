"""ModernBERT: windows, thetas, pooling, sparse predictions, and what is refused."""

import copy

import pytest
import torch
from encoders import ENCODERS, LENGTHS, padded, randomized, widened, with_labels
from parity import assert_same, assert_same_gradients
from torch import nn

import neobert_kernels as nk

ENCODER = ENCODERS["modernbert"]
FULL, SLIDING = "full_attention", "sliding_attention"


def thetas(full, sliding):
    return {
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": full},
            SLIDING: {"rope_type": "default", "rope_theta": sliding},
        }
    }


VARIANTS = {
    "biases everywhere": {"norm_bias": True, "attention_bias": True, "mlp_bias": True},
    "irregular layers": {
        "num_hidden_layers": 4,
        "layer_types": [SLIDING, SLIDING, FULL, SLIDING],
    },
    "two layers": {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL]},
    "thetas far apart": thetas(3e6, 5.0),
    "thetas of the old config": {"global_rope_theta": 20.0, "local_rope_theta": 5e5},
    "Ettin, mmBERT": thetas(160e3, 160e3)
    | {"hidden_size": 56, "num_attention_heads": 7, "intermediate_size": 120},
    "a window of one token": {"local_attention": 0},
    "an odd window": {"local_attention": 7},
}


@pytest.fixture(params=VARIANTS)
def variant(request):
    return VARIANTS[request.param]


def outputs(model, ids, mask):
    """The last hidden state and all others, at real tokens."""
    out = model(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    return torch.stack([out.last_hidden_state, *out.hidden_states])[:, mask == 1]


@pytest.mark.parametrize("side", ["right", "left"])
def test_every_shape_of_the_family_equals_the_unpatched_model(variant, side):
    model = randomized(ENCODER.base(**variant)).eval()
    ids, mask = padded("modernbert", side=side)
    exact = outputs(copy.deepcopy(model).double(), ids, mask)
    rounded = outputs(model, ids, mask)
    nk.patch(model)
    actual = outputs(model, ids, mask)
    for each in zip(actual, rounded, exact, strict=True):
        assert_same(*each)


def test_every_gradient_of_every_shape_of_the_family(variant):
    model = ENCODER.head("mlm", decoder_bias=False, classifier_bias=True, **variant).train()
    inputs = with_labels("mlm", *padded("modernbert"))
    exact, rounded = widened(model), copy.deepcopy(model)
    nk.patch(model)
    losses = []
    for each in (model, rounded, exact):
        losses.append(each(**inputs).loss)
        losses[-1].backward()
    assert_same(*losses, "loss")
    assert_same_gradients(model, rounded, exact)


@pytest.mark.parametrize("local_attention", [0, 2, 4, 7])
def test_a_token_reaches_as_far_as_the_window_and_no_further(local_attention):
    model = randomized(ENCODER.base(local_attention=local_attention)).eval()
    model.layers = model.layers[1:2]  # one sliding layer; some versions make no such config
    nk.patch(model)
    ids = torch.randint(2, 97, (1, 19))
    before = model(ids).last_hidden_state[0]
    ids[0, 9] += 1
    changed = (model(ids).last_hidden_state[0] != before).any(1).nonzero().squeeze(1)
    radius = local_attention // 2
    assert changed.tolist() == list(range(9 - radius, 10 + radius))


def test_a_window_counts_real_tokens_where_padding_is_inside_a_document():
    model = randomized(ENCODER.base()).eval()
    ids, mask = padded("modernbert")
    mask[2, [3, 4, 9]] = 0
    columns = mask[2].nonzero().T
    alone = {"input_ids": ids[2, columns], "position_ids": columns}
    exact = copy.deepcopy(model).double()(**alone).last_hidden_state[0]
    rounded = model(**alone).last_hidden_state[0]
    nk.patch(model)
    out = model(input_ids=ids, attention_mask=mask).last_hidden_state[2, columns[0]]
    assert_same(out, rounded, exact)


@pytest.mark.parametrize(("equal", "expected"), [(True, 1), (False, 2)])
def test_one_table_of_angles_for_each_theta(equal, expected, monkeypatch):
    calls, table = [], nk.rope_table
    monkeypatch.setattr(nk, "rope_table", lambda *args: calls.append(args) or table(*args))
    model = ENCODER.base(**thetas(1e4, 1e4 if equal else 1e5))
    nk.patch(model)
    model(torch.ones(2, 5, dtype=torch.long))
    assert len(calls) == expected


@pytest.mark.parametrize("kind", ["sequence", "choice"])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_pooling_is_that_of_the_unpatched_model(kind, pooling):
    model = randomized(ENCODER.head(kind, classifier_pooling=pooling)).eval()
    inputs = with_labels(kind, *padded("modernbert"))
    inputs["labels"] %= 2
    exact, rounded = copy.deepcopy(model).double()(**inputs), model(**inputs)
    nk.patch(model)
    out = model(**inputs)
    assert_same(out.logits, rounded.logits, exact.logits)
    assert_same(out.loss, rounded.loss, exact.loss, "loss")


def test_an_unknown_pooling_is_named():
    model = ENCODER.head("sequence")
    model.config.__dict__["classifier_pooling"] = "max"
    nk.patch(model)
    with pytest.raises(ValueError, match=r"pooling: expected 'cls' or 'mean', got 'max'"):
        model(torch.ones(2, 5, dtype=torch.long))


@pytest.mark.parametrize("ignored", [-100, -1])
@pytest.mark.parametrize("items", [None, 40])
def test_sparse_predictions_are_those_of_the_unpatched_model(ignored, items):
    changes = {"sparse_prediction": True, "sparse_pred_ignore_index": ignored}
    model = randomized(ENCODER.head("mlm", **changes)).eval()
    inputs = with_labels("mlm", *padded("modernbert"))
    labels = inputs["labels"]
    labels[labels == -100] = ignored
    labels[0, 1] = -100  # read by the loss, whatever is left out of the logits
    if items is not None:
        inputs["num_items_in_batch"] = items
    exact, rounded = widened(model)(**inputs), model(**inputs)
    with nk.patched(model):
        out = model(**inputs)
        assert_same(out.logits, rounded.logits, exact.logits)
        assert_same(out.loss, rounded.loss, exact.loss, "loss")
        plain = model(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        assert plain.logits.shape[:2] == labels.shape
    with nk.patched(model.train(), labelled_rows_only=True):
        out = model(**inputs)
        assert out.logits is None
        assert_same(out.loss, rounded.loss, exact.loss, "loss")


def test_a_questions_loss_is_the_models_own():
    model = ENCODER.head("question").eval()
    inputs = with_labels("question", *padded("modernbert", (9, 9, 9, 9)))
    expected = model(**inputs, num_items_in_batch=7).loss
    model.loss_function = lambda start, end, *_, **__: (start.sum() + end.sum()) * 0 + 7
    with nk.patched(model):
        assert model(**inputs).loss == 7
        del model._loss_function
        torch.testing.assert_close(model(**inputs, num_items_in_batch=7).loss, expected)


@pytest.mark.parametrize(
    "where", ["embeddings.drop", "layers.0.attn.out_drop", "layers.1.mlp.drop"]
)
def test_every_dropout_of_hidden_states_is_kept(where):
    ids, _ = padded("modernbert")
    model = randomized(ENCODER.base()).train()
    nk.patch(model)
    assert torch.equal(model(ids)[0], model(ids)[0])
    parent, _, name = where.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.Dropout(0.5))
    assert not torch.equal(model(ids)[0], model(ids)[0])


@pytest.mark.parametrize("kind", ["sequence", "token", "question", "choice"])
def test_dropout_before_the_classifier_is_kept(kind):
    changes = {"num_labels": 3} if kind in ("sequence", "token") else {}
    model = ENCODER.head(kind, classifier_dropout=0.5, **changes).train()
    inputs = with_labels(kind, *padded("modernbert"))
    nk.patch(model)
    assert not torch.equal(model(**inputs)[1], model(**inputs)[1])


def test_attention_dropout_is_refused_in_training():
    model = ENCODER.base(attention_dropout=0.1).train()
    nk.patch(model)
    with pytest.raises(ValueError, match=r"attention dropout: expected 0 .* got 0.1"):
        model(torch.ones(2, 5, dtype=torch.long))
    model.eval()(torch.ones(2, 5, dtype=torch.long))


def test_bfloat16():
    model = randomized(ENCODER.base()).to(torch.bfloat16).eval()
    ids, mask = padded("modernbert", (*LENGTHS, 40))
    wide = ENCODER.base().double().eval()  # its angles were never rounded
    wide.load_state_dict(model.state_dict())
    exact, rounded = outputs(wide, ids, mask), outputs(model, ids, mask)
    nk.patch(model)
    assert_same(outputs(model, ids, mask), rounded, exact)


def changed(path, value):
    def make():
        model = ENCODER.base()
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, value)
        return model

    return make


def with_theta():
    model = ENCODER.base()
    model.config.rope_parameters[SLIDING]["rope_theta"] = 20_000.0
    return model


def with_window():
    model = ENCODER.base()
    model.config.sliding_window = 5
    return model


def with_hook():
    model = ENCODER.base()
    model.layers[2].attn.register_forward_hook(lambda *_: None)
    return model


def scaled():
    parameters = thetas(1e4, 1e4)
    parameters["rope_parameters"][FULL] |= {"rope_type": "linear", "factor": 2.0}
    return ENCODER.base(**parameters)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ENCODER.base(hidden_activation="gelu_new"),
            "layers.0.mlp.act to be GELUActivation, got NewGELU",
        ),
        (
            lambda: ENCODER.base(hidden_activation="silu"),
            "layers.0.mlp.act to be GELUActivation, got SiLU",
        ),
        (scaled, "default RoPE in full_attention, got rope_type 'linear'"),
        (with_theta, r"sliding_attention_inv_freq to be that of .* .20000.0., got other"),
        (with_window, "layers.1.attn.sliding_window to be 6, as its config says, got 3"),
        (changed("layers.0.attn.sliding_window", 3), "sliding_window to be None, .* got 3"),
        (changed("layers.2.attention_type", "chunked"), "'full_attention', got 'chunked'"),
        (changed("layers.1.attn_norm", nn.RMSNorm(48)), "layers.1.attn_norm to be LayerNorm"),
        (changed("final_norm", nn.RMSNorm(48)), "final_norm to be LayerNorm, got RMSNorm"),
        (changed("layers.1.attn", nn.Linear(48, 48)), "layers.1.attn to be ModernBertAttention"),
        (changed("layers.1.mlp", nn.Linear(48, 48)), "layers.1.mlp to be ModernBertMLP"),
        (with_hook, "layers.2.attn without hooks"),
    ],
)
def test_what_is_not_understood_is_named_and_left_alone(make, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        nk.patch(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_models_cast_to_half_and_back_are_patched():
    model = ENCODER.base(**thetas(1e6, 1e4)).half().float()
    assert nk.patch(model).families == {"": "modernbert"}
