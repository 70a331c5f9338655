"""rms_norm and add_rms_norm: one file, three runs: CPU reference, Triton interpreter, GPU."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from covering import covering, examples
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import assert_parity, assert_within_budget, outputs_and_gradients
from torch import Tensor

from neobert_kernels import _runtime
from neobert_kernels.ops import _norms
from neobert_kernels.ops import rms_norm as module
from neobert_kernels.ops.rms_norm import (
    add_rms_norm,
    add_rms_norm_reference,
    rms_norm,
    rms_norm_reference,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
runs_kernel = pytest.mark.skipif(
    DEVICE.type != "cuda" and not _runtime.INTERPRET, reason="no kernel runs on the CPU"
)
PAIRS = [(rms_norm, rms_norm_reference), (add_rms_norm, add_rms_norm_reference)]
both = pytest.mark.parametrize(("op", "reference"), PAIRS, ids=["rms_norm", "add_rms_norm"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make(
    op: Callable, shape: tuple[int, ...], dtype: torch.dtype, weight: torch.dtype | None = None
) -> list[Tensor]:
    count = 1 if op is rms_norm else 2
    rows = [torch.randn(shape, device=DEVICE).to(dtype) for _ in range(count)]
    return [*rows, torch.randn(shape[-1:], device=DEVICE).to(weight or dtype)]


def compare(op: Callable, reference: Callable, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    # The gradient of a row of few values cancels to nothing but rounding, unless eps is large.
    eps = 1e-5 if shape[-1] > 8 else 1.0
    assert_parity(lambda *a: op(*a, eps), lambda *a: reference(*a, eps), make(op, shape, dtype))


def formula(
    x: np.ndarray, weight: np.ndarray, eps: float, dy: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Output and gradients element by element, from the definition."""
    y, dx, dweight = np.zeros_like(x), np.zeros_like(x), np.zeros_like(weight)
    C = x.shape[1]
    for r in range(len(x)):
        s = (sum(v * v for v in x[r]) / C + eps) ** -0.5
        for c in range(C):
            y[r, c] = weight[c] * x[r, c] * s
            dweight[c] += dy[r, c] * x[r, c] * s
            for d in range(C):  # d y[d] / d x[c]
                direct = s if c == d else 0.0
                dx[r, c] += dy[r, d] * weight[d] * (direct - x[r, d] * x[r, c] * s**3 / C)
    return y, dx, dweight


@pytest.mark.parametrize("added", [False, True])
def test_reference_is_the_definition(added: bool) -> None:
    x, r, dy, dh = torch.randn(4, 5, 7, dtype=torch.float64)
    weight = torch.randn(7, dtype=torch.float64)
    if added:
        y, h, dx, dr, dweight = outputs_and_gradients(
            lambda *args: add_rms_norm_reference(*args, eps=0.1), [x, r, weight], [dy, dh]
        )
        torch.testing.assert_close(h, x + r)
        torch.testing.assert_close(dx, dr)
        dx, x = dx - dh, x + r
    else:
        y, dx, dweight = outputs_and_gradients(
            lambda *args: rms_norm_reference(*args, eps=0.1), [x, weight], [dy]
        )
    expected = formula(x.numpy(), weight.numpy(), 0.1, dy.numpy())
    for actual, value in zip((y, dx, dweight), expected, strict=True):
        torch.testing.assert_close(actual, torch.from_numpy(value))


@covering(
    added=[False, True],
    dtype=DTYPES,
    shape=[
        (1, 1), (1, 2), (199, 96), (7, 768), (9, 384), (5, 760), (2, 3, 100), (5, 1025),
        (3, 1152), (5, 1792), (2, 4096), (64,),
    ],
)  # fmt: skip
def test_matches_float64(added: bool, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    compare(*PAIRS[added], shape, dtype)


def test_the_widest_row() -> None:
    compare(rms_norm, rms_norm_reference, (1, 16384), torch.bfloat16)


@both
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)  # 16 bits of either kind are cut alike
def test_rows_around_a_block(op: Callable, reference: Callable, dtype: torch.dtype) -> None:
    block = _norms.backward_plan(96, dtype.itemsize, 2, 1).tile.rows
    for rows in (block - 1, block, block + 1, 4 * block, 4 * block + 1):  # 4 programs interpreted
        compare(op, reference, (rows, 96), dtype)


