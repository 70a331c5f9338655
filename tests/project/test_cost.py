"""FLOP counted from a model's Linear layers, and the GEMM rate measured at their shapes."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from neobert.cost import GemmMeter, LinearShape, flop_per_token, linear_shapes


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(50, 8)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 24), nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(3)
        )
        self.pooler = nn.Linear(8, 8)


def test_counts_linear_layers_but_no_pooler() -> None:
    shapes = linear_shapes(Encoder())
    assert shapes == (LinearShape(8, 24, 3), LinearShape(8, 8, 3))
    assert flop_per_token(shapes) == 3 * (2 * 8 * 24 + 2 * 8 * 8)


def test_meter_appends_one_rate_to_every_case() -> None:
    meter = GemmMeter([LinearShape(8, 24, 2), LinearShape(24, 8, 1)], threads=2, rows=(4, 16))
    for _ in range(2):
        meter.measure(seconds=0.01)
    assert {(case.rows, case.parallel) for case in meter.cases} == {
        (rows, parallel) for rows in (4, 16) for parallel in (False, True)
    }
    assert all(len(case.rates) == 2 and min(case.rates) > 0 for case in meter.cases)
    assert meter.best.flop_per_second == max(case.flop_per_second for case in meter.cases)


def test_new_threads_get_the_setting_from_before() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        GemmMeter([LinearShape(8, 8, 1)], threads=2, rows=(4,)).measure(seconds=0.01)
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


def test_one_thread_has_no_parallel_case() -> None:
    assert not any(case.parallel for case in GemmMeter([LinearShape(8, 8, 1)], threads=1).cases)


def test_rejects_a_model_without_linear_layers() -> None:
    with pytest.raises(ValueError, match="shapes: expected at least one Linear layer"):
        GemmMeter(linear_shapes(nn.LayerNorm(8)))
