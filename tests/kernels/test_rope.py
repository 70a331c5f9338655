"""rope and rope_table: rotations of pairs by float32 angles."""

import math

import pytest
import torch
from parity import assert_parity, assert_within_budget

import neobert_kernels as nk

layouts = pytest.mark.parametrize("interleaved", [False, True], ids=["half-split", "interleaved"])


def make(T=7, H=3, D=8, dtype=torch.float32, device="cpu"):
    cos, sin = nk.rope_table(torch.arange(T, device=device), D)
    return torch.randn(T, H, D, device=device).to(dtype), cos, sin


def by_hand(x, positions, theta, interleaved):
    T, _, D = x.shape
    y = torch.empty_like(x)
    for t in range(T):
        for i in range(D // 2):
            angle = positions[t] * theta ** (-2 * i / D)
            a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + D // 2)
            y[t, :, a] = x[t, :, a] * math.cos(angle) - x[t, :, b] * math.sin(angle)
            y[t, :, b] = x[t, :, a] * math.sin(angle) + x[t, :, b] * math.cos(angle)
    return y


@layouts
@pytest.mark.parametrize("theta", [10000.0, 160000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_matches_the_rotation_written_out(interleaved, theta, dtype, device):
    positions = torch.tensor([0, 1, 5, 2, 63], device=device)
    x = torch.randn(5, 2, 8, device=device).to(dtype)
    y = nk.rope(x, *nk.rope_table(positions, 8, theta), interleaved=interleaved)
    exact = by_hand(x.double(), positions.tolist(), theta, interleaved)
    # Angles are float32: at position 63 they are off by up to 63 rounding errors.
    ulps = 64 if dtype is torch.float32 else 0
    assert_within_budget(y, exact.to(dtype), exact, ulps=ulps)


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_matches_the_reference_and_its_gradient(interleaved, dtype, device):
    x, cos, sin = make(dtype=dtype, device=device)
    assert_parity(
        lambda x: nk.rope(x, cos, sin, interleaved),
        lambda x: nk.rope_reference(x, cos, sin, interleaved),
        [x],
    )


@layouts
def test_the_backward_is_the_inverse_rotation(interleaved, device):
    x, cos, sin = make(device=device)
    x.requires_grad_()
    (back,) = torch.autograd.grad(nk.rope(x, cos, sin, interleaved), x, x.detach())
    torch.testing.assert_close(back, nk.rope(x, cos, -sin, interleaved))
    turned = nk.rope(x, cos, sin, interleaved).detach()
    (home,) = torch.autograd.grad(nk.rope(x, cos, sin, interleaved), x, turned)
    torch.testing.assert_close(home, x)


@layouts
def test_lengths_are_kept_and_position_zero_does_not_move(interleaved, device):
    x, cos, sin = make(device=device)
    y = nk.rope(x, cos, sin, interleaved)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(y[0], x[0])
    assert not torch.equal(y[1], x[1])


def test_layouts_agree_after_sorting_evens_before_odds(device):
    x, cos, sin = make(device=device)
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    split = nk.rope(x[..., order], cos, sin)
    assert torch.equal(split, nk.rope(x, cos, sin, interleaved=True)[..., order])


def test_strided_views_are_read_as_they_are(device):
    _, cos, sin = make(device=device)
    packed = torch.randn(7, 3, 3, 8, device=device)
    view = packed[:, :, 1]
    assert torch.equal(nk.rope(view, cos, sin), nk.rope(view.contiguous(), cos, sin))


def test_tables_are_float32_and_no_position_is_negative_zero(device):
    cos, sin = nk.rope_table(torch.tensor([0, 4095], device=device, dtype=torch.int32), 64)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos.shape == sin.shape == (2, 32)
    assert torch.equal(cos[0], torch.ones_like(cos[0]))
    assert nk.rope_table(torch.arange(0, device=device), 4)[0].shape == (0, 2)


def test_compiles_to_one_graph(device):
    x, cos, sin = make(device=device)
    compiled = torch.compile(nk.rope, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, cos, sin), nk.rope(x, cos, sin))


X = torch.ones(3, 2, 4)
T2 = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nk.rope(X[0], T2, T2), "x: expected 3 dimensions"),
        (lambda: nk.rope(X.double(), T2, T2), "x: expected dtype float32 or"),
        (lambda: nk.rope(X[..., :3], T2, T2), "x: expected an even head size, got 3"),
        (lambda: nk.rope(X, T2[:2], T2), r"cos: expected shape \(3, 2\), got \(2, 2\)"),
        (lambda: nk.rope(X, T2, T2.half()), "sin: expected dtype float32, got float16"),
        (lambda: nk.rope_table(torch.ones(2), 4), "positions: expected dtype int64 or int32"),
        (lambda: nk.rope_table(torch.ones(2, 2).long(), 4), "positions: expected 1 dimensions"),
        (lambda: nk.rope_table(torch.arange(2), 5), "dim: expected an even number, at least 2"),
        (lambda: nk.rope_table(torch.arange(2), 4, 0.0), "theta: expected a finite number over 0"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
