"""Documents into bins of a token budget: best-fit decreasing.

The longest document goes first, each into the fullest bin that still takes it. Never more than
11/9 of the least number of bins (Johnson 1973), and with the short documents that real text has
nearly none of a bin stays empty.
"""

from bisect import bisect_left, insort

import numpy as np


def pack(lengths: np.ndarray, budget: int) -> tuple[np.ndarray, np.ndarray]:
    """A pure function of its arguments.

    Args:
        lengths: Tokens of each document, ``[N]``, 1 to ``budget``.
        budget: Tokens that a bin takes.

    Returns:
        ``documents``, ``[N]`` int64, indices into ``lengths``, bin after bin; ``bounds``,
        ``[bins + 1]`` int64: bin i holds ``documents[bounds[i]:bounds[i + 1]]``.
    """
    order = np.argsort(-lengths, kind="stable")
    bin_of = np.empty(len(lengths), np.int64)
    # Bins by the room they have left; `rooms` are the keys, sorted, none with an empty list.
    open_bins: dict[int, list[int]] = {}
    rooms: list[int] = []
    bins = 0
    for document, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect_left(rooms, length)
        if at == len(rooms):
            room, chosen = budget, bins
            bins += 1
        else:
            room = rooms[at]
            chosen = open_bins[room].pop()
            if not open_bins[room]:
                del open_bins[room], rooms[at]
        bin_of[document] = chosen
        if room := room - length:
            if room not in open_bins:
                open_bins[room] = []
                insort(rooms, room)
            open_bins[room].append(chosen)
    documents = np.argsort(bin_of, kind="stable")
    bounds = np.searchsorted(bin_of[documents], np.arange(bins + 1))
    return documents, bounds
