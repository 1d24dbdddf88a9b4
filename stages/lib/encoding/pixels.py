"""From a stored image to the pixels that the VAE sees."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from stages.lib.encoding.framing import Framing


def load_pixels(image: bytes, framing: Framing, interpolation: str, jpeg_draft: bool) -> np.ndarray:
    """Decode, resize, crop, mirror.

    Args:
        image: an upright 8-bit RGB image file, as prepare stores it.
        interpolation: ``lanczos``, ``bicubic``, ``bilinear`` or ``box``.
        jpeg_draft: let the JPEG decoder reduce by 2, 4 or 8 before the resize, where that still
            covers it: several times faster on large photographs, and slightly different.

    Returns:
        (height, width, 3) uint8.
    """
    with Image.open(io.BytesIO(image)) as opened:
        if jpeg_draft:
            opened.draft("RGB", framing.resized)
        picture = opened.convert("RGB")
    if picture.size != framing.resized:
        picture = picture.resize(framing.resized, Image.Resampling[interpolation.upper()])
    right, bottom = framing.left + framing.size.width, framing.top + framing.size.height
    pixels = np.asarray(picture.crop((framing.left, framing.top, right, bottom)))
    return pixels[:, ::-1] if framing.flipped else pixels


def scaled_pixels(pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """Pictures (height, width, 3) uint8 of one shape -> (B, 3, height, width) float32 in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(pictures))
    return stacked.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0
