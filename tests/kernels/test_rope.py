"""rope and rope_table: rotations of pairs by float32 angles."""

import math

import pytest
import torch
from covering import covering
from parity import assert_parity, assert_within_budget

import neobert_kernels as nk
from neobert_kernels import _runtime
from neobert_kernels.ops import rope as module

runs_kernel = pytest.mark.skipif(
    not torch.cuda.is_available() and not _runtime.INTERPRET, reason="no kernel runs on the CPU"
)
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


VIEWS = {
    "every second channel": lambda x: x[..., ::2],
    "heads before tokens": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)[..., :8],
    "one token repeated": lambda x: x[:1, :, :8].expand(7, -1, -1),
}


@layouts
@pytest.mark.parametrize("view", VIEWS)
def test_views_and_their_gradients(view, interleaved, device):
    _, cos, sin = make(device=device)
    x = torch.randn(7, 3, 16, device=device)
    assert_parity(
        lambda x: nk.rope(VIEWS[view](x), cos, sin, interleaved).sum(-1),
        lambda x: nk.rope_reference(VIEWS[view](x), cos, sin, interleaved).sum(-1),
        [x],
    )


@covering(interleaved=[False, True], D=[2, 6, 24, 64, 96, 128, 130], H=[1, 2, 5])
def test_every_width_and_number_of_heads(H, D, interleaved, device):
    x, cos, sin = make(T=3 if H == 2 else 35, H=H, D=D, dtype=torch.bfloat16, device=device)
    assert_parity(
        lambda x: nk.rope(x, cos, sin, interleaved),
        lambda x: nk.rope_reference(x, cos, sin, interleaved),
        [x],
    )


@layouts
@pytest.mark.parametrize("view", ["whole", "slice", "every second channel"])
def test_in_place_and_into_a_view(view, interleaved, device):
    x, cos, sin = make(device=device)
    expected = nk.rope(x, cos, sin, interleaved)
    room = torch.full((7, 3, 24), 5.0, device=device)
    out = {"whole": torch.empty_like(x), "slice": room[..., 8:16],
           "every second channel": room[..., 1:17:2]}[view]  # fmt: skip
    assert nk.rope(x, cos, sin, interleaved, out=out) is out
    assert torch.equal(out, expected)
    assert room[..., [0, 17, 23]].eq(5).all()
    assert nk.rope(x, cos, sin, interleaved, out=x) is x
    assert torch.equal(x, expected)


def test_each_of_q_k_and_v_of_one_projection_may_receive_another(device):
    """Their ranges in memory meet, and no element of theirs does."""
    _, cos, sin = make(device=device)
    for shape in ((7, 3, 3, 8), (3, 3, 7, 8)):  # per head; heads before tokens
        packed = torch.randn(shape, device=device)
        views = packed.unbind(2) if shape[0] == 7 else packed.transpose(0, 2).unbind(2)
        expected = nk.rope(views[0], cos, sin)
        for out in views[1:]:
            assert torch.equal(nk.rope(views[0], cos, sin, out=out), expected)


ROOM = torch.ones(400)
OVERLAPS = {
    "expanded": lambda: ROOM[:8].expand(7, 3, 8),
    "its own rows overlap": lambda: ROOM.as_strided((7, 3, 8), (12, 8, 1)),
    "its own heads overlap": lambda: ROOM.as_strided((7, 3, 8), (40, 4, 1)),
    "one token later": lambda: ROOM[24:192].view(7, 3, 8),
    "one head earlier": lambda: ROOM.as_strided((7, 3, 8), (24, 8, 1), 8),
    "one element later": lambda: ROOM.as_strided((7, 3, 8), (24, 8, 1), 1),
    "in another order": lambda: ROOM.as_strided((7, 3, 8), (8, 56, 1)),
}


