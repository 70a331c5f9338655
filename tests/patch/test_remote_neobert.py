"""patch on NeoBERT's published classes, as a user has them after loading remote code."""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from encoders import LENGTHS, padded, randomized
from parity import assert_same, assert_same_gradients
from torch import nn

import neobert_kernels as nk

SOURCE = Path(__file__).parents[1] / "remote_neobert.py"
MODULE = "transformers_modules.stand_in.model"
KINDS = ("NeoBERT", "NeoBERTLMHead", "NeoBERTForSequenceClassification")
kinds = pytest.mark.parametrize("kind", KINDS)


def load(name):
    spec = importlib.util.spec_from_file_location(name, SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def remote():
    yield load(MODULE)
    del sys.modules[MODULE]


def fresh(remote, kind, **changes):
    changes |= {"num_labels": 3} if kind == KINDS[2] else {}
    return getattr(remote, kind)(remote.NeoBERTConfig(**changes))


def make(remote, kind, **changes):
    return randomized(fresh(remote, kind, **changes)).eval()


def result(model, **inputs):
    out = model(**inputs)
    return out.last_hidden_state if "last_hidden_state" in out else out.logits


def packed(ids, mask):
    packing = nk.unpad(mask)
    inputs = {"input_ids": packing.pack(ids)[None]}
    return inputs | {"cu_seqlens": packing.cu_seqlens, "max_seqlen": packing.max_seqlen}


@pytest.mark.parametrize(
    ("kind", "side"),  # the published classifier pools column 0, which is padding on the left
    [*((kind, "right") for kind in KINDS), *((kind, "left") for kind in KINDS[:2])],
)
def test_padded_batches(remote, kind, side):
    model = make(remote, kind)
    ids, mask = padded("neobert", side=side)
    inputs = {"input_ids": ids, "attention_mask": mask}
    exact, rounded = result(copy.deepcopy(model).double(), **inputs), result(model, **inputs)
    report = nk.patch(model)
    assert list(report.families.values()) == ["neobert_remote"]
    out = result(model, **inputs)
    if out.ndim == 3:
        out, rounded, exact = (x[mask == 1] for x in (out, rounded, exact))
    assert_same(out, rounded, exact)


@kinds
def test_without_a_mask(remote, kind):
    model = make(remote, kind)
    ids = torch.randint(2, 97, (3, 11))
    exact = result(copy.deepcopy(model).double(), input_ids=ids)
    rounded = result(model, input_ids=ids)
    nk.patch(model)
    assert_same(result(model, input_ids=ids), rounded, exact)
    assert torch.equal(result(model, input_ids=ids, attention_mask=None), model(ids)[0])


@pytest.mark.parametrize("kind", KINDS[:2])
def test_packed_documents(remote, kind):
    model = make(remote, kind)
    inputs = packed(*padded("neobert"))
    exact, rounded = result(copy.deepcopy(model).double(), **inputs), result(model, **inputs)
    nk.patch(model)
    assert_same(result(model, **inputs), rounded, exact)
    ids, positions = inputs["input_ids"], torch.cat([torch.arange(n) for n in LENGTHS])[None]
    by_order = model(ids, positions, inputs["max_seqlen"], inputs["cu_seqlens"])[0]
    assert_same(by_order, rounded, exact)


def test_packed_classification_gives_a_row_per_document(remote):
    model = make(remote, KINDS[2])
    ids, mask = padded("neobert")
    rows = {"input_ids": ids, "attention_mask": mask}
    exact, rounded = result(copy.deepcopy(model).double(), **rows), result(model, **rows)
    nk.patch(model)
    assert_same(result(model, **packed(ids, mask)), rounded, exact)


def test_hidden_states_are_the_published_ones(remote):
    model = make(remote, "NeoBERT")
    ids, mask = padded("neobert")
    inputs = {"input_ids": ids, "attention_mask": mask, "output_hidden_states": True}
    exact = copy.deepcopy(model).double()(**inputs).hidden_states
    rounded = model(**inputs).hidden_states
    nk.patch(model)
    states = model(**inputs).hidden_states
    assert len(states) == len(rounded) == 3
    for a, r, e in zip(states, rounded, exact, strict=True):
        assert_same(a[mask == 1], r[mask == 1], e[mask == 1])
    assert model(**(inputs | {"output_hidden_states": False})).hidden_states is None


def test_eps_is_that_of_each_norm(remote):
    model = fresh(remote, "NeoBERT").eval()  # mean squares near 1, beside which eps shows
    for i, norm in enumerate(m for m in model.modules() if isinstance(m, nn.RMSNorm)):
        norm.eps = 0.1 * (i + 1)
    ids, _ = padded("neobert")
    exact, rounded = (
        result(copy.deepcopy(model).double(), input_ids=ids),
        result(model, input_ids=ids),
    )
    nk.patch(model)
    assert_same(result(model, input_ids=ids), rounded, exact)


@kinds
def test_every_gradient(remote, kind):
    model = fresh(remote, kind).train()  # saturated softmaxes would amplify rounding
    ids, mask = padded("neobert")
    inputs = {"input_ids": ids, "attention_mask": mask}
    exact, rounded = copy.deepcopy(model).double(), copy.deepcopy(model)
    nk.patch(model)
    weights = None
    for each in (model, rounded, exact):
        out = result(each, **inputs)
        out = out[mask == 1] if out.ndim == 3 else out
        weights = torch.randn(out.shape) if weights is None else weights
        (out * weights).sum().backward()
    assert_same_gradients(model, rounded, exact)


def test_losses(remote):
    """Classification as published; the published LM head has none, the patched one takes labels."""
    ids, mask = padded("neobert")
    inputs = {"input_ids": ids, "attention_mask": mask}
    model = make(remote, KINDS[2])
    labels = torch.tensor([0, 2, 1, 1])
    expected = model(**inputs, labels=labels).loss
    nk.patch(model)
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected)
    model = make(remote, KINDS[1])
    labels = torch.where(mask == 1, ids, -100)
    expected = nn.functional.cross_entropy(model(**inputs).logits.flatten(0, 1), labels.flatten())
    nk.patch(model)
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected)