@both
@settings(max_examples=examples(12), deadline=None, derandomize=True)
@given(rows=st.integers(0, 13), C=st.integers(16, 400), dtype=st.sampled_from(DTYPES))
def test_any_shape(
    op: Callable, reference: Callable, rows: int, C: int, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    compare(op, reference, (rows, C), dtype)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weight_of_another_dtype(op: Callable, reference: Callable, dtype: torch.dtype) -> None:
    assert_parity(op, reference, make(op, (9, 96), dtype, weight=torch.float32))
    assert_parity(op, reference, make(op, (9, 96), torch.float32, weight=dtype))


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.t(),
    "every second channel": lambda x: x[:, ::2],
    "every second row": lambda x: x[::2],
    "slice of wider rows": lambda x: x[:, 8:-8],
    "one row repeated": lambda x: x[:1].expand(6, -1),
    "reversed axes": lambda x: x.view(4, 8, -1).permute(1, 0, 2),
}


@both
@pytest.mark.parametrize("view", VIEWS)
def test_strided_rows(op: Callable, reference: Callable, view: str) -> None:
    """x is a view, the residual is not, and each gradient comes back as a slice of wider rows."""
    x = torch.randn(32, 64, device=DEVICE).bfloat16()
    seen = VIEWS[view](x)
    rest = make(op, tuple(seen.shape), torch.bfloat16)[1:]

    def strided(fn: Callable) -> Callable:
        def call(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            outs = fn(VIEWS[view](x), *rest)
            outs = outs if isinstance(outs, tuple) else (outs,)
            more = (out.new_ones(*out.shape[:-1], 8 * i) for i, out in enumerate(outs, start=1))
            return tuple(torch.cat(pair, dim=-1) for pair in zip(outs, more, strict=True))

        return call

    assert_parity(strided(op), strided(reference), [x, *rest])


@both
def test_strided_weight_and_residual(op: Callable, reference: Callable) -> None:
    *rows, weight = make(op, (6, 128), torch.bfloat16)

    def strided(fn: Callable) -> Callable:
        return lambda *args: fn(args[0][:, :64], *(arg[..., ::2] for arg in args[1:]))

    assert_parity(strided(op), strided(reference), [*rows, weight])


@both
def test_expanded_gradient(op: Callable, reference: Callable) -> None:
    """``sum().backward()`` hands the kernel a gradient whose strides are all 0."""

    def summed(fn: Callable) -> Callable:
        def call(*args: Tensor) -> Tensor:
            outs = fn(*args)
            return sum(out.sum() for out in (outs if isinstance(outs, tuple) else (outs,)))

        return call

    assert_parity(summed(op), summed(reference), make(op, (9, 96), torch.float32))


@pytest.mark.parametrize("used", [0, 1], ids=["y", "h"])
@every_dtype
def test_backward_with_one_output_unused(used: int, dtype: torch.dtype) -> None:
    *rows, weight = make(add_rms_norm, (9, 96), dtype)
    assert_parity(
        lambda *rows: add_rms_norm(*rows, weight)[used],
        lambda *rows: add_rms_norm_reference(*rows, weight)[used],
        rows,
    )


@both
def test_only_the_gradients_that_are_asked_for(op: Callable, reference: Callable) -> None:
    inputs = make(op, (9, 96), torch.float32)
    for i in range(len(inputs)):
        leaves = [t.clone().requires_grad_(i == j) for j, t in enumerate(inputs)]
        outs = op(*leaves)
        sum(out.sum() for out in (outs if isinstance(outs, tuple) else (outs,))).backward()
        assert [t.grad is not None for t in leaves] == [i == j for j in range(len(inputs))]


@every_dtype
def test_add_is_the_norm_of_the_sum_bit_for_bit(dtype: torch.dtype) -> None:
    if _runtime.INTERPRET and dtype is torch.bfloat16:
        pytest.skip("Triton's interpreter truncates to bfloat16 where a GPU rounds")
    x, residual, weight = make(add_rms_norm, (13, 200), dtype)
    y, h = add_rms_norm(x, residual, weight)
    assert torch.equal(h, x + residual)
    assert torch.equal(y, rms_norm(x + residual, weight))


@both
@every_dtype
def test_eps_bounds_small_rows(op: Callable, reference: Callable, dtype: torch.dtype) -> None:
    inputs = make(op, (4, 96), dtype)
    small = [x * 1e-3 for x in inputs[:-1]]
    for x in small:
        x[0] = 0.0
    assert_parity(op, reference, [*small, inputs[-1]])
    y = rms_norm(small[0], inputs[-1])
    assert not y[0].any()
    assert y.isfinite().all()


@both
@pytest.mark.parametrize("eps", [0.0, 1e-12, 1e-5, 0.5, 3])
def test_every_eps(op: Callable, reference: Callable, eps: float) -> None:
    inputs = make(op, (5, 96), torch.float32)
    assert_parity(lambda *a: op(*a, eps), lambda *a: reference(*a, eps), inputs)


@every_dtype
@pytest.mark.parametrize("power", [-3, 5])
def test_scaling_rows_and_eps_together_changes_nothing(dtype: torch.dtype, power: int) -> None:
    x, weight = make(rms_norm, (5, 96), dtype)
    scaled = rms_norm(x * 2.0**power, weight, 0.25 * 4.0**power)
    assert torch.equal(scaled, rms_norm(x, weight, 0.25))


@both
def test_squares_of_large_halves_do_not_overflow(op: Callable, reference: Callable) -> None:
    inputs = make(op, (5, 96), torch.float16)
    assert_parity(op, reference, [*(x.clamp(-3, 3) * 1e4 for x in inputs[:-1]), inputs[-1]])


@both
@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8)], ids=str)
def test_no_rows(op: Callable, reference: Callable, shape: tuple[int, ...]) -> None:
    inputs = [t.requires_grad_() for t in make(op, shape, torch.float32)]
    outs = op(*inputs)
    for out in outs if isinstance(outs, tuple) else (outs,):
        assert out.shape == shape
        out.sum().backward(retain_graph=True)
    assert inputs[0].grad.shape == shape
    assert not inputs[-1].grad.any()


