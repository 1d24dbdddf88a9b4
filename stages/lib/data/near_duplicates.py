"""Images that look alike: the same photograph in another size, quality or format."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_BLOCK = 1024  # images whose hashes are compared with all others at a time


def groups_alike(hashes: Sequence[int], distance: int) -> list[int]:
    """For each image the smallest position of its group.

    Images whose hashes differ in ``distance`` bits at most are in one group, and so is what either of them is
    alike to. Time grows with the square of their number: 100,000 take about a minute.
    """
    values = np.array(hashes, dtype=np.uint64)
    first = list(range(len(values)))

    def root(position: int) -> int:
        while first[position] != position:
            first[position] = first[first[position]]
            position = first[position]
        return position

    for start in range(0, len(values), _BLOCK):
        block = values[start : start + _BLOCK, None]
        alike = np.bitwise_count(block ^ values[None, start:]) <= distance  # (_BLOCK, N - start)
        for one, other in np.argwhere(alike):
            low, high = sorted((root(start + int(one)), root(start + int(other))))
            first[high] = low
    return [root(position) for position in range(len(values))]
