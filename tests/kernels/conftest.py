"""Fixtures of the tests of attention."""

import pytest
from attention_cases import small_tiles as make_small_tiles

from neobert_kernels import _runtime
from neobert_kernels.ops.attention import tiles


@pytest.fixture
def small_tiles(monkeypatch):
    """In the interpreter: documents of 20 to 70 tokens have several tiles, tails, window edges."""
    if _runtime.INTERPRET:
        monkeypatch.setattr(
            tiles, "choose", lambda D, dtype, sm, longest, aligned: make_small_tiles(longest < 64)
        )


@pytest.fixture(params=[True, False], ids=["turned inside", "turned before"])
def turn_inside(request, small_tiles, monkeypatch):
    chosen = tiles.choose

    def forced(*arguments):
        choice = chosen(*arguments)
        parts = (choice.forward, choice.dq, choice.dkv)
        return tiles.Tiles(*parts, request.param, request.param, choice.search)

    monkeypatch.setattr(tiles, "choose", forced)
    return request.param