@both
def test_backward_gives_the_same_bits_twice(op: Callable, reference: Callable) -> None:
    inputs = [t.requires_grad_() for t in make(op, (41, 96), torch.float32)]
    outs = op(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    grads = [torch.randn_like(out) for out in outs]
    first, again = (torch.autograd.grad(outs, inputs, grads, retain_graph=True) for _ in range(2))
    assert all(map(torch.equal, first, again))


@both
def test_rows_do_not_touch_each_other(op: Callable, reference: Callable) -> None:
    inputs = make(op, (37, 200), torch.bfloat16)
    before = op(*inputs)
    inputs[0][18] += 1.0
    after = op(*inputs)
    others = torch.arange(37, device=DEVICE) != 18
    for b, a in zip(
        before if isinstance(before, tuple) else (before,),
        after if isinstance(after, tuple) else (after,),
        strict=True,
    ):
        assert torch.equal(b[others], a[others])
        assert not torch.equal(b, a)


@both
def test_compiles_to_one_graph(op: Callable, reference: Callable) -> None:
    inputs = make(op, (5, 96), torch.float32)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    assert_parity(compiled, reference, inputs)


@both
def test_a_dynamic_number_of_rows_compiles_once(op: Callable, reference: Callable) -> None:
    torch.compiler.reset()
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.compiler.set_stance("default"):
        assert_parity(compiled, reference, make(op, (5, 96), torch.float32))
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows in (7, 40):
            assert_parity(compiled, reference, make(op, (rows, 96), torch.float32))


@runs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_registration(dtype: torch.dtype) -> None:
    x, residual, weight = make(add_rms_norm, (5, 96), dtype)
    torch.library.opcheck(module._forward, (x, weight, 1e-5))
    torch.library.opcheck(module._add_forward, (x, residual, weight, 1e-5))
    torch.library.opcheck(module._backward, (x, None, residual, weight, 1e-5))
    torch.library.opcheck(module._backward, (x, x.t().contiguous().t(), residual, weight, 1e-5))


@runs_kernel
@both
def test_outputs_are_contiguous(op: Callable, reference: Callable) -> None:
    inputs = [x.t() if x.ndim == 2 else x for x in make(op, (8, 8), torch.float32)]
    outs = op(*inputs)
    assert all(out.is_contiguous() for out in (outs if isinstance(outs, tuple) else (outs,)))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs 20 GB of GPU memory")
@both
def test_more_than_two_to_the_31_elements(op: Callable, reference: Callable) -> None:
    rows, C = 2**31 // 768 + 3, 768
    inputs = [t.requires_grad_() for t in make(op, (rows, C), torch.bfloat16)]
    outs = op(*inputs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    grads = torch.autograd.grad(outs, inputs[:-1], [torch.ones_like(out) for out in outs])
    last = [t.detach()[-2:] if t.ndim == 2 else t.detach() for t in inputs]
    ones = [torch.ones_like(out[-2:]) for out in outs]
    rounded = outputs_and_gradients(reference, last, ones)
    exact = outputs_and_gradients(reference, [t.double() for t in last], ones)
    for actual, r, e in zip([*outs, *grads], rounded, exact, strict=False):
        assert_within_budget(actual.detach()[-2:], r, e)


@pytest.mark.parametrize("C", [1, 2, 127, 384, 768, 1152, 1792, 2304, 4097, 16384])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("per_lane", [28, 32])
def test_every_choice_covers_its_row_with_whole_warps(C: int, itemsize: int, per_lane: int) -> None:
    tile = _norms.choice(C, itemsize, per_lane)
    lanes = tile.chunk * itemsize // 16
    assert lanes * tile.rows == 32 * tile.warps
    assert tile.warps in (4, 8, 16, 32)
    assert C % tile.chunk <= tile.tail <= tile.chunk
    assert tile.per_lane <= per_lane


@pytest.mark.parametrize("C", [256, 384, 768, 1024, 1152, 1792, 2304, 4096])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("per_lane", [28, 32])
def test_no_lane_idles_at_common_widths(C: int, itemsize: int, per_lane: int) -> None:
    tile = _norms.choice(C, itemsize, per_lane)
    assert C % tile.chunk in (0, tile.tail)


X, W = torch.ones(2, 4), torch.ones(4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1.0]], W), "x: expected a torch.Tensor, got list"),
        ((torch.tensor(1.0), W), "x: expected at least 1 dimension"),
        ((X.double(), W), "x: expected dtype float32 or float16 or bfloat16, got float64"),
        ((X.long(), W), "x: expected dtype .*, got int64"),
        ((torch.ones(2, 0), torch.ones(0)), "x: expected 1 to 16384 channels, got 0"),
        ((torch.ones(1, 16385), torch.ones(16385)), "x: expected 1 to 16384 .*, got 16385"),
        ((X, torch.ones(3)), r"weight: expected shape \(4,\), got \(3,\)"),
        ((X, torch.ones(1, 4)), r"weight: expected shape \(4,\), got \(1, 4\)"),
        ((X, W.double()), "weight: expected dtype .*, got float64"),
        ((X, None), "weight: expected a torch.Tensor, got NoneType"),
        ((X, W.to("meta")), "weight: expected device cpu, got meta"),
        ((X, W, -1e-5), "eps: expected a finite number, at least 0, got -1e-05"),
        ((X, W, float("nan")), "eps: expected .*, got nan"),
        ((X, W, float("inf")), "eps: expected .*, got inf"),
        ((X, W, "1e-5"), "eps: expected a number, got str"),
    ],
)
def test_rejects(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rms_norm(*arguments)
    x, *rest = arguments
    with pytest.raises(ValueError, match=message):
        add_rms_norm(x, x, *rest)


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        (None, "residual: expected a torch.Tensor, got NoneType"),
        (torch.ones(1, 4), r"residual: expected the shape of x \(\(2, 4\)\), got \(1, 4\)"),
        (X.half(), r"residual: expected the dtype of x \(float32\), got float16"),
        (X.to("meta"), r"residual: expected the device of x \(cpu\), got meta"),
    ],
)
def test_add_rejects(residual: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        add_rms_norm(X, residual, W)
