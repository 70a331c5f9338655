"""Fixtures that several files share."""

import pytest

import neobert_kernels as nk
from neobert_kernels import _runtime
from neobert_kernels.ops.fused_linear import launch as fused
from neobert_kernels.patching.launches import Launches


@pytest.fixture
def registered():
    nk.register_attention()
    yield
    nk.unregister_attention()


@pytest.fixture
def few_programs(monkeypatch):
    """The interpreter takes its time for each."""
    if _runtime.INTERPRET:
        wide = fused.Choice(128, 2, 32, 1)
        monkeypatch.setattr(fused, "choice", lambda itemsize, held: wide)


class Ran(list):
    """Numbers of tokens that ran in five launches a layer, and of those that ran as many do."""

    def __init__(self):
        super().__init__()
        self.many = []


@pytest.fixture
def ran(monkeypatch):
    """What ran without its modules."""
    found, run = Ran(), Launches.run

    def counting(self, x, batch):
        y = run(self, x, batch)
        (found if self.few else found.many).append(len(x))
        return y

    monkeypatch.setattr(Launches, "run", counting)
    return found