@pytest.mark.parametrize("case", OVERLAPS)
def test_refuses_an_output_that_overlaps(case):
    _, cos, sin = make()
    x = ROOM.as_strided((7, 3, 8), (24, 8, 1), 16 if case == "one head earlier" else 0)
    own = case.startswith(("expanded", "its own"))
    rule = "elements that share no memory" if own else "x itself, or memory that it does not share"
    with pytest.raises(ValueError, match=f"out: expected {rule}"):
        nk.rope(x, cos, sin, out=OVERLAPS[case]())
    assert ROOM.eq(1).all()


def test_refuses_an_output_in_the_memory_of_a_table():
    x, cos, sin = make()
    room = torch.ones(2 * x.numel())
    out = room[: x.numel()].view_as(x)
    inside = room[: cos.numel()].view_as(cos)
    for tables, name in (((inside, sin), "cos"), ((cos, inside), "sin")):
        with pytest.raises(ValueError, match=f"out: expected memory apart from that of {name}"):
            nk.rope(x, *tables, out=out)
    assert room.eq(1).all()
    behind = room[x.numel() :][: cos.numel()].view_as(cos)
    assert torch.equal(nk.rope(x, behind, sin, out=out), nk.rope(x, behind, sin))


@pytest.mark.parametrize(("later", "meets"), [(16, True), (18, True), (23, True), (8 * 24, False)])
def test_an_output_may_start_in_a_gap_but_not_reach_the_next_row(later, meets):
    """x has two heads in rows of three."""
    room = torch.ones(800)
    _, cos, sin = make()
    x, out = (room.as_strided((7, 2, 8), (24, 8, 1), start) for start in (0, later))
    if meets:
        with pytest.raises(ValueError, match="out: expected x itself, or memory"):
            nk.rope(x, cos, sin, out=out)
    else:
        assert torch.equal(nk.rope(x, cos, sin, out=out), nk.rope(x, cos, sin))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: 8 GiB")
def test_more_than_two_to_the_31_elements(device):
    """Forward, backward and in place, seen at both ends."""
    H, D = 32, 128
    T = 2**31 // (H * D) + 300
    x = torch.randn(T, H, D, device=device, dtype=torch.bfloat16)
    cos, sin = nk.rope_table(torch.arange(T, device=device) % 512, D)
    ends = torch.cat([torch.arange(300), torch.arange(T - 300, T)]).to(device)
    expected = nk.rope(x[ends], cos[ends], sin[ends])
    back = nk.rope(x[ends], cos[ends], -sin[ends])
    leaf = x.detach().requires_grad_()
    y = nk.rope(leaf, cos, sin)
    assert torch.equal(y.detach()[ends], expected)
    (dx,) = torch.autograd.grad(y, leaf, leaf.detach())
    assert torch.equal(dx[ends], back)
    del y, dx
    assert torch.equal(nk.rope(x, cos, sin, out=x)[ends], expected)


def test_in_place_refuses_a_gradient(device):
    x, cos, sin = make(device=device)
    x.requires_grad_()
    with pytest.raises(ValueError, match="out: expected None where a gradient is recorded"):
        nk.rope(x, cos, sin, out=torch.empty_like(x))
    with torch.no_grad():
        nk.rope(x, cos, sin, out=torch.empty_like(x))


@runs_kernel
@layouts
@pytest.mark.parametrize(("H", "G"), [(3, 3), (4, 1)])
def test_q_and_k_turn_in_one_launch_into_half_split_order(H, G, interleaved, device):
    x, cos, sin = make(T=9, H=H + 2 * G, D=24, dtype=torch.float16, device=device)
    q, k = x[:, :H], x[:, H : H + G]
    order = [*range(0, 24, 2), *range(1, 24, 2)] if interleaved else range(24)
    for turned, row in zip(module.turn(q, k, cos, sin, interleaved), (q, k), strict=True):
        assert torch.equal(turned, nk.rope(row, cos, sin, interleaved)[..., list(order)])
    both = torch.cat(module.turn(q, k, cos, sin, interleaved), dim=1)
    assert torch.equal(module._pair(q, k, cos, sin, interleaved), both)


