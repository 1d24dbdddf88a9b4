"""Which image files can be used, and how they are kept: with their own bytes, or as a PNG of the picture."""

from __future__ import annotations

import io
from typing import NamedTuple

from PIL import Image

from stages.lib.data.image_shards import StoredImage
from stages.lib.data.pictures import png_chunks
from stages.lib.data.pictures.colour import changes
from stages.lib.data.pictures.decoding import decoded, opened, picture_of, profile_of, upright_size
from stages.lib.data.pictures.formats import UnusableImageError
from stages.lib.data.pictures.jpeg_scan import check_scan
from stages.lib.data.pictures.tiff_tags import check_strips

# Others are large, or hold more than a picture.
_COMPACT = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "HEIF", "JPEG2000")


class CheckedImage(NamedTuple):
    """An image as it is kept, and whether its colours are converted to sRGB when it is decoded."""

    image: StoredImage
    is_converted: bool


def stored_image(data: bytes, max_pixels: int) -> CheckedImage:
    """The image of a file as it is kept.

    Files of compact formats keep their bytes, whatever they hold beside a single frame; all others become a
    PNG, with their opacity. The whole image is decoded, so that a truncated file is found here.

    Args:
        data: the file.
        max_pixels: of a picture.

    Raises:
        UnusableImageError: what cannot be decoded as a whole, is too large, or has pixel values without a
            defined range.
    """
    with opened(data) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise UnusableImageError(
                f"{width} x {height} pixels, prepare.max_image_pixels is {max_pixels}; raise it, "
                "or reduce the image"
            )
        is_kept = image.format in _COMPACT and (image.format == "MPO" or getattr(image, "n_frames", 1) == 1)
        if image.format in ("JPEG", "MPO") and check_scan(data):
            return CheckedImage(
                StoredImage(data, *upright_size(image)), changes(image.mode, profile_of(image))
            )
        picture = picture_of(image, data)
        if image.format == "PNG":
            png_chunks.check_rows(data)
        if image.format == "TIFF":
            check_strips(image, data)
    kept = StoredImage(data, *picture.colours.size) if is_kept else png(picture.colours, picture.alpha)
    return CheckedImage(kept, picture.is_converted)


def stored_mask(data: bytes, max_pixels: int) -> StoredImage:
    """The mask in an image file, as a PNG of one channel: 0 counts least, 255 fully.

    Raises:
        UnusableImageError: as `stored_image`.
    """
    checked = stored_image(data, max_pixels).image
    mask = decoded(checked.data).convert("L")
    buffer = io.BytesIO()
    Image.frombytes("L", mask.size, mask.tobytes()).save(buffer, "PNG")
    return StoredImage(buffer.getvalue(), *mask.size)


def png(image: Image.Image, alpha: Image.Image | None = None) -> StoredImage:
    """An RGB image, and its opacity, as PNG without metadata: the same bytes for the same pixels."""
    bare = Image.frombytes("RGB", image.size, image.tobytes())
    if alpha is not None:
        bare.putalpha(alpha)
    buffer = io.BytesIO()
    bare.save(buffer, "PNG")
    return StoredImage(buffer.getvalue(), *image.size)
