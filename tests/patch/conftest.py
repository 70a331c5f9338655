"""Fixtures that several files share."""

import pytest

import neobert_kernels as nk
from neobert_kernels import _runtime
from neobert_kernels.ops.fused_linear import launch as fused
from neobert_kernels.patching.few_tokens import FewTokens


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


@pytest.fixture
def ran(monkeypatch):
    """Numbers of tokens that ran by `FewTokens`."""
    found, run = [], FewTokens.run

    def counting(self, x, batch):
        y = run(self, x, batch)
        if y is not None:
            found.append(len(x))
        return y

    monkeypatch.setattr(FewTokens, "run", counting)
    return found
