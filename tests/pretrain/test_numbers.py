"""Orders, packing and masks, each a pure function."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neobert.pretraining.hashing import key, uniform
from neobert.pretraining.masking import Masking, stream_keys
from neobert.pretraining.order import Permutation
from neobert.pretraining.packing import pack

V, CLS, SEP, MASK = 1000, 2, 3, 4
SPECIAL = np.arange(V) < 5


@given(st.integers(1, 3000), st.integers(0, 1 << 64))
@settings(deadline=None, max_examples=60)
def test_an_order_is_a_bijection(size: int, seed: int) -> None:
    found = Permutation(size, seed)(np.arange(size))
    assert np.array_equal(np.sort(found), np.arange(size))


@pytest.mark.parametrize("size", [10**9 + 7, (1 << 61) + 3])
def test_a_huge_order_needs_no_memory_and_has_no_repeats(size: int) -> None:
    positions = np.random.default_rng(0).integers(0, size, 100_000)
    found = Permutation(size, 1)(positions)
    assert found.min() >= 0
    assert found.max() < size
    assert len(np.unique(found)) == len(np.unique(positions))


def test_an_order_looks_shuffled_and_changes_with_its_key() -> None:
    size = 40_000
    orders = [Permutation(size, *parts)(np.arange(size)) for parts in ((0, 1), (1, 0), (0, 2))]
    for i, order in enumerate(orders):
        assert abs(np.corrcoef(order, np.arange(size))[0, 1]) < 0.02
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.02
        assert (order == orders[i - 1]).mean() < 0.001


@given(st.lists(st.integers(1, 50), min_size=1, max_size=300), st.integers(50, 130))
@settings(deadline=None, max_examples=100)
def test_packing_neither_splits_nor_loses_nor_overfills(lengths: list[int], budget: int) -> None:
    sizes = np.array(lengths)
    documents, bounds = pack(sizes, budget)
    assert np.array_equal(np.sort(documents), np.arange(len(sizes)))
    assert (np.diff(bounds) > 0).all()
    loads = np.add.reduceat(sizes[documents], bounds[:-1])
    assert loads.max() <= budget
    # Two bins that fit into one would not both be open.
    assert len(loads) < 2 or np.sort(loads)[:2].sum() > budget
    assert len(loads) <= 11 / 9 * max(1, -(-int(sizes.sum()) // budget)) * 2


def test_packing_takes_the_fullest_bin_that_fits() -> None:
    documents, bounds = pack(np.array([6, 7, 3, 4]), 10)
    bins = {frozenset(documents[a:b].tolist()) for a, b in pairwise(bounds)}
    assert bins == {frozenset({1, 2}), frozenset({0, 3})}


def masked(keep: bool, lengths: list[int], numbers: list[int], rate: float = 0.2, epoch: int = 0):
    """Masks of documents whose tokens depend on their numbers alone."""
    rows = [np.random.default_rng(n).integers(0, V, m) for n, m in zip(numbers, lengths, strict=1)]
    for row in rows:
        row[0], row[-1] = CLS, SEP
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    streams = stream_keys(9, np.full(len(numbers), epoch), np.array(numbers))
    ids = np.concatenate(rows)
    return ids, bounds, Masking(rate, keep, MASK, SPECIAL)(ids, bounds, streams)


@pytest.mark.parametrize("keep", [False, True])
def test_masking_does_not_depend_on_the_rest_of_the_batch(keep: bool) -> None:
    alone = masked(keep, [70], [3])[2]
    _, bounds, among = masked(keep, [40, 90, 70, 20], [8, 1, 3, 2])
    part = slice(bounds[2], bounds[3])
    assert np.array_equal(alone.input_ids, among.input_ids[part])
    assert np.array_equal(alone.labels, among.labels[part])
    assert not np.array_equal(alone.labels, masked(keep, [70], [3], epoch=1)[2].labels)


@pytest.mark.parametrize(("keep", "rate"), [(False, 0.2), (True, 0.15), (False, 0.4)])
def test_rates(keep: bool, rate: float) -> None:
    ids, _, out = masked(keep, [1000] * 400, list(range(400)), rate)
    ordinary = ~SPECIAL[ids]
    chosen = out.labels != -100
    assert np.array_equal(np.flatnonzero(chosen), out.rows)
    assert np.array_equal(out.labels[chosen], ids[chosen])
    assert np.array_equal(out.input_ids[~chosen], ids[~chosen])
    assert chosen[ordinary].mean() == pytest.approx(rate, abs=0.004)
    became = out.input_ids[chosen]
    if not keep:
        assert (became == MASK).all()
        return
    assert (became == MASK).mean() == pytest.approx(0.8, abs=0.01)
    assert (became == ids[chosen]).mean() == pytest.approx(0.1, abs=0.01)
    drawn = became[(became != MASK) & (became != ids[chosen])]
    assert not SPECIAL[drawn].any()
    assert drawn.mean() == pytest.approx((5 + V - 1) / 2, rel=0.03)


@pytest.mark.parametrize("keep", [False, True])
def test_special_tokens_are_untouched(keep: bool) -> None:
    ids, _, out = masked(keep, [500] * 50, list(range(50)), rate=0.9)
    special = SPECIAL[ids]
    assert special.sum() > 100
    assert (out.labels[special] == -100).all()
    assert np.array_equal(out.input_ids[special], ids[special])


def test_masks_at_neighbouring_positions_and_documents_are_unrelated() -> None:
    _, _, out = masked(False, [400] * 400, list(range(400)), rate=0.5)
    chosen = (out.labels != -100).reshape(400, 400)[:, 1:-1].astype(float)
    for a, b in ((chosen[1:], chosen[:-1]), (chosen[:, 1:], chosen[:, :-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02


def test_draws_are_even() -> None:
    draws = [uniform(key(1, i)) for i in range(5000)]
    assert min(draws) >= 0
    assert max(draws) < 1
    assert np.histogram(draws, 10, (0, 1))[0] == pytest.approx(500, abs=100)
