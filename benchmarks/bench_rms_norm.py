"""rms_norm and add_rms_norm against eager PyTorch, torch.compile and liger-kernel."""

from collections.abc import Callable

import pytest
from memory_bound import Subject, liger, norm_costs, normal
from torch import Tensor
from torch.nn import functional as F

import neobert_kernels as nk

EPS = 1e-5
IN_PLACE = False  # liger-kernel's backward would write over the gradient that comes in


def eager_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, EPS)


def eager_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    h = x + residual
    return F.rms_norm(h, weight.shape, weight, EPS), h


def subject(name: str, width: int) -> Subject:
    if name == "rms_norm":
        return Subject(
            name,
            nk.rms_norm,
            nk.rms_norm_reference,
            eager_rms_norm,
            normal(1, 1, width),
            cost=norm_costs(width, added=False, centered=False),
            liger=liger("rms_norm", EPS, 0.0, "llama", IN_PLACE),
        )
    return Subject(
        name,
        nk.add_rms_norm,
        nk.add_rms_norm_reference,
        eager_add_rms_norm,
        normal(2, 1, width),
        cost=norm_costs(width, added=True, centered=False),
        liger=liger("fused_add_rms_norm", EPS, 0.0, "llama", IN_PLACE),
    )


@pytest.mark.parametrize("width", [768, 1024])
@pytest.mark.parametrize("training", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm"])
def test_rms_norm(
    name: str, training: bool, width: int, rows: int, compare: Callable[..., None]
) -> None:
    compare(subject(name, width), f"{rows} x {width}", rows, training)