def test_no_tokens(device):
    x, cos, sin = make(T=0, device=device)
    x.requires_grad_()
    y = nk.rope(x, cos, sin)
    assert y.shape == (0, 3, 8)
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@pytest.mark.parametrize("theta", [10000.0, 160000.0])
def test_tables_keep_float32_angles_at_far_positions(theta, device):
    """Of an angle of 8,000 turns float32 keeps 1e-3; the frequency may be off by 2 roundings."""
    positions = torch.tensor([0, 1, 511, 4095, 8191], device=device)
    exact = positions.double()[:, None] * theta ** (
        -torch.arange(0, 64, 2, device=device).double() / 64
    )
    eps = torch.finfo(torch.float32).eps
    for table, expected in zip(
        nk.rope_table(positions, 64, theta), (exact.cos(), exact.sin()), strict=True
    ):
        assert ((table.double() - expected).abs() <= eps * (2 * exact.abs() + 1)).all()


@runs_kernel
def test_tables_are_cosine_and_sine_of_the_float32_angle(device):
    """In every quadrant, within 2 units of 1. Pair 0 turns by 1, so angles are positions."""
    positions = torch.cat([torch.arange(4000), torch.arange(-9, 0), torch.arange(10**6, 10**6 + 9)])
    cos, sin = nk.rope_table(positions.to(device), 2)
    angle = positions.double()[:, None].to(device)
    eps = torch.finfo(torch.float32).eps
    assert (cos.double() - angle.cos()).abs().max() <= 2 * eps
    assert (sin.double() - angle.sin()).abs().max() <= 2 * eps


def test_registration(device):
    x, cos, sin = make(device=device)
    torch.library.opcheck(module._rotation, (x, cos, sin, True, False))
    torch.library.opcheck(module._rotation_into, (x, cos, sin, False, torch.empty_like(x)))
    if device.type == "cuda" or _runtime.INTERPRET:
        torch.library.opcheck(module._table, (torch.arange(5, device=device), 8, 1e4))


def test_a_dynamic_number_of_tokens_compiles_once(device):
    torch.compiler.reset()

    def both(positions, x):
        return nk.rope(x, *nk.rope_table(positions, 8), interleaved=True)

    compiled = torch.compile(both, fullgraph=True, dynamic=True, backend="aot_eager")
    for T in (5, 9, 40):
        stance = "default" if T == 5 else "fail_on_recompile"
        with torch.compiler.set_stance(stance):
            x, positions = make(T=T, device=device)[0], torch.arange(T, device=device)
            torch.testing.assert_close(compiled(positions, x), both(positions, x))


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
        (lambda: nk.rope(X[..., :3], T2, T2), "x: expected an even head size, at least 2, got 3"),
        (lambda: nk.rope(X[..., :0], T2[:, :0], T2[:, :0]), "x: expected an even head size"),
        (lambda: nk.rope(X, T2[:2], T2), r"cos: expected shape \(3, 2\), got \(2, 2\)"),
        (lambda: nk.rope(X, T2, T2.half()), "sin: expected dtype float32, got float16"),
        (lambda: nk.rope(X, T2, T2, out=X[:2]), r"out: expected the shape of x \(\(3, 2, 4\)\)"),
        (lambda: nk.rope(X, T2, T2, out=X.half()), "out: expected the dtype of x"),
        (lambda: nk.rope_table(torch.ones(2), 4), "positions: expected dtype int64 or int32"),
        (lambda: nk.rope_table(torch.ones(2, 2).long(), 4), "positions: expected 1 dimensions"),
        (lambda: nk.rope_table(torch.arange(2), 5), "dim: expected an even number, at least 2"),
        (lambda: nk.rope_table(torch.arange(2), 4, 0.0), "theta: expected a finite number over 0"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
