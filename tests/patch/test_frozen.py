"""`patch(model, inference=True)`: the same numbers, from weights that are never old ones."""

import copy
import pickle
import re

import pytest
import torch
from encoders import ENCODERS, HEADS, head_cases, padded, randomized, widened, with_labels
from parity import assert_same, assert_within_budget
from torch import nn
from torch.nn import functional as F

import neobert_kernels as nk
from neobert_kernels.patching import frozen
from neobert_kernels.patching.frozen import PREPARED, Product, onednn_available, pair_order

needs_onednn = pytest.mark.skipif(not onednn_available(), reason="needs oneDNN")
# What oneDNN multiplies: nothing, BERT's wide product (AVX512), everything (AVX2).
ONEDNN = {"nothing": (False, False), "wide": (True, False), "everything": (True, True)}
ROUNDING = {"rtol": 1e-4, "atol": 1e-4}  # of float32 values up to about 10, through three layers
every_family = pytest.mark.parametrize("family", ENCODERS)


def encoder(family, **changes):
    torch.manual_seed(0)
    return randomized(ENCODERS[family].base(**changes)).eval()


@torch.no_grad()
def states(model, family, **inputs):
    torch.manual_seed(1)
    ids, mask = padded(family)
    return model(input_ids=ids, attention_mask=mask, **inputs).last_hidden_state[mask == 1]


@pytest.fixture(params=[pytest.param(name, marks=needs_onednn) for name in ONEDNN])
def onednn(request, monkeypatch):
    """Each kind of processor in turn."""
    return multiplies(request.param, monkeypatch)


def multiplies(what, monkeypatch):
    available, ahead = ONEDNN[what]
    monkeypatch.setattr(frozen, "onednn_available", lambda: available)
    monkeypatch.setattr(frozen, "onednn_ahead", lambda: ahead)
    return what


@every_family
def test_equals_the_patched_model(family, onednn):
    model = encoder(family)
    with nk.patched(model):
        rounded = states(model, family)
    exact = states(widened(model), family)
    report = nk.patch(model, inference=True)
    assert_same(states(model, family), rounded, exact)
    products = model.__dict__[PREPARED].products
    assert report.prepared[0].what == f"{len(products)} products"
    assert str(report).count("second copies") == 1
    packed = [product for product in products if product.packed]
    if onednn == "everything":
        assert {id(linear) for product in packed for linear in product.linears} == {
            id(module)
            for name, module in model.named_modules()
            if type(module) is nn.Linear and re.search(r"\.\d+\.", name)
        }
    else:
        assert packed == [p for p in products if p.gelu and onednn == "wide"]


@every_family
def test_half_precision_equals_the_patched_model(family):
    model = encoder(family).bfloat16()
    with nk.patched(model):
        rounded = states(model, family)
    exact = states(widened(model), family)
    nk.patch(model, inference=True)
    assert_same(states(model, family), rounded, exact)


@pytest.mark.parametrize(("family", "kind"), head_cases())
def test_heads_equal_the_patched_ones(family, kind):
    torch.manual_seed(0)
    labels = {"num_labels": 3} if kind in ("sequence", "token") else {}
    model = randomized(ENCODERS[family].head(kind, **labels)).eval()
    inputs = with_labels(kind, *padded(family))

    @torch.no_grad()
    def outputs(model):
        found = model(**inputs)
        return [x for x in found.values() if isinstance(x, torch.Tensor)]

    with nk.patched(model):
        expected = outputs(model)
    nk.patch(model, inference=True)
    for ours, like in zip(outputs(model), expected, strict=True):
        torch.testing.assert_close(ours, like, **ROUNDING)


@every_family
def test_unpatch_leaves_the_identical_objects(family):
    model = encoder(family)
    before = {
        name: (module, dict(module.__dict__), dict(module._parameters))
        for name, module in model.named_modules()
    }
    values = {name: p.clone() for name, p in model.state_dict().items()}
    nk.patch(model, inference=True)
    assert list(model.state_dict()) == list(values)
    states(model, family)
    nk.unpatch(model)
    assert dict(model.named_modules()).keys() == before.keys()
    for name, module in model.named_modules():
        was, attributes, parameters = before[name]
        assert module is was
        assert module.__dict__.keys() == attributes.keys()
        assert all(module._parameters[key] is p for key, p in parameters.items())
    for name, p in model.state_dict().items():
        assert torch.equal(p, values[name])


