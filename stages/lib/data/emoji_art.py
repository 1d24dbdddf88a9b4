"""Emoji artwork: which emoji a file name means, what it is called, and how it is drawn."""

from __future__ import annotations

import io

import emoji
import numpy as np
import resvg_py
from PIL import Image

_SKIN_TONES = frozenset(range(0x1F3FB, 0x1F3FF + 1))
_REGIONAL_INDICATORS = frozenset(range(0x1F1E6, 0x1F1FF + 1))
_TAGS = frozenset(range(0xE0020, 0xE007F + 1))
_FLAGS = frozenset((0x1F38C, 0x1F3C1, 0x1F3F3, 0x1F3F4, 0x1F6A9))


def short_name(codepoints: str) -> str | None:
    """CLDR short name of an emoji, e.g. ``"1F600"`` -> ``"grinning face"``.

    Args:
        codepoints: hexadecimal code points joined by ``-``, as emoji sets name their files.

    Returns:
        The name, or None for what is no emoji of its own: skin-tone variants, flags of
        regions, private-use artwork, single letters.
    """
    try:
        points = [int(point, 16) for point in codepoints.split("-")]
    except ValueError:
        return None
    if not _SKIN_TONES.isdisjoint(points) or not _REGIONAL_INDICATORS.isdisjoint(points):
        return None
    if not _TAGS.isdisjoint(points):
        return None
    entry = emoji.EMOJI_DATA.get("".join(map(chr, points)))
    if entry is None:
        return None
    return entry["en"].strip(":").replace("_", " ")


def is_flag(codepoints: str) -> bool:
    """Whether an emoji is a flag, e.g. the chequered, the rainbow or a region's; not one held in a hand."""
    first = int(codepoints.split("-")[0], 16)
    return first in _FLAGS or first in _REGIONAL_INDICATORS


def render_svg(svg: str, size: int) -> Image.Image:
    """Draw an SVG on white, ``size`` x ``size`` pixels, RGB. System fonts are never used."""
    png = resvg_py.svg_to_bytes(
        svg_string=svg, width=size, height=size, background="#ffffff", skip_system_fonts=True
    )
    return Image.open(io.BytesIO(bytes(png))).convert("RGB")


def render_svg_array(svg: str, size: int) -> np.ndarray:
    """As `render_svg`: (size, size, 3) uint8."""
    return np.asarray(render_svg(svg, size))
