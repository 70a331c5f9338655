"""What changes in a frozen model is seen on few tokens, as the layers' own forwards see it."""

import copy
import functools

import pytest
import torch
from direct_cases import DEVICE, ROUNDING, encoder, real_states, runs_kernel
from torch import nn
from torch.nn.utils import parametrize

import neobert_kernels as nk
from neobert_kernels.patching.direct import DIRECT

pytestmark = pytest.mark.usefixtures("few_programs")


PARTS = {
    "layer": lambda model: model.transformer_encoder[1],
    "Linear layer": lambda model: model.transformer_encoder[1].wo,
    "feed-forward": lambda model: model.transformer_encoder[1].ffn,
}


@runs_kernel
@pytest.mark.parametrize("part", PARTS)
def test_a_hook_sees_its_module_called(part, ran):
    model, seen = encoder(), []
    nk.patch(model, inference=True)
    expected = real_states(model, "neobert")
    handle = PARTS[part](model).register_forward_hook(lambda *call: seen.append(call))
    if part == "feed-forward":  # no patched layer calls it
        handle.remove()
        handle = nn.modules.module.register_module_forward_hook(lambda *call: seen.append(call))
    try:
        hooked = real_states(model, "neobert")
    finally:
        handle.remove()
    assert seen
    torch.testing.assert_close(hooked, expected, **ROUNDING)
    assert len(ran) == 1
    assert torch.equal(real_states(model, "neobert"), expected)
    assert len(ran) == 2


@runs_kernel
def test_a_forward_that_somebody_replaced_is_called(ran):
    model, calls = encoder(), []
    nk.patch(model, inference=True)
    real_states(model, "neobert")
    wo = model.transformer_encoder[0].wo
    wo.forward = lambda x: calls.append(1) or nn.Linear.forward(wo, x)
    real_states(model, "neobert")
    assert (len(calls), len(ran)) == (1, 1)


@runs_kernel
def test_a_part_in_training_mode_does_what_it_does_there(ran):
    model = encoder("bert", hidden_dropout_prob=0.5)
    nk.patch(model, inference=True)
    calm = real_states(model, "bert")
    model.encoder.layer[1].output.train()
    assert not torch.allclose(real_states(model, "bert"), calm)
    assert len(ran) == 1


class LoRA(nn.Module):
    """More than a product: as adapters are, it has another class."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def forward(self, x):
        return self.base(x) + 1


CHANGES = {
    "in place": lambda ffn: ffn.w3.weight.mul_(2),
    "data": lambda ffn: setattr(ffn.w3.weight, "data", ffn.w3.weight * 2),
    "parameter": lambda ffn: setattr(ffn.w3, "weight", nn.Parameter(ffn.w3.weight * 2)),
    "module": lambda ffn: setattr(ffn, "w3", copy.deepcopy(ffn.w3).requires_grad_(False)),
    "another class": lambda ffn: setattr(ffn, "w3", LoRA(ffn.w3)),
}


@runs_kernel
@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_those_that_count(change, ran):
    model = encoder()
    nk.patch(model, inference=True)
    real_states(model, "neobert")
    with torch.no_grad():
        CHANGES[change](model.transformer_encoder[1].ffn)
        if change == "module":
            model.transformer_encoder[1].ffn.w3.weight.mul_(2)
    found = real_states(model, "neobert")
    assert len(ran) == (1 if change == "another class" else 2)
    nk.unpatch(model)
    with nk.patched(model):
        torch.testing.assert_close(found, real_states(model, "neobert"), **ROUNDING)


def halve_theta(model):
    rope = getattr(model.config, "rope_parameters", None)
    if rope is None:
        model.config.rope_theta /= 2
    elif "rope_theta" in rope:
        rope["rope_theta"] /= 2
    else:
        rope["sliding_attention"]["rope_theta"] /= 2


def norm_of_another_weight(model):
    norm = nn.LayerNorm(48, device=DEVICE)
    norm.weight.detach().fill_(2)
    model.final_norm = norm


def scale_scores(model):
    for layer in model.encoder.layer:
        layer.attention.self.scaling = 0.1


SETTINGS = {
    "eps": ("neobert", lambda m: setattr(m.layer_norm, "eps", 1.0)),
    "eps of a layer": ("bert", lambda m: setattr(m.encoder.layer[0].output.LayerNorm, "eps", 1.0)),
    "theta": ("neobert", halve_theta),
    "theta of windows": ("modernbert", halve_theta),
    "theta of others": ("eurobert", halve_theta),
    "window": ("modernbert", lambda m: setattr(m.layers[1].attn, "sliding_window", 2)),
    "scale": ("bert", scale_scores),
    "last norm": ("modernbert", norm_of_another_weight),
    "fewer layers": ("bert", lambda m: setattr(m.encoder, "layer", m.encoder.layer[:1])),
    "fewer by config": ("nomic_bert", lambda m: setattr(m.config, "num_hidden_layers", 1)),
}


@runs_kernel
@pytest.mark.parametrize("what", SETTINGS)
def test_what_else_changes_is_seen(what, ran, monkeypatch):
    """As the layers' own forwards see it, which read it at every call."""
    family, change = SETTINGS[what]
    model, by_layer = encoder(family), encoder(family)
    nk.patch(model, inference=True)
    monkeypatch.setenv(DIRECT, "0")
    nk.patch(by_layer, inference=True)
    before = real_states(model, family)
    for each in (model, by_layer):
        change(each)
    found = real_states(model, family)
    assert not torch.allclose(found, before, **ROUNDING)
    torch.testing.assert_close(found, real_states(by_layer, family), **ROUNDING)


