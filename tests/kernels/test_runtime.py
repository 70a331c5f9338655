"""What every operator gets from its registration."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

import neobert_kernels as nk
from neobert_kernels import _runtime


def test_a_launch_runs_on_the_gpu_of_its_first_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins: two GPUs are seldom at hand."""
    entered: list[int] = []

    def enter(index: int) -> nullcontext:
        entered.append(index)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", enter)
    launch = _runtime._on_its_gpu(lambda x, *rest: (x.get_device(), *rest))
    for index in (0, 1):
        x = SimpleNamespace(get_device=lambda index=index: index)
        assert launch(x, "option") == (index, "option")
    assert entered == [1]


def test_an_unknown_operator_is_named() -> None:
    with pytest.raises(ValueError, match=r"name: expected an operator .*rms_norm.*, got 'nope'"):
        nk.implementation("nope")
