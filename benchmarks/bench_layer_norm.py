"""layer_norm and add_layer_norm, with a bias, against eager PyTorch, torch.compile, liger-kernel.

liger-kernel has no residual form: there it is the sum, then its layer norm.
"""

from collections.abc import Callable

import pytest
from memory_bound import Subject, liger, norm_costs, normal
from torch import Tensor
from torch.nn import functional as F

import neobert_kernels as nk

EPS = 1e-5
liger_layer_norm = liger("layer_norm", EPS)


def eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def after_sum(norm: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def add_norm(
        x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        h = x + residual
        return norm(h, weight, bias), h

    return add_norm


def subject(added: bool, width: int) -> Subject:
    if added:
        return Subject(
            "add_layer_norm",
            nk.add_layer_norm,
            nk.add_layer_norm_reference,
            after_sum(eager),
            normal(2, 2, width),
            cost=norm_costs(width, added=True, centered=True, bias=True),
            liger=after_sum(liger_layer_norm),
        )
    return Subject(
        "layer_norm",
        nk.layer_norm,
        nk.layer_norm_reference,
        eager,
        normal(1, 2, width),
        cost=norm_costs(width, added=False, centered=True, bias=True),
        liger=liger_layer_norm,
    )


@pytest.mark.parametrize("width", [768, 1024])
@pytest.mark.parametrize("training", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("added", [False, True], ids=["layer_norm", "add_layer_norm"])
def test_layer_norm(
    added: bool, training: bool, width: int, rows: int, compare: Callable[..., None]
) -> None:
    compare(subject(added, width), f"{rows} x {width}", rows, training)
