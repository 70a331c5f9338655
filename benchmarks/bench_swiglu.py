"""swiglu and geglu on one packed tensor against eager PyTorch, torch.compile and liger-kernel.

liger-kernel takes the two halves: here as two tensors, made before the time is taken, since it
would copy halves of one tensor first. It moves the same bytes. Its geglu has tanh, not erf.
"""

from collections.abc import Callable

import pytest
from memory_bound import Subject, liger, normal
from torch import Tensor
from torch.nn import functional as F

import neobert_kernels as nk
from neobert.floors import operators

OPS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]] = {
    "swiglu": (nk.swiglu, nk.swiglu_reference, F.silu),
    "geglu": (nk.geglu, nk.geglu_reference, F.gelu),
}


def eager(activation: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    def unit(x: Tensor) -> Tensor:
        g, b = x.chunk(2, dim=-1)
        return activation(g) * b

    return unit


def halves(tensors: list[Tensor]) -> list[Tensor]:
    return [half.contiguous() for half in tensors[0].detach().chunk(2, dim=-1)]


@pytest.mark.parametrize("width", [1152, 2048])
@pytest.mark.parametrize("training", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", OPS)
def test_swiglu(
    name: str, training: bool, width: int, rows: int, compare: Callable[..., None]
) -> None:
    ours, reference, activation = OPS[name]
    subject = Subject(
        name,
        ours,
        reference,
        eager(activation),
        normal(1, 0, 2 * width),
        cost=lambda rows, e: (
            operators.gated_unit(rows, width, e),
            operators.gated_unit_backward(rows, width, e),
        ),
        liger=liger(name),
        for_liger=halves,
    )
    compare(subject, f"{rows} x 2 x {width}", rows, training)
