"""What the tags of a TIFF say of its pixels: how many bits count, and whether they are a picture at all.

TIFF 6.0 (Adobe, 1992) and Digital Negative 1.7 (Adobe, 2023).
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

from stages.lib.data.pictures.formats import UnusableImageError
from stages.lib.data.pictures.jpeg_scan import check_scan

_NEW_SUBFILE_TYPE, _BITS_PER_SAMPLE, _PHOTOMETRIC, _SAMPLE_FORMAT = 254, 258, 262, 339
_DNG_VERSION = 50706
_REDUCED = 1  # bit of NewSubfileType: a smaller version of another picture in the file
_WHITE_IS_ZERO = 0
_RAW_PHOTOMETRIC = (32803, 34892)  # of a colour filter array, and linear raw
_SIGNED, _FLOAT = 2, 3
_PLANAR_CONFIGURATION, _SEPARATE = 284, 2
_CANON_RAW = slice(8, 10), b"CR"


# Where the compressed pixels lie, in strips or in tiles: tags of offsets and of byte counts.
_PLACES = ((273, 279), (324, 325))
_COMPRESSION, _JPEG_TABLES = 259, 347
_JPEG, _DEFLATE = 7, (8, 32946)


class Samples(NamedTuple):
    """How the numbers of a grey picture are meant."""

    maximum: int
    white_is_zero: bool


def check_tiff(image: Any, data: bytes) -> Samples:
    """How many levels the samples have.

    Raises:
        UnusableImageError: for raw camera files, whose first picture is a thumbnail, and for signed and
            floating-point samples.
    """
    tags = image.tag_v2
    place, canon = _CANON_RAW
    if (
        int(tags.get(_NEW_SUBFILE_TYPE, 0)) & _REDUCED
        or _DNG_VERSION in tags
        or tags.get(_PHOTOMETRIC) in _RAW_PHOTOMETRIC
        or data[place] == canon
    ):
        raise UnusableImageError(
            "a raw camera file, of which this reads the thumbnail alone; develop it to TIFF, PNG or JPEG"
        )
    formats = tags.get(_SAMPLE_FORMAT, (1,))
    if _FLOAT in formats:
        raise UnusableImageError("floating-point pixel values have no defined range")
    if _SIGNED in formats:
        raise UnusableImageError("signed pixel values have no defined range")
    if tags.get(_PLANAR_CONFIGURATION) == _SEPARATE and image.mode in ("LA", "La", "PA"):
        raise UnusableImageError(
            "grey or a palette with opacity in separate planes is not read; save it with its samples together"
        )
    bits = max(tags.get(_BITS_PER_SAMPLE, (1,)))
    if bits > 16:
        raise UnusableImageError(f"{bits}-bit pixel values have no defined range")
    return Samples(2**bits - 1, tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO)


def check_strips(image: Any, data: bytes) -> None:
    """Look at the checksums of deflated pixels, and at JPEGs: libtiff stops before the first, and lets the
    others be.

    Raises:
        UnusableImageError: if a strip or tile is damaged.
    """
    tags = image.tag_v2
    compression = tags.get(_COMPRESSION)
    tables = tags.get(_JPEG_TABLES, b"")
    for offsets, counts in _PLACES:
        for offset, count in zip(tags.get(offsets, ()), tags.get(counts, ()), strict=False):
            strip = data[offset : offset + count]
            if compression in _DEFLATE:
                try:
                    zlib.decompress(strip)
                except zlib.error as error:
                    raise UnusableImageError(
                        f"broken image: a strip of its pixels is damaged ({error})"
                    ) from error
            elif compression == _JPEG:
                check_scan(tables[:-2] + strip[2:] if tables else strip)
