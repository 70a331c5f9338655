"""rope on one packed projection against eager PyTorch, torch.compile and liger-kernel."""

from collections.abc import Callable

import pytest
import torch
from memory_bound import Subject, liger
from torch import Tensor

import neobert_kernels as nk
from neobert.floors import operators

H, D = 12, 64
liger_rope = liger("rope")


def of_liger(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """On ``[B, H, S, D]``, q and k together: k gets one head, the least."""
    q, k = x.transpose(0, 1)[None], x[:, :1].transpose(0, 1)[None]
    tables = (torch.cat([table, table], dim=-1)[None].to(x.dtype) for table in (cos, sin))
    return liger_rope(q, k, *tables)[0][0].transpose(0, 1)


def make(rows: int, device: str, dtype: torch.dtype) -> list[Tensor]:
    return [torch.randn(rows, H, 3, D, device=device, dtype=dtype)[:, :, 0]]


def tables(rows: int, device: str) -> list[Tensor]:
    return list(nk.rope_table(torch.arange(rows, device=device), D))


@pytest.mark.parametrize("layout", ["half-split", "interleaved"])
@pytest.mark.parametrize("training", [False, True], ids=["forward", "backward"])
def test_rope(layout: str, training: bool, rows: int, compare: Callable[..., None]) -> None:
    pairs = layout == "interleaved"

    def with_layout(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, cos, sin: function(x, cos, sin, pairs)

    subject = Subject(
        "rope",
        with_layout(nk.rope),
        with_layout(nk.rope_reference),
        with_layout(nk.rope_reference),
        make,
        cost=lambda rows, e: (operators.rope(rows, H, D, e),) * 2,
        fixed=tables,
        liger="turns half-split pairs only" if pairs else of_liger,
    )
    compare(subject, f"{layout}, {rows} x {H} x {D}", rows, training)
