"""Colour spaces that a file describes by numbers, as ICC profiles, so that one engine converts them all.

A profile is written by ICC.1:2022 (version 4): three primaries adapted to D50 with the Bradford matrix, and
a curve. Code points are those of ITU-T H.273.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stages.lib.data.pictures.formats import UnusableImageError

_D65, _DCI_WHITE = (0.3127, 0.3290), (0.314, 0.351)
_D50 = np.array([0.9642, 1.0, 0.8249])  # X, Y, Z of the profile connection space
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_SRGB_PRIMARIES = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
# Red, green, blue and white by H.273's number.
_PRIMARIES = {
    1: (*_SRGB_PRIMARIES, _D65),
    4: ((0.67, 0.33), (0.21, 0.71), (0.14, 0.08), (0.310, 0.316)),
    5: ((0.64, 0.33), (0.29, 0.60), (0.15, 0.06), _D65),
    6: ((0.63, 0.34), (0.31, 0.595), (0.155, 0.07), _D65),
    7: ((0.63, 0.34), (0.31, 0.595), (0.155, 0.07), _D65),
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), _D65),
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), _DCI_WHITE),
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), _D65),
    22: ((0.630, 0.340), (0.295, 0.605), (0.155, 0.077), _D65),
}


class Curve(NamedTuple):
    """From a value to light, both 0 to 1: ((a v + b) ** g) from d on, and c v below (ICC.1, type 3)."""

    g: float
    a: float = 1.0
    b: float = 0.0
    c: float = 0.0
    d: float = 0.0


SRGB_CURVE = Curve(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
_BT709 = Curve(1 / 0.45, 1 / 1.099, 0.099 / 1.099, 1 / 4.5, 0.081)
_TRANSFERS = {
    **dict.fromkeys((1, 6, 14, 15), _BT709),
    4: Curve(2.2),
    5: Curve(2.8),
    8: Curve(1.0),
    13: SRGB_CURVE,
}
_HDR = {16: "PQ", 18: "HLG"}
_UNSPECIFIED = 2


class ColourSpace(NamedTuple):
    """Chromaticities (x, y) of red, green, blue and white, and the curve of all three."""

    primaries: tuple[tuple[float, float], ...]
    curve: Curve


def of_code_points(primaries: int, transfer: int) -> ColourSpace | None:
    """The space of two numbers of H.273; None for sRGB, and where they say nothing.

    Raises:
        UnusableImageError: for HDR, which has no defined rendering in 8 bits, and for numbers of no meaning.
    """
    if transfer in _HDR:
        raise UnusableImageError(
            f"HDR ({_HDR[transfer]}) has no defined rendering in 8 bits; convert it to sRGB"
        )
    if _UNSPECIFIED in (primaries, transfer) or (primaries, transfer) == (1, 13):
        return None
    if primaries not in _PRIMARIES or transfer not in _TRANSFERS:
        raise UnusableImageError(f"unknown colours (primaries {primaries}, transfer {transfer} of H.273)")
    return ColourSpace(_PRIMARIES[primaries], _TRANSFERS[transfer])


def of_gamma(encoded: float | None, chromaticities: Sequence[float]) -> ColourSpace:
    """The space of a PNG's gAMA and cHRM.

    Args:
        encoded: exponent from light to values, such as 1 / 2.2; None is the curve of sRGB.
        chromaticities: x and y of white, red, green and blue; empty are those of sRGB.
    """
    curve = SRGB_CURVE if encoded is None else Curve(1 / encoded)
    if not chromaticities:
        return ColourSpace(_PRIMARIES[1], curve)
    pairs = list(zip(chromaticities[::2], chromaticities[1::2], strict=True))
    return ColourSpace((*pairs[1:], pairs[0]), curve)


def profile_of(space: ColourSpace) -> bytes:
    """An ICC profile of the space.

    Raises:
        UnusableImageError: if the primaries span nothing.
    """
    matrix = _to_d50(space.primaries)
    curve = struct.pack(">4sIHH5i", b"para", 0, 3, 0, *map(_fixed, space.curve))
    tags = {
        b"wtpt": _xyz(_D50),
        **{name: _xyz(matrix[:, column]) for column, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))},
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve),
    }
    table, body = b"", b""
    first = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4sII", name, first + len(body), len(content))
        body += content
    size = first + len(body)
    head = struct.pack(
        ">I4sI4s4s4s12s4s4sI4s4s8sI3i", size, b"", 0x04300000, b"mntr", b"RGB ", b"XYZ ", b"", b"acsp",
        b"", 0, b"", b"", b"", 1, *map(_fixed, _D50),
    )  # fmt: skip
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _to_d50(primaries: Sequence[tuple[float, float]]) -> np.ndarray:
    """(3, 3) matrix from linear RGB to XYZ with white at D50."""
    try:
        places = np.array([[x / y, 1.0, (1 - x - y) / y] for x, y in primaries]).T  # (3, 4) XYZ at Y = 1
        light = places[:, :3] * np.linalg.solve(places[:, :3], places[:, 3])
    except (ZeroDivisionError, np.linalg.LinAlgError) as error:
        raise UnusableImageError("its primaries span no colours") from error
    gains = (_BRADFORD @ _D50) / (_BRADFORD @ places[:, 3])
    return np.linalg.inv(_BRADFORD) @ np.diag(gains) @ _BRADFORD @ light


def _xyz(values: np.ndarray) -> bytes:
    return struct.pack(">4sI3i", b"XYZ ", 0, *map(_fixed, values))


def _fixed(value: float) -> int:
    """As s15Fixed16Number."""
    return round(float(value) * 65536)
