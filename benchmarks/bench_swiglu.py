"""Gated units, of one packed tensor and of two, against eager PyTorch, torch.compile and Liger.

liger-kernel takes the two halves: of a packed tensor two copies, made before the time is taken,
since it would copy halves of one tensor first. It moves the same bytes. Its GELU is the tanh form.
"""

from collections.abc import Callable

import pytest
from memory_bound import Subject, liger, normal
from torch import Tensor
from torch.nn import functional as F

import neobert_kernels as nk
from neobert.floors import operators

Unit = Callable[..., Tensor]
# Ours, the contract, the activation, and liger-kernel's name for it.
PACKED: dict[str, tuple[Unit, Unit, Unit, str]] = {
    "swiglu": (nk.swiglu, nk.swiglu_reference, F.silu, "swiglu"),
    "geglu": (nk.geglu, nk.geglu_reference, F.gelu, "geglu"),
}
PAIRS: dict[str, tuple[Unit, Unit, Unit, str]] = {
    "silu_mul": (nk.silu_mul, nk.silu_mul_reference, F.silu, "swiglu"),
    "gelu_mul": (nk.gelu_mul, nk.gelu_mul_reference, F.gelu, "geglu"),
}


def of_two(activation: Unit) -> Unit:
    return lambda gate, up: activation(gate) * up


def of_one(activation: Unit) -> Unit:
    return lambda x: of_two(activation)(*x.chunk(2, dim=-1))


def halves(tensors: list[Tensor]) -> list[Tensor]:
    return [half.contiguous() for half in tensors[0].detach().chunk(2, dim=-1)]


def subject(name: str, width: int) -> Subject:
    packed = name in PACKED
    ours, reference, activation, theirs = (PACKED | PAIRS)[name]
    return Subject(
        name,
        ours,
        reference,
        (of_one if packed else of_two)(activation),
        normal(1, 0, 2 * width) if packed else normal(2, 0, width),
        cost=lambda rows, e: (
            operators.gated_unit(rows, width, e),
            operators.gated_unit_backward(rows, width, e),
        ),
        liger=liger(theirs),
        for_liger=halves if packed else list,
    )


@pytest.mark.parametrize("width", [1152, 2048])
@pytest.mark.parametrize("training", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", [*PACKED, *PAIRS])
def test_swiglu(
    name: str, training: bool, width: int, rows: int, compare: Callable[..., None]
) -> None:
    form = "" if name in PAIRS else " 2 x"
    compare(subject(name, width), f"{rows} x{form} {width}", rows, training)
