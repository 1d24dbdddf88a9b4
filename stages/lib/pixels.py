"""From a stored image to the pixels that the VAE sees."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image


def load_pixels(image: bytes, resolution: int, interpolation: str, view: str) -> torch.Tensor:
    """Decode, resize the shorter side to ``resolution``, crop the centre.

    The arithmetic of sizes and offsets is torchvision's Resize and CenterCrop, which diffusers'
    training scripts use.

    Args:
        image: an upright 8-bit RGB image file, as prepare stores it.
        resolution: side of the square, pixels.
        interpolation: ``lanczos``, ``bicubic``, ``bilinear`` or ``box``.
        view: ``centre``, or ``flipped`` for its mirror image.

    Returns:
        (3, resolution, resolution) float32 in [-1, 1].
    """
    with Image.open(io.BytesIO(image)) as opened:
        picture = opened.convert("RGB")
    width, height = picture.size
    short, long = min(width, height), max(width, height)
    if short != resolution:
        new_long = int(resolution * long / short)
        size = (resolution, new_long) if width <= height else (new_long, resolution)
        picture = picture.resize(size, Image.Resampling[interpolation.upper()])
    left, top = (round((side - resolution) / 2) for side in picture.size)
    picture = picture.crop((left, top, left + resolution, top + resolution))
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1.0
    return pixels.flip(-1) if view == "flipped" else pixels
