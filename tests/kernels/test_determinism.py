"""The same bits on every run, forward and backward: twice here, and a thousand times on a GPU."""

import pytest
import torch
from operator_cases import CASES, FULL, TINY, outputs, sample

from neobert_kernels import _runtime

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"


@pytest.mark.parametrize(("operator", "case"), CASES, ids=lambda value: value or "plain")
def test_the_same_bits_every_time(operator, case, repeats):
    if _runtime.INTERPRET and repeats <= 2:
        pytest.skip("slow, and the interpreter has one thread; asked for by --repeats")
    size, dtype = (FULL, torch.bfloat16) if CUDA else (TINY, torch.float32)
    given = sample(operator, case, size, DEVICE, dtype)
    first = outputs(operator, given)
    same = torch.ones((), dtype=torch.bool, device=DEVICE)  # asked once: no wait in every round
    for _ in range(repeats - 1):
        for actual, expected in zip(outputs(operator, given), first, strict=True):
            same &= (actual == expected).all()
    assert bool(same)
    assert all(bool(x.isfinite().all()) for x in first)


def test_every_operator_has_a_case():
    assert {operator for operator, _ in CASES} == set(_runtime.load_operators())
