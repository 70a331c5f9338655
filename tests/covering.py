"""Fewer cases where kernels are slow: in the interpreter each pair of values, not each product."""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from neobert_kernels import _runtime, _triton

OLDEST = _triton.AVAILABLE and _triton.triton.__version__.startswith("3.6.")


def covering(**parameters: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize over all combinations; in the interpreter over enough to see every pair.

    A fault that shows for one value of a parameter, or for two values of two, is still seen.
    """
    values = [tuple(each) for each in parameters.values()]
    cases = list(itertools.product(*values))
    if _runtime.INTERPRET:
        chosen = pairwise([len(each) for each in values])
        cases = [tuple(map(tuple.__getitem__, values, case)) for case in chosen]
    return pytest.mark.parametrize(tuple(parameters), cases, ids=str)


def pairwise(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Indices of combinations that hold each pair of values of each two parameters, greedily."""
    pairs = list(itertools.combinations(range(len(sizes)), 2))
    everything = list(itertools.product(*map(range, sizes)))
    missing = {(i, j, case[i], case[j]) for case in everything for i, j in pairs}
    chosen = []
    while missing:
        best = max(everything, key=lambda case: len(missing & _of(case, pairs)))
        chosen.append(best)
        missing -= _of(best, pairs)
    return chosen


def _of(case: tuple[int, ...], pairs: list[tuple[int, int]]) -> set[tuple[int, int, int, int]]:
    return {(i, j, case[i], case[j]) for i, j in pairs}


def examples(number: int) -> int:
    """How many a property test draws: half in the interpreter, a quarter on the oldest Triton's."""
    if not _runtime.INTERPRET:
        return number
    return max(2, number // (4 if OLDEST else 2))
