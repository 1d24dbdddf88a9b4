"""Colours of an image to sRGB, by the profile that it carries."""

from __future__ import annotations

import functools
import io
import itertools

import numpy as np
from PIL import Image, ImageCms

_SRGB = ImageCms.createProfile("sRGB")
_LAB = ImageCms.createProfile("LAB")
_ALIKE = 1  # levels of 255: below, a profile counts as sRGB
_SPACE_OF_MODE = {"RGB": "RGB ", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab "}


def to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, bool]:
    """The image in sRGB, and whether that changed it.

    Relative colorimetric, with black-point compensation. A profile that is damaged, or of other colours than
    the image, is passed over, as viewers do.

    Args:
        image: RGB, L, CMYK or LAB, without alpha.
        profile: an ICC profile; None stands for sRGB, and for CMYK for what Pillow makes of it.

    Returns:
        RGB or L.
    """
    if (transform := _transform_for(image.mode, profile)) is not None:
        pixels = image if image.mode == transform.mode else image.convert(transform.mode)
        return transform(pixels), transform.changes
    if image.mode == "LAB":
        return _applied(_built(_LAB, "LAB"), image), True
    return (image if image.mode in ("RGB", "L") else image.convert("RGB")), False


def changes(mode: str, profile: bytes | None) -> bool:
    """Whether `to_srgb` changes the colours of an image of this mode."""
    transform = _transform_for(mode, profile)
    return transform is not None and transform.changes


class _Transform:
    """A conversion, and whether it changes anything."""

    def __init__(self, profile: ImageCms.ImageCmsProfile, mode: str) -> None:
        self.mode = mode
        self._transform = _built(profile, mode)
        # Of grey all 256 colours are looked up; what is optimised for more is coarse in dark grey.
        levels = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
        self._levels = (
            _applied(_built(profile, "L", ImageCms.Flags.NOOPTIMIZE), levels) if mode == "L" else None
        )
        self.changes = mode not in ("RGB", "L") or self._changes(mode)

    def __call__(self, image: Image.Image) -> Image.Image:
        if not self.changes:
            return image
        if self._levels is None:
            return _applied(self._transform, image)
        tables = np.asarray(self._levels)[0].T.tolist()  # (3, 256)
        return Image.merge("RGB", [image.point(table) for table in tables])

    def _changes(self, mode: str) -> bool:
        """Whether a lattice of colours comes out otherwise."""
        if self._levels is not None:
            before, after = np.arange(256)[None, :, None], self._levels
        else:
            values = list(itertools.product(range(0, 256, 15), repeat=3))
            lattice = np.array(values, np.uint8).reshape(1, len(values), 3)
            before, after = lattice.astype(int), _applied(self._transform, Image.fromarray(lattice))
        return bool(np.abs(np.asarray(after).astype(int) - before).max() > _ALIKE)


def _transform_for(mode: str, profile: bytes | None) -> _Transform | None:
    if not profile:
        return None
    found = _transform(profile, mode)
    return _transform(profile, "RGB") if found is None and mode == "L" else found  # of grey: R = G = B


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> _Transform | None:
    try:
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if opened.profile.xcolor_space != _SPACE_OF_MODE.get(mode):
            return None
        return _Transform(opened, mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None


def _built(
    profile: object, mode: str, more: ImageCms.Flags = ImageCms.Flags.NONE
) -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(
        profile,  # type: ignore[arg-type]
        _SRGB,
        mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION | more,
    )


def _applied(transform: ImageCms.ImageCmsTransform, image: Image.Image) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # not in place
    return converted
