"""Fixtures that several files share."""

import pytest

import neobert_kernels as nk


@pytest.fixture
def registered():
    nk.register_attention()
    yield
    nk.unregister_attention()
