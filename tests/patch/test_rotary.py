"""NomicBERT and EuroBERT: what their configs can say beyond the tests of every family."""

import copy

import pytest
import torch
from encoders import ENCODERS, LENGTHS, padded, randomized, widened, with_labels
from parity import assert_same, assert_same_gradients
from torch import nn
from transformers import NomicBertModel

import neobert_kernels as nk


def rope(kind="default", theta=37.0):
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, "factor": 2.0}}


CONFIGS = {
    "a key head for each query head": ("eurobert", {"num_key_value_heads": 3}),
    "biases": ("eurobert", {"attention_bias": True, "mlp_bias": True}),
    "larger heads": ("eurobert", {"head_dim": 24}),
    "smaller heads": ("nomic_bert", {"head_dim": 8}),
    "theta of EuroBERT": ("eurobert", rope()),
    "theta of NomicBERT": ("nomic_bert", rope()),
}
both = pytest.mark.parametrize("family", ["nomic_bert", "eurobert"])


def last(model, ids, mask, **more):
    return model(input_ids=ids, attention_mask=mask, **more).last_hidden_state[mask == 1]


@pytest.mark.parametrize(("family", "changes"), CONFIGS.values(), ids=CONFIGS)
def test_what_the_config_says_is_computed(family, changes):
    model = randomized(ENCODERS[family].base(**changes)).eval()
    ids, mask = padded(family)
    exact, rounded = last(widened(model), ids, mask), last(model, ids, mask)
    assert nk.patch(model).families == {"": family}
    assert_same(last(model, ids, mask), rounded, exact)


@pytest.mark.parametrize(("family", "changes"), CONFIGS.values(), ids=CONFIGS)
def test_what_the_config_says_is_trained(family, changes):
    model = ENCODERS[family].head("mlm", **changes).train()
    inputs = with_labels("mlm", *padded(family))
    exact, rounded = widened(model), copy.deepcopy(model)
    nk.patch(model)
    losses = [each(**inputs).loss for each in (model, rounded, exact)]
    for loss in losses:
        loss.backward()
    assert_same(*losses, "loss")
    assert_same_gradients(model, rounded, exact)


@both
def test_only_as_many_layers_run_as_the_config_says(family):
    model = randomized(ENCODERS[family].base()).eval()
    model.config.num_hidden_layers = 2
    ids, mask = padded(family)
    exact, rounded = last(widened(model), ids, mask), last(model, ids, mask)
    report = nk.patch(model)
    assert [entry.name for entry in report.replaced] == ["", "layers.0", "layers.1"]
    assert_same(last(model, ids, mask), rounded, exact)


@pytest.mark.parametrize("side", ["right", "left"])
def test_token_types_of_nomic_bert(side):
    model = randomized(ENCODERS["nomic_bert"].base()).eval()
    ids, mask = padded("nomic_bert", side=side)
    types = {"token_type_ids": ids % 2}
    exact, rounded = last(widened(model), ids, mask, **types), last(model, ids, mask, **types)
    nk.patch(model)
    assert_same(last(model, ids, mask, **types), rounded, exact)
    assert not torch.equal(last(model, ids, mask, **types), last(model, ids, mask))


def test_the_pooler_of_nomic_bert():
    config = ENCODERS["nomic_bert"].config()
    model = randomized(NomicBertModel(config, add_pooling_layer=True)).eval()
    ids, mask = padded("nomic_bert")
    inputs = {"input_ids": ids, "attention_mask": mask}
    exact, rounded = widened(model)(**inputs).pooler_output, model(**inputs).pooler_output
    nk.patch(model)
    assert_same(model(**inputs).pooler_output, rounded, exact)
    plain = ENCODERS["nomic_bert"].base()
    nk.patch(plain)
    assert plain(**inputs).pooler_output is None


@pytest.mark.parametrize("name", ["embeddings.dropout", *(
    f"layers.1.{where}" for where in ("post_attention_dropout", "post_mlp_dropout")
)])  # fmt: skip
def test_every_dropout_of_nomic_bert_is_kept(name):
    ids, mask = padded("nomic_bert")
    model = randomized(ENCODERS["nomic_bert"].base()).train()
    nk.patch(model)
    assert torch.equal(last(model, ids, mask), last(model, ids, mask))
    model.get_submodule(name).p = 0.5
    assert not torch.equal(last(model, ids, mask), last(model, ids, mask))


