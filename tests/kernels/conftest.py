"""Fixtures that several files share."""

import pytest
from attention_cases import small_tiles as make_small_tiles

from neobert_kernels import _runtime
from neobert_kernels.ops.attention import tiles
from neobert_kernels.ops.linear_cross_entropy import kernels, reference


@pytest.fixture
def small_tiles(monkeypatch):
    """In the interpreter: documents of 20 to 70 tokens have several tiles, tails, window edges."""
    if _runtime.INTERPRET:
        monkeypatch.setattr(
            tiles, "choose", lambda D, dtype, sm, longest, aligned: make_small_tiles(longest < 64)
        )


@pytest.fixture
def place_rope(small_tiles, monkeypatch):
    """``place_rope(inside)`` turns rows inside the kernels, or before them."""
    chosen = tiles.choose

    def place(inside):
        def forced(*arguments):
            choice = chosen(*arguments)
            return tiles.Tiles(choice.forward, choice.dq, choice.dkv, inside, inside, choice.search)

        monkeypatch.setattr(tiles, "choose", forced)

    return place


@pytest.fixture(params=[True, False], ids=["turned inside", "turned before"])
def turn_inside(request, place_rope):
    place_rope(request.param)
    return request.param


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 8 rows in steps of 4, and a reference in chunks of 3."""
    monkeypatch.setattr(kernels, "STEP_ROWS", 4)
    monkeypatch.setattr(kernels, "CHUNK_ROWS", 8)
    monkeypatch.setattr(kernels, "CHUNK_BYTES", 1)
    monkeypatch.setattr(kernels, "STEP_BYTES", 1)
    monkeypatch.setattr(reference, "REFERENCE_ROWS", 3)