CHANGES = {
    "in place": lambda model, linear: linear.weight.mul_(2),
    "state dict": lambda model, linear: model.load_state_dict(model.state_dict()),
    "assigned": lambda model, linear: model.load_state_dict(
        {k: v.clone() for k, v in model.state_dict().items()}, assign=True
    ),
    "dtype": lambda model, linear: model.bfloat16(),
    "data": lambda model, linear: setattr(linear.weight, "data", linear.weight + 1),
    "parameter": lambda model, linear: setattr(linear, "weight", nn.Parameter(linear.weight + 1)),
    "hook": lambda model, linear: linear.register_forward_hook(lambda *call: None),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", sorted(ENCODERS.keys() - {"neobert"}))
def test_a_changed_weight_is_refused(family, change):
    model = encoder(family)
    nk.patch(model, inference=True)
    product = model.__dict__[PREPARED].products[-1]
    with torch.no_grad():
        CHANGES[change](model, product.linears[0])
    with pytest.raises(ValueError, match=r"^model: expected the weights that inference=True prep"):
        states(model, family)
    nk.unpatch(model)
    with torch.no_grad():
        nk.patch(model, inference=True)
        states(model, family)


@needs_onednn
def test_weights_that_were_not_prepared_may_change(monkeypatch):
    multiplies("wide", monkeypatch)
    model = encoder("neobert")  # which has nothing wide
    nk.patch(model, inference=True)
    assert not model.__dict__[PREPARED].products
    before = states(model, "neobert")
    with torch.no_grad():
        model.transformer_encoder[1].ffn.w3.weight.mul_(2)
    after = states(model, "neobert")
    assert not torch.equal(before, after)
    nk.unpatch(model)
    with nk.patched(model):
        torch.testing.assert_close(after, states(model, "neobert"), **ROUNDING)


class Doubled(nn.Linear):
    def forward(self, x):
        return super().forward(2 * x)


LAYER_CHANGES = {
    "another module in a layer": [
        lambda layer: setattr(layer.attention.self, "query", nn.Linear(48, 48)),
        lambda layer: setattr(layer.intermediate, "dense", nn.Linear(48, 96)),
        lambda layer: setattr(layer.intermediate, "intermediate_act_fn", nn.ReLU()),
    ],
    "the class of encoder.layer.1.attention.self.value changed": [
        lambda layer: setattr(layer.attention.self.value, "__class__", Doubled),
    ],
    "weight of encoder.layer.1.attention.self.key changed": [
        lambda layer: layer.attention.self.key.weight.detach().mul_(2),
    ],
    "hooks or the forward of encoder.layer.1.intermediate changed": [
        lambda layer: layer.intermediate.register_forward_hook(lambda *call: None),
        lambda layer: setattr(layer.intermediate, "forward", lambda x: x),
    ],
    "hooks or the forward of encoder.layer.1.intermediate.intermediate_act_fn changed": [
        lambda layer: layer.intermediate.intermediate_act_fn.register_forward_pre_hook(
            lambda *call: None
        ),
    ],
}


@needs_onednn
@pytest.mark.parametrize("what", ["wide", "everything"])
@pytest.mark.parametrize(
    ("got", "change"), [(got, change) for got, each in LAYER_CHANGES.items() for change in each]
)
def test_a_changed_part_of_a_layer_is_refused(got, change, what, monkeypatch):
    multiplies(what, monkeypatch)
    model = encoder("bert")
    nk.patch(model, inference=True)
    change(model.encoder.layer[1])
    with pytest.raises(ValueError, match=re.escape(got)):
        states(model, "bert")


@every_family
def test_other_layers_are_refused(family):
    model = encoder(family)
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    nk.patch(model, inference=True)
    layers[0] = copy.deepcopy(layers[1])
    with pytest.raises(ValueError, match=r"prepared .* got other layers"):
        states(model, family)


def test_fewer_layers_run():
    model = encoder("bert")
    nk.patch(model, inference=True)
    del model.encoder.layer[-1]
    frozen = states(model, "bert")
    nk.unpatch(model)
    torch.testing.assert_close(frozen, states(model, "bert"), **ROUNDING)


def test_what_fails_half_way_changes_nothing(monkeypatch):
    model = encoder("bert")
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    make, made = Product.__init__, []

    def full(self, *args, **options):
        made.append(self)
        if len(made) == 3:
            raise MemoryError
        make(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Product, "__init__", full)
        with pytest.raises(MemoryError):
            nk.patch(model, inference=True)
    assert not nk.patching.is_patched(model)
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
    nk.patch(model, inference=True)


def test_a_weight_of_another_class_is_left_to_its_layer():
    """As a quantized one is; only its layer knows how it multiplies."""

    class Own(torch.Tensor):
        pass

    model = encoder("bert")
    for name in ("query", "key", "value"):
        linear = getattr(model.encoder.layer[1].attention.self, name)
        linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Own))
    expected = states(model, "bert")
    nk.patch(model, inference=True)
    torch.testing.assert_close(states(model, "bert"), expected, **ROUNDING)
    frozen_linears = [m for p in model.__dict__[PREPARED].products for m in p.linears]
    assert not any(m is model.encoder.layer[1].attention.self.key for m in frozen_linears)


