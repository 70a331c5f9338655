"""A shuffle of any number of documents that takes no memory: a keyed bijection of 0..N-1.

A Feistel network over a rectangle of A x B >= N cells: a round adds a hash of one coordinate to the
other one, modulo its side, which can be undone whatever the hash is. A cell beyond N - 1 goes
through again until it falls inside (cycle walking), which keeps a bijection; with A and B near
sqrt(N) fewer than one in sqrt(N) does.

Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains", methods 2 and 3.
"""

import math

import numpy as np

from neobert.pretraining.hashing import key, keys

ROUNDS = 6


class Permutation:
    """``permutation(positions)`` gives the numbers there; all of 0..size-1 come once."""

    def __init__(self, size: int, *parts: int) -> None:
        assert 0 < size < 1 << 62
        self.size = size
        side = math.isqrt(size - 1) + 1
        self._sides = np.uint64(side), np.uint64(-(-size // side))
        self._keys = [key(*parts, size, number) for number in range(ROUNDS)]

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Map int64 ``positions`` in 0..size-1 to int64 numbers of the same range."""
        numbers = self._once(positions.astype(np.uint64))
        while len(outside := np.flatnonzero(numbers >= np.uint64(self.size))):
            numbers[outside] = self._once(numbers[outside])
        return numbers.astype(np.int64)

    def _once(self, cells: np.ndarray) -> np.ndarray:
        a, b = self._sides
        left: np.ndarray = cells % a
        right: np.ndarray = cells // a
        for number, secret in enumerate(self._keys):
            if number % 2:
                right = (right + keys(secret, left) % b) % b
            else:
                left = (left + keys(secret, right) % a) % a
        return right * a + left