NORMS = {
    "in a layer": lambda model: model.transformer_encoder[1].ffn_norm,
    "the last": lambda model: model.layer_norm,
}


@runs_kernel
@pytest.mark.parametrize("which", NORMS)
def test_a_weight_that_is_computed_is_computed_at_every_call(which, ran):
    model = encoder()
    norm = NORMS[which](model)
    nk.patch(model, inference=True)
    real_states(model, "neobert")

    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    parametrize.register_parametrization(norm, "weight", Twice())
    with torch.no_grad():
        for _ in range(2):
            norm.parametrizations.weight.original.add_(1)
            found = real_states(model, "neobert")
    assert len(ran) == 1
    twin = encoder()
    with torch.no_grad():
        NORMS[which](twin).weight.add_(2).mul_(2)
    nk.patch(twin, inference=True)
    torch.testing.assert_close(found, real_states(twin, "neobert"), **ROUNDING)


class Thrice(nn.Module):
    def forward(self, x):
        return x * 3


class LinearAndMore(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 3


def of_another_width(model, before):
    if before:
        layer = model.encoder.layer[1]
        layer.intermediate.dense = nn.Linear(48, 40, device=DEVICE)
        layer.output.dense = nn.Linear(40, 48, device=DEVICE)


def pruned_by_views(model, before):
    if not before:
        for layer in model.transformer_encoder:
            layer.ffn.w12.weight.data = layer.ffn.w12.weight.data[:16]
            layer.ffn.w3.weight.data = layer.ffn.w3.weight.data[:, :8]


def transposed_in_place(model, before):
    if not before:
        weight = model.encoder.layer[1].attention.output.dense.weight
        weight.data = weight.data.t()


def steered(model, before):
    if not before:
        model.encoder.layer[0].output.dropout = Thrice()


def steered_before(model, before):
    if before:
        model.encoder.layer[0].output.dropout = Thrice()


def of_another_class(model, before):
    if not before:
        model.encoder.layer[1].attention.output.dense.__class__ = LinearAndMore


def wrapped(model, before):
    if not before:
        layer = model.encoder.layer[0]
        forward = layer.forward
        layer.forward = functools.wraps(forward)(lambda *args: forward(*args) * 3)


def wrapped_then_changed(model, before):
    if not before:
        wrapped(model, before)
        real_states(model, "bert")
        weight = model.encoder.layer[1].attention.output.dense.weight
        weight.data = weight.data.clone()


DIFFERENT = (
    of_another_width, pruned_by_views, transposed_in_place, steered, steered_before,
    of_another_class, wrapped, wrapped_then_changed,
)  # fmt: skip


@runs_kernel
@pytest.mark.parametrize("change", DIFFERENT)
def test_layers_that_differ_are_what_their_own_forwards_make_them(change, ran, monkeypatch):
    """Called as they are, or read again: never with old sizes, old bits or without a part."""
    found = []
    family = "neobert" if change is pruned_by_views else "bert"
    for switch in ("1", "0"):
        monkeypatch.setenv(DIRECT, switch)
        model = encoder(family)
        with torch.no_grad():
            torch.manual_seed(2)
            change(model.eval(), before=True)
            nk.patch(model.eval(), inference=True)
            real_states(model, family)
            change(model, before=False)
            model.eval()
            found.append(real_states(model, family))
    torch.testing.assert_close(*found, **ROUNDING)


@runs_kernel
def test_a_hook_that_is_gone_leaves_one_order_of_pairs(ran):
    """While it was there its layer kept its own rows of q and k; the others were put in order."""
    model = encoder("modernbert")
    handle = model.layers[1].attn.Wqkv.register_forward_hook(lambda *call: None)
    nk.patch(model, inference=True)
    handle.remove()
    found = real_states(model, "modernbert")
    assert not ran
    twin = encoder("modernbert")
    nk.patch(twin, inference=True)
    torch.testing.assert_close(found, real_states(twin, "modernbert"), **ROUNDING)
    assert len(ran) == 1
