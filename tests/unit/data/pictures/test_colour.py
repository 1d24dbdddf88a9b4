"""Colours come out as another decoder, and the definitions of the colour spaces, have them."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from skimage import data as pictures

from stages.lib.data.pictures import storing
from stages.lib.data.pictures.colour_spaces import ColourSpace, Curve, profile_of
from stages.lib.data.pictures.decoding import decoded
from stages.lib.data.pictures.formats import UnusableImageError

pyvips = pytest.importorskip("pyvips")
PHOTOGRAPH = Image.fromarray(pictures.astronaut()).resize((160, 160), Image.Resampling.BOX)
D65 = (0.3127, 0.3290)
ADOBE = ColourSpace(((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), D65), Curve(563 / 256))
PROPHOTO = ColourSpace(((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001), (0.3457, 0.3585)), Curve(1.8))
LINEAR = ColourSpace(((0.64, 0.33), (0.30, 0.60), (0.15, 0.06), D65), Curve(1.0))


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def by_vips(data: bytes) -> np.ndarray:
    """What libvips makes of a file, its embedded profile converted to sRGB."""
    image = pyvips.Image.new_from_buffer(data, "").autorot()
    image = image.icc_transform("srgb", embedded=True, intent="relative", black_point_compensation=True)
    return image.cast("uchar").numpy().astype(int)[..., :3]


def grey_profile(gamma: float) -> bytes:
    """ICC.1:2010, a monochrome display profile with one curve."""
    curve = struct.pack(">4sIIH", b"curv", 0, 1, round(gamma * 256)) + b"\0\0"
    white = struct.pack(">4sI3i", b"XYZ ", 0, 63190, 65536, 54061)
    first = 128 + 4 + 12 * 2
    table = struct.pack(">I4sII4sII", 2, b"wtpt", first, len(white), b"kTRC", first + len(white), len(curve))
    size = first + len(white) + len(curve)
    head = struct.pack(">I4sI4s4s4s", size, b"", 0x02400000, b"mntr", b"GRAY", b"XYZ ") + bytes(12) + b"acsp"
    head = head.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    return head.ljust(128, b"\0") + table + white + curve


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("name", ["p3", "adobe", "prophoto", "linear"])
def test_profiles_of_rgb(file_format: str, name: str) -> None:
    profile = {"adobe": ADOBE, "prophoto": PROPHOTO, "linear": LINEAR}.get(name)
    content = profile_of(profile) if profile else bytes(pyvips.Image.profile_load("p3"))
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(PHOTOGRAPH, file_format, icc_profile=content, **options)
    ours = np.asarray(decoded(data)).astype(int)
    assert np.abs(ours - by_vips(data)).mean() < 0.6
    assert np.abs(ours - np.asarray(PHOTOGRAPH).astype(int)).mean() > 2  # the profile counts
    assert storing.stored_image(data, 10**6).is_converted


def test_cmyk() -> None:
    cmyk = PHOTOGRAPH.convert("CMYK")
    for file_format in ("JPEG", "TIFF"):
        data = encoded(cmyk, file_format, icc_profile=bytes(pyvips.Image.profile_load("cmyk")))
        assert np.abs(np.asarray(decoded(data)).astype(int) - by_vips(data)).mean() < 1


def test_grey() -> None:
    grey = PHOTOGRAPH.convert("L")
    for gamma in (1.0, 1.8, 2.6):
        data = encoded(grey, "PNG", icc_profile=grey_profile(gamma))
        light = (np.asarray(grey) / 255.0) ** gamma
        expected = 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
        np.testing.assert_allclose(np.asarray(decoded(data))[..., 1], expected, atol=1.5)
    data = encoded(grey, "PNG", icc_profile=profile_of(LINEAR))  # of three channels, on grey: R = G = B
    np.testing.assert_allclose(
        np.asarray(decoded(data)),
        np.asarray(decoded(encoded(grey.convert("RGB"), "PNG", icc_profile=profile_of(LINEAR)))),
    )


def test_transparency_and_palettes_keep_theirs() -> None:
    rgba = PHOTOGRAPH.copy()
    rgba.putalpha(Image.linear_gradient("L").resize(rgba.size))
    profile = bytes(pyvips.Image.profile_load("p3"))
    colours = np.asarray(decoded(encoded(PHOTOGRAPH, "PNG", icc_profile=profile))).astype(float)
    opacity = np.asarray(rgba.getchannel("A"))[..., None] / 255.0
    expected = 255 + (colours - 255) * opacity
    np.testing.assert_allclose(
        np.asarray(decoded(encoded(rgba, "PNG", icc_profile=profile))), expected, atol=1
    )
    palette = PHOTOGRAPH.quantize(32)
    expected = np.asarray(decoded(encoded(palette.convert("RGB"), "PNG", icc_profile=profile)))
    np.testing.assert_array_equal(np.asarray(decoded(encoded(palette, "PNG", icc_profile=profile))), expected)


def test_what_is_srgb_already_is_left_alone() -> None:
    from PIL import ImageCms

    for profile in (
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
        bytes(pyvips.Image.profile_load("srgb")),
    ):
        data = encoded(PHOTOGRAPH, "PNG", icc_profile=profile)
        checked = storing.stored_image(data, 10**6)
        assert not checked.is_converted
        np.testing.assert_array_equal(np.asarray(decoded(data)), np.asarray(PHOTOGRAPH))


def test_profiles_that_do_not_belong_are_passed_over() -> None:
    for profile in (b"damaged", grey_profile(1.0), bytes(pyvips.Image.profile_load("cmyk")), bytes(200)):
        data = encoded(PHOTOGRAPH, "PNG", icc_profile=profile)
        np.testing.assert_array_equal(np.asarray(decoded(data)), np.asarray(PHOTOGRAPH))
        assert not storing.stored_image(data, 10**6).is_converted


def with_chunks(*chunks: tuple[bytes, bytes]) -> bytes:
    """The photograph as a PNG with chunks behind its header."""
    data = encoded(PHOTOGRAPH, "PNG")
    added = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
    return data[:33] + added + data[33:]


def srgb_of(values: np.ndarray, to_light: object, primaries: list[tuple[float, float]]) -> np.ndarray:
    """By hand in float64: to light, to XYZ, to sRGB's primaries (white is D65 in all), to sRGB's curve."""

    def matrix(places: list[tuple[float, float]]) -> np.ndarray:
        columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in places]).T
        white = np.array([D65[0] / D65[1], 1, (1 - sum(D65)) / D65[1]])
        return columns * np.linalg.solve(columns, white)

    to_srgb = np.linalg.inv(matrix([(0.64, 0.33), (0.30, 0.60), (0.15, 0.06)])) @ matrix(primaries)
    light = np.clip(to_light(values / 255.0) @ to_srgb.T, 0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def from_srgb(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def from_bt709(values: np.ndarray) -> np.ndarray:
    return np.where(values < 0.081, values / 4.5, ((values + 0.099) / 1.099) ** (1 / 0.45))


SRGB = [(0.64, 0.33), (0.30, 0.60), (0.15, 0.06)]
P3 = [(0.680, 0.320), (0.265, 0.690), (0.150, 0.060)]
BT2020 = [(0.708, 0.292), (0.170, 0.797), (0.131, 0.046)]


def chrm(primaries: list[tuple[float, float]]) -> bytes:
    return struct.pack(">8I", *(round(value * 100_000) for pair in (D65, *primaries) for value in pair))


@pytest.mark.parametrize(
    ("chunks", "to_light", "primaries"),
    [
        ([(b"gAMA", struct.pack(">I", 100_000))], lambda v: v, SRGB),
        ([(b"gAMA", struct.pack(">I", 55_556))], lambda v: v**1.8, SRGB),
        ([(b"gAMA", struct.pack(">I", 45_455)), (b"cHRM", chrm(P3))], lambda v: v**2.2, P3),
        ([(b"cHRM", chrm(BT2020))], from_srgb, BT2020),
        ([(b"cICP", bytes([12, 13, 0, 1]))], from_srgb, P3),
        ([(b"cICP", bytes([9, 1, 0, 1]))], from_bt709, BT2020),
        ([(b"cICP", bytes([1, 8, 0, 1])), (b"gAMA", struct.pack(">I", 45_455))], lambda v: v, SRGB),
        ([(b"cICP", bytes([1, 4, 0, 1])), (b"sRGB", b"\0")], lambda v: v**2.2, SRGB),
    ],
)
def test_colour_chunks_of_png(chunks: list[tuple[bytes, bytes]], to_light: object, primaries: object) -> None:
    """PNG, third edition, 4.3: cICP counts before iCCP, sRGB, and gAMA with cHRM."""
    data = with_chunks(*chunks)
    expected = srgb_of(np.asarray(PHOTOGRAPH).astype(float), to_light, primaries)
    difference = np.abs(np.asarray(decoded(data)) - expected)
    assert difference.mean() < 0.6
    assert np.quantile(difference, 0.99) < 2.5
    assert storing.stored_image(data, 10**6).is_converted


@pytest.mark.parametrize(
    "chunks",
    [
        [(b"sRGB", b"\0"), (b"gAMA", struct.pack(">I", 100_000))],
        [(b"gAMA", struct.pack(">I", 45_455))],
        [(b"gAMA", struct.pack(">I", 45_455)), (b"cHRM", chrm(SRGB))],
        [(b"cICP", bytes([1, 13, 0, 1])), (b"gAMA", struct.pack(">I", 100_000))],
        [(b"cICP", bytes([2, 2, 0, 1]))],
    ],
)
def test_chunks_that_say_srgb(chunks: list[tuple[bytes, bytes]]) -> None:
    data = with_chunks(*chunks)
    np.testing.assert_array_equal(np.asarray(decoded(data)), np.asarray(PHOTOGRAPH))
    assert not storing.stored_image(data, 10**6).is_converted


def test_a_profile_counts_before_gamma() -> None:
    profile = bytes(pyvips.Image.profile_load("p3"))
    plain = encoded(PHOTOGRAPH, "PNG", icc_profile=profile)
    gamma = struct.pack(">I", 100_000)
    chunk = struct.pack(">I", 4) + b"gAMA" + gamma + struct.pack(">I", zlib.crc32(b"gAMA" + gamma))
    np.testing.assert_array_equal(
        np.asarray(decoded(plain[:33] + chunk + plain[33:])), np.asarray(decoded(plain))
    )


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (bytes([9, 16, 0, 1]), r"HDR \(PQ\) has no defined rendering"),
        (bytes([9, 18, 0, 1]), r"HDR \(HLG\)"),
        (bytes([1, 13, 1, 1]), "coded as video"),
        (bytes([1, 13, 0, 0]), "coded as video"),
        (bytes([77, 13, 0, 1]), "unknown colours"),
    ],
)
def test_colours_without_a_defined_rendering_are_refused(chunk: bytes, message: str) -> None:
    with pytest.raises(UnusableImageError, match=message):
        storing.stored_image(with_chunks((b"cICP", chunk)), 10**6)
