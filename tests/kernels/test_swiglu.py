"""swiglu, geglu: the first half is the gate; silu_mul, gelu_mul: the same of two tensors."""

import math
from collections.abc import Callable

import pytest
import torch
from covering import covering, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_parity, assert_within_budget, outputs_and_gradients
from torch import Tensor

import neobert_kernels as nk
from neobert_kernels import _runtime
from neobert_kernels.ops import swiglu as module

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
runs_kernel = pytest.mark.skipif(
    DEVICE.type != "cuda" and not _runtime.INTERPRET, reason="no kernel runs on the CPU"
)
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")


def silu(g):
    return g / (1 + math.exp(-g))


def gelu(g):
    return g * 0.5 * (1 + math.erf(g / math.sqrt(2)))


def halved(fn):
    """A function of two tensors as one of their concatenation: it gets strided views."""
    return lambda x: fn(*x.chunk(2, dim=-1))


PACKED = {
    "swiglu": (nk.swiglu, nk.swiglu_reference, silu),
    "geglu": (nk.geglu, nk.geglu_reference, gelu),
}
PAIRS = {
    "silu_mul": (nk.silu_mul, nk.silu_mul_reference, nk.swiglu),
    "gelu_mul": (nk.gelu_mul, nk.gelu_mul_reference, nk.geglu),
}
OPS = PACKED | {
    "silu_mul": (halved(nk.silu_mul), halved(nk.silu_mul_reference), silu),
    "gelu_mul": (halved(nk.gelu_mul), halved(nk.gelu_mul_reference), gelu),
}


def unit(packed, gelu):
    return OPS[("geglu" if gelu else "swiglu") if packed else ("gelu_mul" if gelu else "silu_mul")]


ops = pytest.mark.parametrize(("op", "reference", "activation"), OPS.values(), ids=OPS)
# The activation is a flag of one operator for each form.
compiled = pytest.mark.parametrize(
    ("op", "reference", "activation"), [OPS["geglu"], OPS["silu_mul"]], ids=["geglu", "silu_mul"]
)
pairs = pytest.mark.parametrize(("op", "reference", "packed"), PAIRS.values(), ids=PAIRS)


@ops
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_matches_the_formula_written_out(op, reference, activation, dtype, device):
    if _runtime.INTERPRET and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bfloat16 where a GPU rounds")
    x = torch.randn(5, 6, device=device).to(dtype)
    rows = [[activation(r[i]) * r[i + 3] for i in range(3)] for r in x.double().tolist()]
    exact = torch.tensor(rows, dtype=torch.float64, device=device)
    ulps = 2 if dtype is torch.float32 else 0  # 16 bits: nothing but the last rounding
    assert_within_budget(op(x), exact.to(dtype), exact, ulps=ulps)


@covering(
    packed=[False, True],
    gelu=[False, True],
    dtype=DTYPES,
    shape=[(2,), (1, 16), (2, 3, 100), (0, 8), (0, 3, 8), (3, 2304), (3, 4096), (33, 130)],
)
def test_matches_the_reference_and_its_gradient(packed, gelu, dtype, shape, device):
    op, reference, _ = unit(packed, gelu)
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
@settings(max_examples=examples(12), deadline=None, derandomize=True)
@given(rows=st.integers(1, 40), F=st.integers(1, 300), dtype=st.sampled_from(DTYPES))
def test_any_shape(op, reference, activation, rows, F, dtype):
    torch.manual_seed(0)
    assert_parity(op, reference, [torch.randn(rows, 2 * F, device=DEVICE).to(dtype)])


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # the interpreter's
@ops
def test_values_that_no_float32_exponential_holds(op, reference, activation):
    """Gates of +-1e30 and +-200: no overflow becomes a NaN, forward or backward."""
    g = torch.tensor([1e30, -1e30, 200.0, -200.0, 0.0, -0.0], device=DEVICE)
    x = torch.cat([g, torch.full_like(g, 0.5)]).requires_grad_()
    y = op(x)
    y.sum().backward()
    torch.testing.assert_close(y, torch.tensor([5e29, 0, 100.0, 0, 0, 0], device=DEVICE))
    torch.testing.assert_close(
        x.grad, torch.cat([g.new_tensor([0.5, 0, 0.5, 0, 0.25, 0.25]), g.clamp(min=0)])
    )


@ops
def test_the_value_gets_the_activated_gradient(op, reference, activation):
    """The gradient of the second half is ``dy * act(g)``, which `op` computes from values of dy."""
    g, b, dy = torch.randn(3, 7, 40, device=DEVICE)
    x = torch.cat([g, b], -1).requires_grad_()
    op(x).backward(dy)
    assert torch.equal(x.grad[:, 40:], op(torch.cat([g, dy], -1)))


@ops
def test_linear_in_the_value(op, reference, activation):
    g, b = torch.randn(2, 7, 40, device=DEVICE)
    assert torch.equal(op(torch.cat([g, 4 * b], -1)), 4 * op(torch.cat([g, b], -1)))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t(),
    "every second channel": lambda x: x[:, ::2],
    "every second row": lambda x: x[::2],
    "slice of wider rows": lambda x: x[:, 8:-8],
    "one row repeated": lambda x: x[:1].expand(6, -1),
    "reversed axes": lambda x: x.view(4, 8, -1).permute(1, 0, 2),
}


