"""A hash by which pictures that look alike are told, in whatever size, quality or format."""

from __future__ import annotations

import numpy as np
from PIL import Image

from stages.lib.data.pictures.decoding import decoded


def difference_hash(data: bytes) -> int:
    """64 bits: whether each of 8 x 8 places of a picture is darker than the one to its right.

    The difference hash of Krawetz, "Kind of Like That" (2013).
    """
    small = decoded(data, draft=(72, 64)).convert("L").resize((9, 8), Image.Resampling.BOX)
    levels = np.asarray(small).astype(int)  # (8, 9)
    return int.from_bytes(np.packbits(levels[:, :-1] < levels[:, 1:]).tobytes())
