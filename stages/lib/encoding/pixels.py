"""From a stored image to the pixels that the VAE sees, and to the mask that weighs them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from stages.lib.data.pictures.decoding import alpha_of, decoded
from stages.lib.encoding.framing import Framing
from stages.lib.store.blocks import Row

_RESIZED_WHOLE = 4  # times the view's pixels: a picture that is resized to more is not resized as a whole
_SUPPORT = 3  # of the widest filter, Lanczos, in pixels of the smaller picture


def load_pixels(image: bytes, framing: Framing, interpolation: str, jpeg_draft: bool) -> np.ndarray:
    """Decode, resize, crop, mirror.

    Args:
        image: an image file, as prepare stores it.
        interpolation: ``lanczos``, ``bicubic``, ``bilinear`` or ``box``.
        jpeg_draft: let the JPEG decoder reduce by 2, 4 or 8 before the resize, where that still
            covers it: several times faster on large photographs, and slightly different.

    Returns:
        (height, width, 3) uint8.
    """
    picture = decoded(image, framing.resized if jpeg_draft else None)
    pixels = np.asarray(_view(picture, framing, Image.Resampling[interpolation.upper()]))
    return pixels[:, ::-1] if framing.flipped else pixels


def load_mask(image: bytes, framing: Framing) -> np.ndarray:
    """The opacity of what `load_pixels` gives, (height, width) uint8: 255 where the image has none of it.

    It is resized by areas, whatever the filter of the colours: no filter that overshoots makes a mask.
    """
    return _mask_view(alpha_of(image), framing)


def load_mask_file(mask: bytes | None, framing: Framing) -> np.ndarray:
    """As `load_mask`, of the mask that lies beside an image; 255 everywhere where there is none."""
    return _mask_view(None if mask is None else decoded(mask).convert("L"), framing)


def _mask_view(mask: Image.Image | None, framing: Framing) -> np.ndarray:
    if mask is None:
        return np.full((framing.size.height, framing.size.width), 255, np.uint8)
    levels = np.asarray(_view(mask, framing, Image.Resampling.BOX))
    return levels[:, ::-1] if framing.flipped else levels


def build_mask_encoder(factor: int, device: str, dtype: str) -> Callable[[Sequence[np.ndarray]], list[Row]]:
    """Masks (height, width) uint8 -> mask, (1, h, w) float16 in [0, 1], the mean over each latent's pixels.

    Args:
        factor: pixels a side of a latent pixel.
        device, dtype: as every encoder takes them; means are taken in float64 on the CPU.
    """

    def encode(masks: Sequence[np.ndarray]) -> list[Row]:
        return [{"mask": _block_means(mask, factor)[None].astype(np.float16)} for mask in masks]

    return encode


def _block_means(mask: np.ndarray, factor: int) -> np.ndarray:
    height, width = (side // factor for side in mask.shape)
    return mask.reshape(height, factor, width, factor).mean(axis=(1, 3), dtype=np.float64) / 255


def _view(picture: Image.Image, framing: Framing, filter_: Image.Resampling) -> Image.Image:
    """What is kept of the resized picture; memory is bounded by its size, however long the picture is."""
    left, top, (width, height) = framing.left, framing.top, framing.size
    if math.prod(framing.resized) <= _RESIZED_WHOLE * width * height:
        whole = picture if picture.size == framing.resized else picture.resize(framing.resized, filter_)
        return whole.crop((left, top, left + width, top + height))
    across = _span(left, width, framing.resized.width, picture.width)
    down = _span(top, height, framing.resized.height, picture.height)
    # Pillow takes the box as 32-bit floats, which are exact enough for what lies near the box.
    part = picture.crop((across.first, down.first, across.last, down.last))
    box = (across.start, down.start, across.end, down.end)
    return part.resize(framing.size, filter_, box)


class _Span(NamedTuple):
    """Pixels of the picture for a side of the view, ``first`` to ``last``, and its ends in them."""

    first: int
    last: int
    start: float
    end: float


def _span(kept_from: int, kept: int, resized: int, pixels: int) -> _Span:
    scale = pixels / resized
    start, end = kept_from * scale, (kept_from + kept) * scale
    margin = math.ceil(_SUPPORT * max(1.0, scale)) + 1
    first = max(0, math.floor(start) - margin)
    last = min(pixels, math.ceil(end) + margin)
    return _Span(first, last, start - first, min(end - first, last - first))


def scaled_pixels(pictures: Sequence[np.ndarray]) -> torch.Tensor:
    """Pictures (height, width, 3) uint8 of one shape -> (B, 3, height, width) float32 in [-1, 1]."""
    stacked = torch.from_numpy(np.stack(pictures))
    return stacked.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0
