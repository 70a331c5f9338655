"""layer_norm and add_layer_norm against mean and variance written out."""

import pytest
import torch
from parity import assert_parity, assert_within_budget

import neobert_kernels as nk

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def make(shape, dtype, device, parameters=None):
    x, r = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
    w, b = (torch.randn(shape[-1], device=device).to(parameters or dtype) for _ in range(2))
    return x, r, w, b


def by_hand(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdim=True)
    return weight * centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() + bias


@dtypes
@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.5])
def test_matches_mean_and_variance_written_out(eps, dtype, device):
    x, _, w, b = make((6, 24), dtype, device)
    exact = by_hand(x.double(), w.double(), b.double(), eps)
    ulps = 4 if dtype is torch.float32 else 0  # 16 bits: nothing but the last rounding
    assert_within_budget(nk.layer_norm(x, w, b, eps), exact.to(dtype), exact, ulps=ulps)


@dtypes
@pytest.mark.parametrize("shape", [(7, 768), (2, 3, 100), (1, 2)], ids=str)
def test_matches_the_reference_and_every_gradient(dtype, shape, device):
    x, r, w, b = make(shape, dtype, device)
    assert_parity(nk.layer_norm, nk.layer_norm_reference, [x, w, b])
    assert_parity(nk.add_layer_norm, nk.add_layer_norm_reference, [x, r, w, b])


def test_no_bias_is_a_bias_of_zero(device):
    x, r, w, b = make((5, 16), torch.float32, device)
    assert torch.equal(nk.layer_norm(x, w), nk.layer_norm(x, w, b * 0))
    both = (nk.add_layer_norm(x, r, w, bias) for bias in (None, b * 0))
    assert all(map(torch.equal, *both))


@dtypes
def test_adding_is_the_norm_of_the_stored_sum(dtype, device):
    x, r, w, b = make((9, 40), dtype, device)
    y, h = nk.add_layer_norm(x, r, w, b)
    assert torch.equal(h, x + r)
    assert torch.equal(y, nk.layer_norm(h, w, b))


def test_wider_weights_and_no_rows(device):
    x, r, w, b = make((0, 16), torch.bfloat16, device, parameters=torch.float32)
    y, h = nk.add_layer_norm(x, r, w, b)
    assert (y.shape, h.shape, y.dtype) == ((0, 16), (0, 16), torch.bfloat16)
    x, r, w, b = make((4, 16), torch.bfloat16, device, parameters=torch.float32)
    assert_parity(nk.layer_norm, nk.layer_norm_reference, [x, w, b])


def test_shift_and_scale_of_a_row_do_not_matter(device):
    x, _, w, b = make((5, 64), torch.float32, device)
    torch.testing.assert_close(nk.layer_norm(x * 7 + 3, w, b, 1e-12), nk.layer_norm(x, w, b, 1e-12))


def test_compiles_to_one_graph(device):
    x, r, w, b = make((5, 16), torch.float32, device)
    compiled = torch.compile(nk.add_layer_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, r, w, b), nk.add_layer_norm(x, r, w, b))


X, W = torch.ones(2, 4), torch.ones(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nk.layer_norm(X, W[:3]), r"weight: expected shape \(4,\), got \(3,\)"),
        (lambda: nk.layer_norm(X.double(), W), "x: expected dtype float32 or"),
        (lambda: nk.layer_norm(X[:, :0], W[:0]), "x: expected 1 to 16384 channels, got 0"),
        (lambda: nk.layer_norm(X, W, W[:1]), r"bias: expected shape \(4,\)"),
        (lambda: nk.layer_norm(X, W.to("meta")), "weight: expected device cpu, got meta"),
        (
            lambda: nk.layer_norm(X, W, eps=-1.0),
            "eps: expected a finite number, at least 0, got -1",
        ),
        (lambda: nk.add_layer_norm(X, X[:1], W), r"residual: expected the shape of x \(\(2, 4\)\)"),
        (
            lambda: nk.add_layer_norm(X, X.half(), W),
            r"residual: expected the dtype of x \(float32\)",
        ),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