@needs_onednn
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch.func's own call
def test_forward_mode_derivatives_are_refused():
    """oneDNN's product has none, and leaves them out without a word."""
    model = encoder("bert").requires_grad_(False)
    nk.patch(model, inference=True)
    x = torch.randn(1, 4, 48)
    with pytest.raises(ValueError, match="expected no forward-mode derivatives with inference"):
        torch.func.jvp(lambda x: model(inputs_embeds=x).last_hidden_state, (x,), (x,))


@needs_onednn
@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # PyTorch's, of its own flags
def test_onednn_that_is_switched_off_multiplies_nothing():
    with torch.backends.mkldnn.flags(enabled=False):
        assert not onednn_available()
    assert onednn_available()


@needs_onednn
def test_batches_of_any_number_of_tokens_can_be_prepared_for():
    plain, x = nn.Linear(8, 4), torch.randn(3, 8)
    with torch.no_grad():
        product = Product([plain], packed=True, rows=2**62)
        torch.testing.assert_close(product(x), plain(x))


def test_gradients_and_training_are_refused():
    model = encoder("neobert")
    ids, mask = padded("neobert")
    nk.patch(model, inference=True)
    with pytest.raises(
        ValueError, match=r"^model: expected torch\.no_grad\(\) .* a call with grad"
    ):
        model(input_ids=ids, attention_mask=mask)
    with torch.no_grad(), pytest.raises(ValueError, match="got training mode"):
        model.train()(input_ids=ids, attention_mask=mask)
    model.eval().requires_grad_(False)
    model(input_ids=ids, attention_mask=mask)
    embeds = torch.randn(1, 4, 48, requires_grad=True)
    with pytest.raises(ValueError, match="a call with gradients"):
        model(inputs_embeds=embeds)
    with torch.autocast("cpu"), pytest.raises(ValueError, match=r"got autocast to torch\.bf"):
        model(input_ids=ids, attention_mask=mask)


def test_weights_made_under_inference_mode_are_refused():
    with torch.inference_mode():
        model = encoder("bert")
    with pytest.raises(ValueError, match="made inside"):
        nk.patch(model, inference=True)
    assert not nk.patching.is_patched(model)


@every_family
def test_under_torch_compile(family):
    model = encoder(family)
    nk.patch(model, inference=True)
    expected = states(model, family)
    torch.testing.assert_close(
        states(torch.compile(model, backend="eager"), family), expected, **ROUNDING
    )