@covering(packed=[False, True], gelu=[False, True], view=VIEWS)
def test_strided_rows(packed, gelu, view):
    """x is a view, and the gradient comes back as a slice of wider rows."""
    op, reference, _ = unit(packed, gelu)

    def strided(fn: Callable) -> Callable:
        def call(x: Tensor) -> Tensor:
            y = fn(VIEWS[view](x))
            return torch.cat([y, y.new_ones(*y.shape[:-1], 8)], dim=-1)

        return call

    x = torch.randn(32, 64, device=DEVICE).bfloat16()
    assert_parity(strided(op), strided(reference), [x])


@ops
def test_expanded_gradient(op, reference, activation):
    x = torch.randn(9, 96, device=DEVICE)
    assert_parity(lambda x: op(x).sum(), lambda x: reference(x).sum(), [x])


@ops
def test_gives_the_same_bits_twice_and_leaves_x_alone(op, reference, activation):
    x = torch.randn(41, 96, device=DEVICE).requires_grad_()
    before = x.detach().clone()
    y = op(x)
    dy = torch.randn_like(y)
    first, again = (torch.autograd.grad(y, x, dy, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, again)
    assert torch.equal(x, before)


@ops
def test_autocast_changes_nothing(op, reference, activation):
    """Arithmetic is float32 already, and the result has the dtype of x."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, 96, device=DEVICE).to(dtype)
        plain = op(x)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            cast = op(x)
        assert cast.dtype == dtype
        assert torch.equal(plain, cast)


@compiled
def test_a_dynamic_number_of_rows_compiles_once(op, reference, activation):
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.compiler.set_stance("default"):
        assert_parity(compiled, reference, [torch.randn(5, 96, device=DEVICE)])
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (7, 40):
            assert_parity(compiled, reference, [torch.randn(rows, 96, device=DEVICE)])


@runs_kernel
@pytest.mark.parametrize("gelu", [False, True])
def test_registration(gelu):
    x = torch.randn(5, 96, device=DEVICE).bfloat16()
    torch.library.opcheck(module._forward, (x, gelu))
    torch.library.opcheck(module._backward, (x[:, :48], x, gelu))
    torch.library.opcheck(module._backward, (x[:, ::2], x.t().contiguous().t(), gelu))


@pairs
def test_two_tensors_give_the_bits_of_the_packed_one(op, reference, packed):
    x = torch.randn(33, 130, device=DEVICE).bfloat16().requires_grad_()
    dy = torch.randn(33, 65, device=DEVICE).bfloat16()
    parts = [half.detach().clone().requires_grad_() for half in x.chunk(2, dim=-1)]
    y, expected = op(*parts), packed(x)
    assert torch.equal(y, expected)
    grads = torch.autograd.grad(y, parts, dy)
    assert torch.equal(torch.cat(grads, -1), torch.autograd.grad(expected, x, dy)[0])


def wide_rows(x: Tensor) -> Tensor:
    return torch.cat([x, x], dim=-1)[..., : x.shape[-1]]


MIXED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "gate in wider rows": (wide_rows, lambda x: x),
    "up in wider rows": (lambda x: x, wide_rows),
    "up repeated": (lambda x: x, lambda x: x[:1].expand_as(x)),
    "gate transposed": (lambda x: x.t().contiguous().t(), lambda x: x),
}


@pytest.mark.parametrize(("op", "reference", "packed"), [PAIRS["silu_mul"]], ids=["silu_mul"])
@pytest.mark.parametrize("layout", MIXED)
def test_each_tensor_has_strides_of_its_own(op, reference, packed, layout):
    first, second = MIXED[layout]
    inputs = list(torch.randn(2, 9, 100, device=DEVICE).half())

    def mixed(fn: Callable) -> Callable:
        return lambda gate, up: fn(first(gate), second(up))

    assert_parity(mixed(op), mixed(reference), inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recorded", [True, False])
def test_over_the_gate_are_the_same_bits(recorded, dtype, device):
    """Overwritten only where it saves something: on a CPU, in float32, without a graph."""
    gate, up = torch.randn(2, 5, 24, device=device).to(dtype)
    before = gate.clone()
    with torch.set_grad_enabled(recorded):
        y = module.silu_mul_over(gate, up)
    assert torch.equal(y, nk.silu_mul(before, up))
    kept = recorded or dtype is not torch.float32 or _runtime.use_kernel(gate)
    assert torch.equal(gate, before) == kept
    assert (y.data_ptr() == gate.data_ptr()) != kept


@pairs
def test_one_of_two_tensors_may_need_no_gradient(op, reference, packed):
    both = [half.requires_grad_() for half in torch.randn(2, 5, 96, device=DEVICE)]
    expected = torch.autograd.grad(op(*both).sum(), both)
    for i in (0, 1):
        parts = [half.detach().requires_grad_(i == j) for j, half in enumerate(both)]
        op(*parts).sum().backward()
        assert torch.equal(parts[i].grad, expected[i])
        assert parts[1 - i].grad is None


@runs_kernel
@pytest.mark.parametrize("gelu", [False, True])
def test_registration_of_two_tensors(gelu):
    gate, up = torch.randn(2, 5, 96, device=DEVICE).bfloat16()
    torch.library.opcheck(module._pair_forward, (gate, up.t().contiguous().t(), gelu))
    torch.library.opcheck(module._pair_backward, (wide_rows(up), wide_rows(gate), up, gelu))


@runs_kernel
def test_rows_of_a_projection_are_not_copied(monkeypatch):
    seen = []
    launch = module._launch
    monkeypatch.setattr(module, "_launch", lambda *a: (seen.extend(a[3]), launch(*a)))
    x = torch.randn(4, 2, 3 * 64, device=DEVICE, requires_grad=True)
    gate, up, _ = x.chunk(3, dim=-1)
    y = nk.silu_mul(gate, up)
    y.backward(dy := torch.randn_like(y))
    forward, backward = seen[:3], seen[3:]
    assert [t.data_ptr() for t in forward] == [t.data_ptr() for t in (gate, up, y)]
    assert [t.data_ptr() for t in backward[:3]] == [t.data_ptr() for t in (dy, gate, up)]


@runs_kernel
@pytest.mark.parametrize("gelu", [False, True])
def test_nothing_is_written_behind_the_results(gelu):
    """The columns that a block has too many would end in the next row, and behind the last one."""
    rows, F = 3, 100
    gate, up, dy = torch.randn(3, rows, F, device=DEVICE)
    y, dgate, dup = torch.full((3, rows * F + 512), 7.0, device=DEVICE)
    module._launch(False, gelu, F, (gate, up, y), (F, F))
    tensors = (dy, gate, up, dgate, dup)
    module._launch(True, gelu, F, tensors, (F, F, F, F))
    for written, expected in [
        (y, module._pair_forward(gate, up, gelu)),
        *zip((dgate, dup), module._pair_backward(dy, gate, up, gelu), strict=True),
    ]:
        assert (written[rows * F :] == 7).all()
        assert torch.equal(written[: rows * F].view(rows, F), expected)


@pytest.mark.parametrize("F", [1, 127, 1152, 2048, 2624, 3072, 16384])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_block_fills_its_lanes(F, itemsize):
    tile = module.choice(F, itemsize)
    assert tile.columns * tile.rows * itemsize == 2 * 16 * 32 * tile.warps
    assert tile.columns * itemsize >= 128
    if F % 64 == 0:
        assert F % tile.columns == 0


@needs_gpu
@ops
def test_a_cuda_graph_replays_the_same_bits(op, reference, activation):
    x = torch.randn(64, 4096, device=DEVICE).bfloat16()
    before = op(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = op(x)
    graph.replay()
    assert torch.equal(before, replayed)


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs 20 GB of GPU memory")
@ops
def test_more_than_two_to_the_31_elements(op, reference, activation):
    x = torch.randn(2**31 // 4096 + 3, 4096, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    y = op(x)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    last, ones = x.detach()[-2:], [torch.ones_like(y[-2:])]
    rounded = outputs_and_gradients(reference, [last], ones)
    exact = outputs_and_gradients(reference, [last.double()], ones)
    for actual, r, e in zip((y, dx), rounded, exact, strict=True):
        assert_within_budget(actual.detach()[-2:], r, e)


@compiled
def test_compiles_to_one_graph(op, reference, activation, device):
    x = torch.randn(3, 8, device=device)
    torch.testing.assert_close(torch.compile(op, fullgraph=True, backend="aot_eager")(x), op(x))


@pytest.mark.parametrize(("op", "reference", "activation"), PACKED.values(), ids=PACKED)
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


@pairs
@pytest.mark.parametrize(
    ("gate", "up", "message"),
    [
        (torch.ones(2, 0), torch.ones(2, 0), "gate: expected at least one channel, got 0"),
        (torch.tensor(1.0), torch.ones(2), r"gate: expected at least 1 dimension\(s\), got shape"),
        (torch.ones(2).double(), torch.ones(2), "gate: expected dtype float32 or float16 or bfl"),
        ([1.0], torch.ones(1), "gate: expected a torch.Tensor, got list"),
        (torch.ones(2), None, "up: expected a torch.Tensor, got NoneType"),
        (
            torch.ones(3, 2),
            torch.ones(2),
            r"up: expected the shape of gate \(\(3, 2\)\), got \(2,\)",
        ),
        (
            torch.ones(2),
            torch.ones(2).half(),
            r"up: expected the dtype of gate \(float32\), got fl",
        ),
        (torch.ones(2), torch.ones(2, device="meta"), r"up: expected the device of gate \(cpu\)"),
    ],
)
def test_rejects_pairs(op, reference, packed, gate, up, message):
    with pytest.raises(ValueError, match=message):
        op(gate, up)
