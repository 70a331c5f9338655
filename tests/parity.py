"""The error budget: an operator may be twice as far from float64 as its same-dtype reference.

A rounding floor of ``ulps`` units in the last place of the largest value is added, because a
reference may happen to be exact. Tolerances come from here and nowhere else.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def assert_within_budget(
    actual: Tensor, rounded: Tensor, exact: Tensor, what: str = "output", ulps: float = 2
) -> None:
    """``actual`` may be twice as far from ``exact`` (float64) as ``rounded`` (same dtype) is."""
    assert (actual.dtype, actual.shape) == (rounded.dtype, rounded.shape), what
    assert exact.dtype == torch.float64, f"{what}: the oracle computed in {exact.dtype}"
    if not exact.numel():
        return
    floor = ulps * torch.finfo(actual.dtype).eps * exact.abs().max()
    budget = 2 * (rounded.double() - exact).abs().max() + floor
    error = (actual.double() - exact).abs().max()
    assert error <= budget, f"{what}: error {error:.3e} over budget {budget:.3e}"


def _outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def outputs_and_gradients(fn: Callable, inputs: Sequence[Any], grads: Sequence[Tensor]) -> list:
    """Every output of ``fn`` and the gradient of every floating-point input."""
    leaves = [
        t.detach().clone().requires_grad_() if _is_float(t) else t for t in inputs
    ]  # clone keeps the strides of dense tensors
    outs = _outputs(fn(*leaves))
    roots = [(out, g.to(out.dtype)) for out, g in zip(outs, grads, strict=True)]
    torch.autograd.backward([out for out, _ in roots], [g for _, g in roots])
    return [out.detach() for out in outs] + [t.grad for t in leaves if _is_float(t)]


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def assert_parity(
    op: Callable, reference: Callable, inputs: Sequence[Any], ulps: float = 2
) -> None:
    """Compare outputs and every gradient of ``op`` with ``reference`` run in float64."""
    with torch.no_grad():  # the reference, because kernels in the interpreter take their time
        shapes = [(out.shape, out.dtype, out.device) for out in _outputs(reference(*inputs))]
    grads = [torch.randn(shape, dtype=dtype, device=device) for shape, dtype, device in shapes]
    actual = outputs_and_gradients(op, inputs, grads)
    rounded = outputs_and_gradients(reference, inputs, grads)
    wide = [t.double() if _is_float(t) else t for t in inputs]
    exact = outputs_and_gradients(reference, wide, grads)
    for i, (a, r, e) in enumerate(zip(actual, rounded, exact, strict=True)):
        assert_within_budget(a, r, e, f"value {i} of {len(actual)}", ulps)


def long_sums(dtype: torch.dtype) -> float:
    """``ulps`` of products: in float32 a GPU adds hundreds in a row, its reference in parts."""
    return 4 if dtype == torch.float32 and torch.cuda.is_available() else 2


LAYERS = 3  # of the models that the tests build


def assert_same(actual: Tensor, rounded: Tensor, exact: Tensor, what: str = "output") -> None:
    """The budget for a whole model, whose roundings pass through all its layers.

    A few logits may be ten times as close to float64 as the hidden states they are made of, by
    luck: the reference's error says little there, and the floor is what layers do to a rounding.
    """
    ulps = 8 * LAYERS
    assert_within_budget(actual.detach(), rounded.detach(), exact.detach(), what, ulps)


def assert_same_gradients(actual: Any, rounded: Any, exact: Any) -> None:
    """Every parameter's gradient of three models, after their backward.

    The same budget on the norm: behind a whole model single elements are rounding noise. A bias's
    gradient sums the rows that, times their inputs, make its weight's, and may be what remains of
    them: a key's bias has none in exact arithmetic. So the weight's gradient is its floor.
    """
    exact_grads = {name: p.grad for name, p in exact.named_parameters() if p.grad is not None}
    largest = max(grad.norm() for grad in exact_grads.values())
    pairs = zip(actual.named_parameters(), rounded.parameters(), strict=True)
    for (name, a), r in pairs:
        assert (a.grad is None) == (r.grad is None) == (name not in exact_grads), name
        if a.grad is not None:
            e = exact_grads[name]
            beside = exact_grads.get(f"{name.rpartition('.')[0]}.weight", e)
            error, reference = ((p.grad.double() - e).norm() for p in (a, r))
            scale = max(e.norm(), beside.norm()) + largest / 100
            floor = 4 * torch.finfo(a.dtype).eps * scale
            assert error <= 2 * reference + floor, f"{name}: {error:.3e} of {e.norm():.3e}"
