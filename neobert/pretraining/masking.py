"""Which tokens are masked: a hash of (seed, view, epoch, document, position), nothing else.

A document's masks are the same in any batch, on any rank, in any worker, and after any restart.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from neobert.pretraining.hashing import GOLDEN, keys, mix

IGNORE_INDEX = -100
_LOW = np.uint64(0xFFFFFFFF)
_RANDOM = np.uint64(0xD1B54A32D192ED03)  # sets the words of random tokens apart


class Masked(NamedTuple):
    """``input_ids``, ``labels``: ``[T]`` int64; ``rows``: the labelled positions, ``[N]`` int64."""

    input_ids: np.ndarray
    labels: np.ndarray
    rows: np.ndarray


@dataclass(frozen=True, eq=False)
class Masking:
    """Labels each ordinary token with chance ``rate``.

    Attributes:
        rate: The chance.
        keep: False: every labelled token becomes [MASK]. True: 80 % do, 10 % become an ordinary
            token drawn evenly, 10 % stay.
        mask_id: The id of [MASK].
        special: ``[V]`` bool: ids that are never labelled, and never drawn.
    """

    rate: float
    keep: bool
    mask_id: int
    special: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ordinary", np.flatnonzero(~self.special))

    def __call__(self, ids: np.ndarray, bounds: np.ndarray, streams: np.ndarray) -> Masked:
        """Mask packed tokens.

        Args:
            ids: ``[T]`` int64.
            bounds: ``[B + 1]`` int64, the documents' boundaries.
            streams: ``[B]`` uint64, one word per document, from `stream_keys`.
        """
        # Word p of a document is mix(stream + p * GOLDEN): SplitMix64 started at `stream`.
        golden = np.uint64(GOLDEN)
        words = np.arange(len(ids), dtype=np.uint64) * golden
        words += np.repeat(streams - bounds[:-1].astype(np.uint64) * golden, np.diff(bounds))
        mix(words)
        # The upper half chooses, the lower half decides what happens to the chosen.
        chosen = (words >> np.uint64(32)) < np.uint64(round(self.rate * (1 << 32)))
        chosen &= ~self.special[ids]
        rows = np.flatnonzero(chosen)
        originals = ids[rows]
        labels = np.full(len(ids), IGNORE_INDEX, np.int64)
        labels[rows] = originals
        inputs = ids.copy()
        inputs[rows] = self._replaced(originals, words[rows]) if self.keep else self.mask_id
        return Masked(inputs, labels, rows)

    def _replaced(self, originals: np.ndarray, words: np.ndarray) -> np.ndarray:
        action = (words & _LOW).astype(np.float64) / (1 << 32)
        ordinary: np.ndarray = self._ordinary  # type: ignore[attr-defined]
        drawn = ordinary[(mix(words ^ _RANDOM) % np.uint64(len(ordinary))).astype(np.int64)]
        return np.where(action < 0.8, self.mask_id, np.where(action < 0.9, drawn, originals))


def stream_keys(view_key: int, epochs: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """``[B]`` uint64, one word per (seed and view, epoch, document)."""
    return keys(keys(view_key, epochs), documents)