def test_copies_are_their_own():
    model = encoder("nomic_bert")
    nk.patch(model, inference=True)
    expected = states(model, "nomic_bert")
    twin = copy.deepcopy(model)
    assert torch.equal(states(twin, "nomic_bert"), expected)
    with torch.no_grad():
        model.layers[0].mlp.gate_proj.weight.zero_()
    assert torch.equal(states(twin, "nomic_bert"), expected)
    stored = pickle.loads(pickle.dumps(twin))
    assert not nk.patching.is_patched(stored)
    nk.patch(stored, inference=True)
    assert torch.equal(states(stored, "nomic_bert"), expected)


@needs_onednn
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 7, 300])
def test_a_product_equals_linear_and_gelu(rows, bias, gelu, onednn):
    torch.manual_seed(0)
    plain = nn.Linear(48, 80, bias=bias)
    product = Product([plain], gelu=gelu, packed=onednn != "nothing", rows=64)

    def reference(x, dtype):
        y = F.linear(x, *(p.to(dtype) for p in plain.parameters()))
        return F.gelu(y) if gelu else y

    x = torch.randn(rows, 48)
    with torch.inference_mode():
        exact, ours = reference(x.double(), torch.float64), product(x)
        assert_within_budget(ours, reference(x, torch.float32), exact)


@needs_onednn
def test_onednn_leaves_other_dtypes_alone():
    """As where layers are of another dtype than the embeddings, which say what a model's is."""
    plain, x = nn.Linear(8, 4).bfloat16(), torch.randn(3, 8, dtype=torch.bfloat16)
    product = Product([plain], gelu=True, packed=True)
    assert not product.packed
    with torch.no_grad():
        assert torch.equal(product(x), F.gelu(plain(x)))


def test_a_bias_of_some_layers_is_zero_in_the_others():
    with_bias, without = nn.Linear(8, 4), nn.Linear(8, 4, bias=False)
    x = torch.randn(3, 8)
    with torch.no_grad():
        expected = torch.cat([with_bias(x), without(x)], -1)
        torch.testing.assert_close(Product([with_bias, without])(x), expected)


@pytest.mark.parametrize("size", [4, 10])
def test_pair_orders_undo_each_other(size):
    there, back = (pair_order(3, size, way) for way in (True, False))
    assert torch.equal(there[back], torch.arange(3 * size))
    assert there[:size].tolist()[:2] == [0, size // 2]


@needs_onednn
def test_another_activation_stays_outside_the_product():
    model = encoder("bert", hidden_act="gelu_new")
    nk.patch(model, inference=True)
    assert not any(product.gelu for product in model.__dict__[PREPARED].products)
    frozen = states(model, "bert")
    nk.unpatch(model)
    torch.testing.assert_close(states(model, "bert"), frozen, **ROUNDING)


def test_a_lora_layer_is_called_as_it_is():
    peft = pytest.importorskip("peft")
    model = encoder("eurobert")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    with nk.patched(adapted):
        expected = states(adapted, "eurobert")
    nk.patch(adapted, inference=True)
    torch.testing.assert_close(states(adapted, "eurobert"), expected, **ROUNDING)


def test_every_head_kind_is_covered():
    assert {kind for _, kind in head_cases()} == set(HEADS)


@needs_onednn
def test_frozen_for_good_gives_up_its_own_weights(onednn):
    model = encoder("bert")
    nk.patch(model, inference=True)
    expected = states(model, "bert")
    nk.unpatch(model)
    nk.patching.patch_for_good(model, rows=64)
    torch.testing.assert_close(states(model, "bert"), expected, **ROUNDING)
    gone = {
        name
        for name, module in model.encoder.layer[1].named_modules()
        if type(module) is nn.Linear and module.weight.is_meta
    }
    own = {f"attention.self.{name}" for name in ("query", "key", "value")}
    assert (
        gone
        == own
        | {
            "nothing": set(),
            "wide": {"intermediate.dense"},
            "everything": {"intermediate.dense", "attention.output.dense", "output.dense"},
        }[onednn]
    )
    for call in (nk.unpatch, copy.deepcopy):
        with pytest.raises(ValueError, match=r"^model: expected one that kept its weights"):
            call(model)
