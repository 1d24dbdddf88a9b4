"""What worker processes do with each image and mask of a source, or why it cannot be used."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

from stages.lib.data.image_shards import StoredImage
from stages.lib.data.pictures.difference import difference_hash
from stages.lib.data.pictures.formats import UnusableImageError
from stages.lib.data.pictures.storing import stored_image, stored_mask


class Size(NamedTuple):
    """Pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width} x {self.height}"


class Checked(NamedTuple):
    """An image as it is stored, whether it is converted to sRGB, and its difference hash if asked for."""

    image: StoredImage
    is_converted: bool
    difference: int | None


def checked(max_pixels: int, with_difference: bool, content: bytes | OSError) -> Checked | str:
    """An image without its bytes where they are ``content``, or why it cannot be stored."""
    if isinstance(content, OSError):
        return f"cannot be read: {content.strerror}"
    try:
        image, is_converted = stored_image(content, max_pixels)
    except UnusableImageError as error:
        return str(error)
    difference = difference_hash(image.data) if with_difference else None
    digest = hashlib.sha256(image.data).hexdigest()
    data = b"" if image.data is content else image.data  # which need not travel back from a worker process
    return Checked(image._replace(data=data, image_sha256=digest), is_converted, difference)


def checked_mask(max_pixels: int, content: bytes | OSError) -> StoredImage | str:
    """A mask as it is stored, or why it cannot be."""
    if isinstance(content, OSError):
        return f"cannot be read: {content.strerror}"
    try:
        return stored_mask(content, max_pixels)
    except UnusableImageError as error:
        return str(error)