def test_classifier_dropout_is_kept_in_both_places(remote):
    model = make(remote, KINDS[2], classifier_dropout=0.5)
    ids, _ = padded("neobert")
    nk.patch(model)
    assert torch.equal(model(ids).logits, model(ids).logits)
    seen = []
    model.dropout.register_forward_hook(lambda _, args, out: seen.append(args[0].shape))
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)
    assert seen == 4 * [(4, 48)]


@kinds
def test_unpatching_restores_the_class(remote, kind):
    model = make(remote, kind)
    ids, _ = padded("neobert")
    before = result(model, input_ids=ids)
    keys = {name: vars(module).keys() for name, module in model.named_modules()}
    nk.patch(model)
    nk.unpatch(model)
    assert {name: vars(module).keys() for name, module in model.named_modules()} == keys
    assert torch.equal(result(model, input_ids=ids), before)


def test_the_same_class_from_elsewhere_is_not_known(remote):
    other = load("stand_in_from_elsewhere")
    with pytest.raises(ValueError, match="supported family"):
        nk.patch(make(other, "NeoBERT"))
    del sys.modules["stand_in_from_elsewhere"]


class GeGLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.w12 = nn.Linear(48, 128, bias=False)
        self.w3 = nn.Linear(64, 48, bias=False)


def with_part(name, part):
    def change(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, part())

    return change


def with_signature(model):
    def forward(self, input_ids=None, attention_mask=None):
        raise NotImplementedError

    type(model).forward = forward


def parameter_of_its_own(model):
    model.transformer_encoder[1].scale = nn.Parameter(torch.ones(48))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_part("transformer_encoder.1.ffn", GeGLU), "encoder.1.ffn to be SwiGLU, got GeGLU"),
        (
            with_part("transformer_encoder.1.ffn.gate", lambda: nn.Linear(48, 64)),
            "encoder.1.ffn to have the parts w12, w3, got w12, w3, gate",
        ),
        (
            with_part("transformer_encoder.0.ffn.w12", lambda: nn.Linear(48, 64)),
            r"encoder.0.ffn.w12 to have a weight \(128, 48\), got weight \(64, 48\)",
        ),
        (
            with_part("transformer_encoder.2.qkv", lambda: nn.Linear(48, 48)),
            r"encoder.2.qkv to have a weight \(144, 48\)",
        ),
        (
            with_part("transformer_encoder.2.drop", lambda: nn.Dropout(0.1)),
            "encoder.2 to have the parts .* got .*drop",
        ),
        (
            with_part("transformer_encoder.0.ffn_norm", lambda: nn.LayerNorm(48)),
            "encoder.0.ffn_norm to be an RMSNorm .* got LayerNorm",
        ),
        (
            with_part("layer_norm", lambda: nn.RMSNorm(48, eps=None)),
            "layer_norm to be an RMSNorm with eps .* got RMSNorm, eps None",
        ),
        (
            with_part("positions", lambda: nn.Embedding(64, 48)),
            "the model to have the parts .* got .*positions",
        ),
        (parameter_of_its_own, "encoder.1 to have the parts .* got .*scale"),
        (
            lambda model: setattr(model.config, "rope", False),
            r"rotary positions \(config.rope\), got learned",
        ),
        (lambda model: setattr(model.config, "dim_head", 32), "config.dim_head 32"),
        (
            with_signature,
            r"NeoBERT.forward to begin with \(input_ids, .*got \(input_ids, attention_mask\)",
        ),
        (
            lambda model: model.layer_norm.register_forward_hook(lambda *_: None),
            "layer_norm without hooks",
        ),
    ],
)
def test_another_structure_is_named_and_left_alone(remote, change, message):
    model = make(remote, "NeoBERT")
    change(model)
    with pytest.raises(ValueError, match=message):
        nk.patch(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_another_head_is_named_and_left_alone(remote):
    model = make(remote, KINDS[1])
    model.transform = nn.Linear(48, 48)
    with pytest.raises(ValueError, match="the model to have the parts model, decoder, got"):
        nk.patch(model)
    model = make(remote, KINDS[2])
    model.dropout = nn.AlphaDropout(0.1)
    with pytest.raises(ValueError, match="dropout to be Dropout, got AlphaDropout"):
        nk.patch(model)
    assert not any("forward" in vars(module) for module in model.modules())
