"""layer_norm and add_layer_norm against mean and variance written out, and float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from covering import covering, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_parity, assert_within_budget, outputs_and_gradients
from torch import Tensor

import neobert_kernels as nk
from neobert_kernels import _runtime
from neobert_kernels.ops import _norms
from neobert_kernels.ops import layer_norm as module

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
runs_kernel = pytest.mark.skipif(
    DEVICE.type != "cuda" and not _runtime.INTERPRET, reason="no kernel runs on the CPU"
)
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
both = pytest.mark.parametrize("added", [False, True], ids=["layer_norm", "add_layer_norm"])
biased = pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])


def skip_truncated(dtype: torch.dtype) -> None:
    if _runtime.INTERPRET and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bfloat16 where a GPU rounds")


def inputs_of(
    added: bool,
    bias: bool,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    parameters: torch.dtype | None = None,
) -> list[Tensor]:
    """x, the residual if there is one, weight, and the bias if there is one."""
    x, r, w, b = make(shape, dtype, DEVICE, parameters)
    return [x, *[r] * added, w, *[b] * bias]


def with_eps(added: bool, bias: bool, eps: float = 1e-5) -> tuple[Callable, Callable]:
    """The operator and its reference as functions of what `inputs_of` returns."""

    def bound(fn: Callable) -> Callable:
        def call(*tensors: Tensor) -> Any:
            return fn(*tensors, *[None] * (not bias), eps)

        return call

    names = ("add_layer_norm", "add_layer_norm_reference")
    return tuple(bound(getattr(nk, name if added else name[4:])) for name in names)


def outputs(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


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
    skip_truncated(dtype)
    x, _, w, b = make((6, 24), dtype, device)
    exact = by_hand(x.double(), w.double(), b.double(), eps)
    ulps = 4 if dtype is torch.float32 else 0  # 16 bits: nothing but the last rounding
    assert_within_budget(nk.layer_norm(x, w, b, eps), exact.to(dtype), exact, ulps=ulps)


@covering(
    added=[False, True],
    bias=[False, True],
    dtype=DTYPES,
    shape=[
        (7, 768), (2, 3, 100), (1, 2), (9, 384), (5, 760), (3, 1152), (3, 1025), (3, 1792),
        (2, 4096), (64,),
    ],
)  # fmt: skip
def test_matches_the_reference_and_every_gradient(added, bias, dtype, shape):
    # The gradient of a row of few values cancels to nothing but rounding, unless eps is large.
    eps = 1e-5 if shape[-1] > 8 else 1.0
    assert_parity(*with_eps(added, bias, eps), inputs_of(added, bias, shape, dtype))


def test_the_widest_row():
    assert_parity(*with_eps(True, True), inputs_of(True, True, (1, 16384), torch.float32))


@both
@settings(max_examples=examples(12), deadline=None, derandomize=True)
@given(
    rows=st.integers(0, 13),
    C=st.integers(16, 400),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
)
def test_any_shape(added, rows, C, dtype, bias):
    torch.manual_seed(0)
    assert_parity(*with_eps(added, bias), inputs_of(added, bias, (rows, C), dtype))


@covering(added=[False, True], dtype=DTYPES[:2])  # 16 bits of either kind are cut alike
def test_rows_around_a_block(added, dtype):
    block = _norms.backward_plan(96, dtype.itemsize, 2, 2).tile.rows
    for rows in (block - 1, block, block + 1, 4 * block + 1):  # 4 programs interpreted
        assert_parity(*with_eps(added, True), inputs_of(added, True, (rows, 96), dtype))


@both
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 3])
def test_every_eps(added, eps):
    assert_parity(*with_eps(added, True, eps), inputs_of(added, True, (5, 96), torch.float32))


@both
@pytest.mark.parametrize("C", [96, 101], ids=["whole", "masked tail"])
def test_a_large_mean_costs_no_accuracy(added, C):
    """``mean(x**2) - mean(x)**2`` would have no digits left."""
    inputs = inputs_of(added, True, (5, C), torch.float32)
    inputs[0] += 3000.0
    assert_parity(*with_eps(added, True), inputs)


@both
@dtypes
@pytest.mark.parametrize(("value", "C"), [(1.5, 96), (1001.0, 760)])
def test_equal_values_give_the_bias(added, dtype, value, C):
    """Sums and mean are exact; a quotient that is not would be far off after `rsqrt`."""
    inputs = inputs_of(added, True, (4, C), dtype)
    for x in inputs[: 1 + added]:
        x.fill_(value)
    y = outputs(with_eps(added, True)[0](*inputs))[0]
    assert torch.equal(y, inputs[-1].expand(4, -1))


@both
def test_gradient_of_a_row_sums_to_zero(added):
    """Adding a constant to a row changes nothing."""
    x, *rest = inputs_of(added, True, (6, 96), torch.float32)
    x.requires_grad_()
    y = outputs(with_eps(added, True)[0](x, *rest))[0]
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert dx.sum(-1).abs().max() <= 96 * torch.finfo(torch.float32).eps * dx.abs().max()


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_parameters_of_other_dtypes(added, dtype):
    assert_parity(
        *with_eps(added, True), inputs_of(added, True, (9, 96), dtype, parameters=torch.float32)
    )
    *rest, bias = inputs_of(added, True, (9, 96), torch.float32, parameters=dtype)
    assert_parity(*with_eps(added, True), [*rest, bias.float()])


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t(),
    "every second channel": lambda x: x[:, ::2],
    "slice of wider rows": lambda x: x[:, 8:-8],
    "one row repeated": lambda x: x[:1].expand(6, -1),
    "reversed axes": lambda x: x.view(4, 8, -1).permute(1, 0, 2),
}


@both
@pytest.mark.parametrize("view", VIEWS)
def test_strided_rows(added, view):
    """x is a view, the residual is not, and each gradient comes back as a slice of wider rows."""
    x = torch.randn(32, 64, device=DEVICE).bfloat16()
    rest = inputs_of(added, True, tuple(VIEWS[view](x).shape), torch.bfloat16)[1:]

    def strided(fn: Callable) -> Callable:
        def call(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            outs = outputs(fn(VIEWS[view](x), *rest))
            return tuple(torch.cat([o, o.new_ones(*o.shape[:-1], 8)], dim=-1) for o in outs)

        return call

    op, reference = with_eps(added, True)
    assert_parity(strided(op), strided(reference), [x, *rest])


@both
def test_strided_parameters_and_residual(added):
    inputs = inputs_of(added, True, (6, 128), torch.bfloat16)

    def strided(fn: Callable) -> Callable:
        return lambda *args: fn(args[0][:, :64], *(arg[..., ::2] for arg in args[1:]))

    op, reference = with_eps(added, True)
    assert_parity(strided(op), strided(reference), inputs)


@both
def test_expanded_gradient(added):
    """``sum().backward()`` hands the kernel a gradient whose strides are all 0."""
    op, reference = (
        lambda *args, fn=fn: sum(out.sum() for out in outputs(fn(*args)))
        for fn in with_eps(added, True)
    )
    assert_parity(op, reference, inputs_of(added, True, (9, 96), torch.float32))


@pytest.mark.parametrize("used", [0, 1], ids=["y", "h"])
@dtypes
def test_backward_with_one_output_unused(used, dtype):
    x, residual, weight, bias = inputs_of(True, True, (9, 96), dtype)
    op, reference = (
        lambda *rows, fn=fn: fn(*rows, weight, bias)[used]
        for fn in (nk.add_layer_norm, nk.add_layer_norm_reference)
    )
    assert_parity(op, reference, [x, residual])


@both
@biased
def test_no_rows(added, bias):
    inputs = [t.requires_grad_() for t in inputs_of(added, bias, (0, 8), torch.float32)]
    outs = outputs(with_eps(added, bias)[0](*inputs))
    sum(out.sum() for out in outs).backward()
    assert all(out.shape == (0, 8) for out in outs)
    assert not any(t.grad.any() for t in inputs)


@both
def test_backward_gives_the_same_bits_twice(added):
    inputs = [t.requires_grad_() for t in inputs_of(added, True, (41, 96), torch.float32)]
    outs = outputs(with_eps(added, True)[0](*inputs))
    grads = [torch.randn_like(out) for out in outs]
    first, again = (torch.autograd.grad(outs, inputs, grads, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, again))


@both
def test_rows_do_not_touch_each_other(added):
    inputs = inputs_of(added, True, (37, 200), torch.bfloat16)
    op = with_eps(added, True)[0]
    before = outputs(op(*inputs))
    inputs[0][18] *= 2
    others = torch.arange(37, device=DEVICE) != 18
    for b, a in zip(before, outputs(op(*inputs)), strict=True):
        assert torch.equal(b[others], a[others])


@both
def test_autocast_changes_nothing(added):
    """Arithmetic is float32 already, and the result has the dtype of x."""
    op = with_eps(added, True)[0]
    for dtype in (torch.float32, torch.bfloat16):
        inputs = inputs_of(added, True, (5, 96), dtype, parameters=torch.float32)
        plain = outputs(op(*inputs))
        with torch.autocast(DEVICE.type, torch.bfloat16):
            cast = outputs(op(*inputs))
        assert [t.dtype for t in cast] == [dtype] * len(cast)
        assert all(map(torch.equal, plain, cast))


@both
@biased
def test_a_dynamic_number_of_rows_compiles_once(added, bias):
    torch.compiler.reset()
    op, reference = with_eps(added, bias)
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.compiler.set_stance("default"):
        assert_parity(compiled, reference, inputs_of(added, bias, (5, 96), torch.float32))
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (7, 40):
            assert_parity(compiled, reference, inputs_of(added, bias, (rows, 96), torch.float32))


@runs_kernel
@biased
def test_registration(bias):
    x, residual, weight, b = make((5, 96), torch.bfloat16, DEVICE)
    bias = b if bias else None
    torch.library.opcheck(module._forward, (x, weight, bias, 1e-5))
    torch.library.opcheck(module._add_forward, (x, residual, weight, bias, 1e-5))
    torch.library.opcheck(module._backward, (x, None, residual, weight, bias, 1e-5))
    torch.library.opcheck(module._backward, (x, x * 2, residual, weight, bias, 1e-5))


@needs_gpu
@both
def test_a_cuda_graph_replays_the_same_bits(added):
    inputs = inputs_of(added, True, (64, 768), torch.bfloat16)
    op = with_eps(added, True)[0]
    before = outputs(op(*inputs))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = outputs(op(*inputs))
    graph.replay()
    assert all(map(torch.equal, before, replayed))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs 20 GB of GPU memory")
def test_more_than_two_to_the_31_elements():
    x, weight, bias = inputs_of(False, True, (2**31 // 768 + 3, 768), torch.bfloat16)
    x.requires_grad_()
    y = nk.layer_norm(x, weight, bias)
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    last = [x.detach()[-2:], weight, bias]
    ones = [torch.ones_like(y[-2:])]
    rounded = outputs_and_gradients(nk.layer_norm_reference, last, ones)
    exact = outputs_and_gradients(nk.layer_norm_reference, [t.double() for t in last], ones)
    for actual, r, e in zip((y, dx), rounded, exact, strict=False):
        assert_within_budget(actual.detach()[-2:], r, e)


def test_no_bias_is_a_bias_of_zero(device):
    x, r, w, b = make((5, 16), torch.float32, device)
    assert torch.equal(nk.layer_norm(x, w), nk.layer_norm(x, w, b * 0))
    both = (nk.add_layer_norm(x, r, w, bias) for bias in (None, b * 0))
    assert all(map(torch.equal, *both))


@dtypes
def test_adding_is_the_norm_of_the_stored_sum(dtype, device):
    skip_truncated(dtype)
    x, r, w, b = make((9, 40), dtype, device)
    y, h = nk.add_layer_norm(x, r, w, b)
    assert torch.equal(h, x + r)
    assert torch.equal(y, nk.layer_norm(h, w, b))


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
