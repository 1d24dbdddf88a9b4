"""JPEGs that can only be half decoded: libjpeg warns of them, and Pillow drops its warnings."""

from __future__ import annotations

import re

import simplejpeg

_END = b"\xff\xd9"
# Bytes between segments of the header harm nothing; before a restart or the end they are pixels gone astray.
_HARMLESS = re.compile(r"extraneous bytes before marker 0x(?!d[0-9])")
_BEFORE_END = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
_SPACES = {"Gray": "GRAY", "YCbCr": "GRAY", "RGB": "RGB"}


def check_scan(data: bytes) -> str | None:
    """What libjpeg finds wrong with the compressed pixels, None for nothing.

    All are decoded, at an eighth of their size. A JPEG has no checksum: of single flipped bits most
    only change pixels, and are not to be found.
    """
    try:
        _, _, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # a kind that it does not know, and that Pillow may
        return None
    found = _warning(data, _SPACES.get(space, "CMYK"))
    padding = _BEFORE_END.search(found or "")
    return (
        None if padding and bytes(int(padding[1])) + _END in data else found
    )  # some cameras fill up with zeros


def _warning(data: bytes, space: str) -> str | None:
    try:
        # An end that is missing alone is no loss.
        simplejpeg.decode_jpeg(data + _END, space, min_height=1, min_width=1, min_factor=8)
    except ValueError as error:
        return None if _HARMLESS.search(str(error)) else str(error).strip()
    return None
