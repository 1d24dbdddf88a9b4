"""What Pillow does not tell of a PNG: damaged pixels, exact transparent colours, and what its colours mean.

Portable Network Graphics, third edition: https://www.w3.org/TR/png-3/, sections 5.3, 11.3.1, 11.3.2 and 13.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import NamedTuple

from stages.lib.data.pictures.colour_spaces import ColourSpace, of_code_points, of_gamma
from stages.lib.data.pictures.formats import UnusableImageError

_SIGNATURE_BYTES = 8
_SRGB_GAMMAS = range(45000, 46000)  # 1 / 2.2 in units of 1 / 100000, which stands for sRGB
_SRGB_CHROMATICITIES = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)  # white, red, green, blue
_CHANNELS = {2: 3, 4: 2, 6: 4}
# Adam7: first column and row, and the steps to the next, of each pass.
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_INFLATED_BYTES = 2**20  # at a time
_NEAR = 100  # 1 / 100000: rounding of those who write them


class Header(NamedTuple):
    """Of the chunk that comes first."""

    bit_depth: int
    colour_type: int  # 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGB and alpha


def header(data: bytes) -> Header:
    """The bit depth and the colour type."""
    return Header(data[_SIGNATURE_BYTES + 16], data[_SIGNATURE_BYTES + 17])


def check_pixels(data: bytes) -> None:
    """Raise UnusableImageError if a chunk of pixels is damaged: Pillow passes over their checksums."""
    for kind, start, end in _chunks(data):
        if kind == b"IDAT" and zlib.crc32(data[start - 4 : end]) != int.from_bytes(data[end : end + 4]):
            raise UnusableImageError("broken image: a checksum of its pixels fails")


def check_rows(data: bytes) -> None:
    """Raise UnusableImageError if there are fewer rows than the header says: Pillow leaves them black."""
    width, height = (int.from_bytes(data[at : at + 4]) for at in (16, 20))
    depth, colour_type = header(data)
    bits = depth * _CHANNELS.get(colour_type, 1)
    is_interlaced = data[_SIGNATURE_BYTES + 20] == 1
    sizes = (
        [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in _PASSES]
        if is_interlaced
        else [(width, height)]
    )
    expected = sum(
        rows * (1 + -(-columns * bits // 8)) for columns, rows in sizes if columns > 0 and rows > 0
    )
    inflate, found = zlib.decompressobj(), 0
    for kind, start, end in _chunks(data):
        if kind != b"IDAT":
            continue
        waiting = data[start:end]
        while waiting and found < expected:
            found += len(inflate.decompress(waiting, _INFLATED_BYTES))
            waiting = inflate.unconsumed_tail
    if found < expected:
        raise UnusableImageError(f"broken image: {found} bytes of rows, its header says {expected}")


def transparent_colour(data: bytes) -> tuple[int, ...] | None:
    """The one transparent colour of a grey or RGB image, in the file's own bit depth; None without one."""
    content = _first(data, b"tRNS")
    if content is None or header(data).colour_type not in (0, 2):
        return None
    return tuple(int.from_bytes(content[at : at + 2]) for at in range(0, len(content) - 1, 2))


def colour_space(data: bytes) -> ColourSpace | None:
    """What the colours mean as cICP, sRGB, or gAMA and cHRM say, in this order; None for sRGB.

    An embedded profile comes after cICP and before the others: it is the caller's.
    """
    if (cicp := _first(data, b"cICP")) is not None and len(cicp) == 4:
        if cicp[2] != 0 or cicp[3] != 1:
            raise UnusableImageError(f"colours coded as video (cICP {' '.join(map(str, cicp))}) are not read")
        return of_code_points(cicp[0], cicp[1])
    if _first(data, b"sRGB") is not None:
        return None
    gamma, chromaticities = _first(data, b"gAMA"), _first(data, b"cHRM")
    encoded = int.from_bytes(gamma) if gamma is not None and len(gamma) == 4 else None
    places = None
    if chromaticities is not None and len(chromaticities) == 32:
        places = tuple(int.from_bytes(chromaticities[at : at + 4]) for at in range(0, 32, 4))
        if all(
            abs(place - usual) <= _NEAR for place, usual in zip(places, _SRGB_CHROMATICITIES, strict=True)
        ):
            places = None
    if places is None and (not encoded or encoded in _SRGB_GAMMAS):
        return None
    return of_gamma(encoded / 100_000 if encoded else None, [place / 100_000 for place in places or ()])


def has_cicp(data: bytes) -> bool:
    """Whether a cICP chunk says what the colours mean, before any profile."""
    return _first(data, b"cICP") is not None


def _first(data: bytes, wanted: bytes) -> bytes | None:
    """The content of the first chunk of a kind that comes before the pixels."""
    for kind, start, end in _chunks(data):
        if kind == wanted:
            return data[start:end]
        if kind == b"IDAT":
            return None
    return None


def _chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, where its content starts and ends) of each chunk, to IEND."""
    position = _SIGNATURE_BYTES
    while position + 12 <= len(data):
        end = position + 8 + int.from_bytes(data[position : position + 4])
        kind = data[position + 4 : position + 8]
        yield kind, position + 8, end
        if kind == b"IEND":
            return
        position = end + 4