@pytest.mark.parametrize("pooling", ["bos", "mean", "late"])
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
@pytest.mark.parametrize("labels", [1, 3])
def test_every_pooling_of_eurobert(pooling, layout, labels):
    changes = {"classifier_pooling": pooling, "num_labels": labels}
    model = randomized(ENCODERS["eurobert"].head("sequence", **changes)).eval()
    ids, mask = padded("eurobert", side="left" if layout == "left" else "right")

    def alone(each):
        rows = zip(ids, mask == 1, strict=True)
        return torch.cat([each(input_ids=row[None, real]).logits for row, real in rows])

    exact, rounded = alone(widened(model)), alone(model)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if layout == "packed":
        packing = nk.unpad(mask)
        inputs = {"input_ids": packing.pack(ids)[None], "cu_seq_lens_q": packing.cu_seqlens}
        inputs["max_length_q"] = packing.max_seqlen
    nk.patch(model)
    out = model(**inputs).logits
    assert out.shape == (len(LENGTHS), labels)
    assert_same(out, rounded, exact)


@pytest.mark.parametrize("pooling", ["bos", "mean", "late"])
def test_every_pooling_of_eurobert_is_trained(pooling):
    changes = {"classifier_pooling": pooling, "num_labels": 3}
    model = ENCODERS["eurobert"].head("sequence", **changes).train()
    inputs = with_labels("sequence", *padded("eurobert"))
    exact, rounded = widened(model), copy.deepcopy(model)
    nk.patch(model)
    for each in (model, rounded, exact):
        each(**inputs).loss.backward()
    assert_same_gradients(model, rounded, exact)


def test_an_unknown_pooling_is_named():
    model = ENCODERS["eurobert"].head("sequence")
    nk.patch(model)
    model.classifier_pooling = "max"
    with pytest.raises(ValueError, match=r"classifier_pooling: expected 'bos', 'mean' or 'late', "):
        model(*padded("eurobert"))


@both
def test_bfloat16(family):
    """Against the float32 model on the same weights: no farther off than the unpatched model."""
    model = randomized(ENCODERS[family].base()).eval().bfloat16()
    ids, mask = padded(family)
    exact = last(copy.deepcopy(model).float(), ids, mask)
    plain = last(model, ids, mask)
    nk.patch(model)
    out = last(model, ids, mask)
    assert out.dtype == torch.bfloat16
    errors = [(x.float() - exact).norm() for x in (out, plain)]
    assert errors[0] <= 1.5 * errors[1]
    model.train()
    last(model, ids, mask).float().square().mean().backward()
    assert all(p.grad.isfinite().all() for n, p in model.named_parameters() if "pooler" not in n)


@both
def test_attention_dropout_is_refused_in_training(family):
    name = "attention_dropout" if family == "eurobert" else "attention_probs_dropout_prob"
    model = ENCODERS[family].base(**{name: 0.1}).train()
    nk.patch(model)
    with pytest.raises(ValueError, match=r"attention dropout: expected 0 .* got 0.1"):
        model(*padded(family))
    model.eval()(*padded(family))


def swapped(part, other):
    def change(model):
        model.set_submodule(part, other)

    return change


def hooked(part):
    def change(model):
        model.get_submodule(part).register_forward_hook(lambda *_: None)

    return change


@both
@pytest.mark.parametrize(
    ("changes", "spoil", "message"),
    [
        ({"hidden_act": "gelu"}, None, r"hidden_act 'silu' in layers.0 .*got 'gelu'"),
        (rope("linear"), None, r"model: expected the rope type 'default' .*, got 'linear'"),
        ({}, swapped("layers.1.mlp", nn.Identity()), r"layers.1.mlp to be \w+MLP, got Identity"),
        ({}, swapped("rotary_emb", nn.Identity()), r"rotary_emb to be \w+, got Identity"),
        ({}, hooked("layers.2.mlp.act_fn"), r"layers.2.mlp.act_fn without hooks"),
        ({}, hooked("layers.2.self_attn"), r"layers.2.self_attn without hooks"),
        (
            {},
            swapped("layers.0.post_attention_layernorm", nn.RMSNorm(48)),
            r"layers.0.post_attention_layernorm to be \w+, got RMSNorm",
        ),
    ],
)
def test_what_is_not_understood_is_refused(family, changes, spoil, message):
    model = ENCODERS[family].base(**changes)
    if spoil:
        spoil(model)
    with pytest.raises(ValueError, match=message):
        nk.patch(model)
    assert all("forward" not in vars(module) for module in model.modules())
