"""JPEGs that can only be half decoded: libjpeg warns of them, and Pillow drops its warnings."""

from __future__ import annotations

import re

import simplejpeg

from stages.lib.data.pictures.formats import UnusableImageError

_END = b"\xff\xd9"
_NEAR_THE_END = 1024  # bytes
# Bytes between segments of the header harm nothing; before a restart or the end they are pixels gone astray.
_HARMLESS = re.compile(r"extraneous bytes before marker 0x(?!d[0-9])")
_BEFORE_END = re.compile(r"(\d+) extraneous bytes before marker 0xd9")
_SPACES = {"Gray": "GRAY", "YCbCr": "GRAY", "RGB": "RGB"}


def check_scan(data: bytes) -> bool:
    """Have libjpeg read all compressed pixels, at an eighth of their size.

    A JPEG has no checksum: of single flipped bits most only change pixels, and are not to be found.

    Returns:
        Whether it had nothing to remark, so that they need not be decoded once more to be sure.

    Raises:
        UnusableImageError: if a part of the pixels is lost.
    """
    try:
        _, _, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:  # a kind that it does not know, and that Pillow may
        return False
    try:
        simplejpeg.decode_jpeg(
            data if _END in data[-_NEAR_THE_END:] else data + _END,  # an end that is missing alone is no loss
            _SPACES.get(space, "CMYK"),
            min_height=1,
            min_width=1,
            min_factor=8,
        )
    except ValueError as error:
        remark = str(error).strip()
        padding = _BEFORE_END.search(remark)
        is_padded = padding and bytes(int(padding[1])) + _END in data  # some cameras fill up with zeros
        if not is_padded and not _HARMLESS.search(remark):
            raise UnusableImageError(f"broken image: {remark}") from error
        return False
    return _END in data[-_NEAR_THE_END:]
