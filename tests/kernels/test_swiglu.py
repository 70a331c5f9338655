"""swiglu and geglu: the first half is the gate."""

import math

import pytest
import torch
from parity import assert_parity, assert_within_budget

import neobert_kernels as nk


def silu(g):
    return g / (1 + math.exp(-g))


def gelu(g):
    return g * 0.5 * (1 + math.erf(g / math.sqrt(2)))


OPS = {
    "swiglu": (nk.swiglu, nk.swiglu_reference, silu),
    "geglu": (nk.geglu, nk.geglu_reference, gelu),
}
ops = pytest.mark.parametrize(("op", "reference", "activation"), OPS.values(), ids=OPS)


@ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_matches_the_formula_written_out(op, reference, activation, dtype, device):
    x = torch.randn(5, 6, device=device).to(dtype)
    rows = [[activation(r[i]) * r[i + 3] for i in range(3)] for r in x.double().tolist()]
    exact = torch.tensor(rows, dtype=torch.float64, device=device)
    ulps = 2 if dtype is torch.float32 else 0  # 16 bits: nothing but the last rounding
    assert_within_budget(op(x), exact.to(dtype), exact, ulps=ulps)


@ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2,), (1, 16), (2, 3, 100), (0, 8)], ids=str)
def test_matches_the_reference_and_its_gradient(op, reference, activation, dtype, shape, device):
    x = torch.randn(shape, device=device).to(dtype)
    if x.numel():
        assert_parity(op, reference, [x])
    assert op(x).shape == (*shape[:-1], shape[-1] // 2)


@ops
def test_strided_input_is_not_overwritten(op, reference, activation, device):
    x = torch.randn(8, 6, device=device).t()
    before = x.clone()
    torch.testing.assert_close(op(x), op(x.contiguous()))
    assert torch.equal(x, before)


@ops
def test_large_gates_neither_overflow_nor_vanish(op, reference, activation, device):
    x = torch.tensor([[80.0, -80.0, 3.0, 3.0]], device=device, requires_grad=True)
    y = op(x)
    y.sum().backward()
    torch.testing.assert_close(y, torch.tensor([[240.0, 0.0]], device=device))
    assert x.grad.isfinite().all()


@ops
def test_compiles_to_one_graph(op, reference, activation, device):
    x = torch.randn(3, 8, device=device)
    torch.testing.assert_close(torch.compile(op, fullgraph=True, backend="aot_eager")(x), op(x))


@ops
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 3), "x: expected an even number of channels .*, got 3"),
        (torch.ones(2, 0), "x: expected an even number of channels .*, got 0"),
        (torch.tensor(1.0), r"x: expected at least 1 dimension\(s\), got shape \(\)"),
        (torch.ones(2).double(), "x: expected dtype float32 or float16 or bfloat16, got float64"),
        ([1.0, 2.0], "x: expected a torch.Tensor, got list"),
    ],
)
def test_rejects(op, reference, activation, x, message):
    with pytest.raises(ValueError, match=message):
        op(x)
