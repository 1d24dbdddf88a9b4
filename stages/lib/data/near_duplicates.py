"""Images that look alike: the same photograph in another size, quality or format."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from stages.lib.data.pictures.decoding import decoded

HASH_BITS = 64
_BLOCK = 1024  # images whose hashes are compared with all others at a time


def difference_hash(data: bytes) -> int:
    """64 bits: whether each of 8 x 8 places of a picture is darker than the one to its right.

    The difference hash of Krawetz, "Kind of Like That" (2013).
    """
    small = decoded(data, draft=(72, 64)).convert("L").resize((9, 8), Image.Resampling.BOX)
    levels = np.asarray(small).astype(int)  # (8, 9)
    return int.from_bytes(np.packbits(levels[:, :-1] < levels[:, 1:]).tobytes())


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
