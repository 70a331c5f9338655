"""Random numbers by counting: each is a pure function of a key, so no order of calls matters.

`mix` is the output function of SplitMix64 (Steele, Lea and Flood 2014, doi:10.1145/2714064.2660195,
with the constants of its reference code), a bijection of 64-bit words.
"""

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15  # the odd number nearest to 2**64 over the golden ratio
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_30, _27, _31 = np.uint64(30), np.uint64(27), np.uint64(31)
_WORD = (1 << 64) - 1


def mix(words: np.ndarray) -> np.ndarray:
    """Scramble an array of uint64 in place, and return it."""
    words ^= words >> _30
    words *= _FIRST
    words ^= words >> _27
    words *= _SECOND
    words ^= words >> _31
    return words


def key(*parts: int) -> int:
    """One 64-bit word from whole numbers; their order counts."""
    word = np.zeros(1, np.uint64)
    for part in parts:
        # Arrays wrap around without a word; numpy warns about scalars that do.
        word += np.array([(part * GOLDEN + GOLDEN) & _WORD], np.uint64)
        mix(word)
    return int(word[0])


def keys(first: int | np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """``key(first, number)`` for many numbers at once, up to the choice of the word."""
    words = numbers.astype(np.uint64) * np.uint64(GOLDEN)
    words += np.asarray(first, np.uint64)
    return mix(words)


def uniform(word: int) -> float:
    """A word as a number in [0, 1)."""
    return (word >> 11) / (1 << 53)
