"""Images of every kind come out upright, RGB and 8-bit."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image

from stages.lib.data.images import UnusableImageError, stored_image

GRADIENT = np.linspace(0, 255, 6 * 8 * 3).reshape(6, 8, 3).round().astype(np.uint8)  # (h, w, 3)


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = stored_image(data)
    with Image.open(io.BytesIO(image.data)) as opened:
        assert opened.mode == "RGB"
        assert opened.size == (image.width, image.height)
        return np.asarray(opened)


@pytest.mark.parametrize(
    ("file_format", "options"), [("JPEG", {}), ("PNG", {"compress_level": 0}), ("WEBP", {})]
)
def test_plain_files_keep_their_bytes(file_format: str, options: dict[str, int]) -> None:
    data = encoded(Image.fromarray(GRADIENT), file_format, **options)
    assert stored_image(data) == (data, 8, 6)


def test_other_formats_become_png() -> None:
    image = stored_image(encoded(Image.fromarray(GRADIENT), "BMP"))
    assert image.data.startswith(b"\x89PNG")
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(GRADIENT), "BMP")), GRADIENT)


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, GRADIENT),
        (2, GRADIENT[:, ::-1]),
        (3, GRADIENT[::-1, ::-1]),
        (4, GRADIENT[::-1]),
        (5, GRADIENT.transpose(1, 0, 2)),
        (6, np.rot90(GRADIENT, -1)),
        (7, np.rot90(GRADIENT, 2).transpose(1, 0, 2)),
        (8, np.rot90(GRADIENT, 1)),
    ],
)
@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_exif_orientation(file_format: str, orientation: int, upright: np.ndarray) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(Image.fromarray(GRADIENT), file_format, exif=exif)
    np.testing.assert_array_equal(pixels(data), upright)


def test_jpeg_with_orientation_is_turned_and_loses_it() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = stored_image(encoded(Image.fromarray(GRADIENT), "JPEG", exif=exif))
    assert (image.width, image.height) == (6, 8)
    with Image.open(io.BytesIO(image.data)) as opened:
        assert not opened.getexif()


def test_alpha_lies_over_white() -> None:
    rgba = np.dstack([GRADIENT, np.full((6, 8), 128, np.uint8)])
    rgba[0, 0] = (10, 20, 30, 0)
    over_white = 255 + (GRADIENT.astype(float) - 255) * 128 / 255
    over_white[0, 0] = 255
    result = pixels(encoded(Image.fromarray(rgba), "PNG")).astype(float)
    np.testing.assert_allclose(result, over_white, atol=1)
    assert result[0, 0].tolist() == [255, 255, 255]


def test_grey_with_alpha() -> None:
    grey = np.array([[0, 100], [200, 50]], np.uint8)
    alpha = np.array([[255, 255], [0, 0]], np.uint8)
    result = pixels(encoded(Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]), "PNG"))
    assert result[..., 0].tolist() == [[0, 100], [255, 255]]


def test_palette_with_and_without_transparency() -> None:
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    assert pixels(encoded(palette, "PNG")).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
    one_index = pixels(encoded(palette, "PNG", transparency=1))
    assert one_index.tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]
    alpha_table = pixels(encoded(palette, "PNG", transparency=bytes([255, 128, 0])))
    assert alpha_table.tolist() == [[[255, 0, 0], [127, 255, 127], [255, 255, 255]]]
    assert pixels(encoded(palette, "GIF", transparency=1)).tolist() == one_index.tolist()


def test_transparent_colour_of_an_rgb_png() -> None:
    image = Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8))
    assert pixels(encoded(image, "PNG", transparency=(1, 2, 3))).tolist() == [[[255, 255, 255], [4, 5, 6]]]


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "TIFF"])
def test_grey(file_format: str) -> None:
    grey = np.repeat(np.array([[0, 128, 255]], np.uint8), 8, axis=0).repeat(8, axis=1)
    result = pixels(encoded(Image.fromarray(grey), file_format))
    np.testing.assert_allclose(result, np.dstack([grey] * 3), atol=2)


def test_one_bit() -> None:
    image = Image.fromarray(np.array([[0, 255]], np.uint8)).convert("1")
    assert pixels(encoded(image, "PNG")).tolist() == [[[0, 0, 0], [255, 255, 255]]]


@pytest.mark.parametrize("file_format", ["JPEG", "TIFF"])
def test_cmyk(file_format: str) -> None:
    cyan = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    np.testing.assert_allclose(pixels(encoded(cyan, file_format))[4, 4], [0, 255, 255], atol=2)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_keeps_its_range(file_format: str) -> None:
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    result = pixels(encoded(Image.fromarray(values), file_format))
    assert result[..., 0].tolist() == [[0, 1, 128, 255]]


def test_16_bit_rgb_png_becomes_8_bit() -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = b"\x00" + struct.pack(">6H", 0, 65535, 0x8000, 0x1234, 0xFFFF, 0)
    data = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(row))
        + chunk(b"IEND", b"")
    )
    assert stored_image(data).data[24] == 8
    assert pixels(data).tolist() == [[[0, 255, 128], [0x12, 255, 0]]]


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_an_animation(file_format: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if file_format == "WEBP" else {}
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    image = stored_image(data)
    assert image.data != data
    assert np.unique(pixels(data).reshape(-1, 3), axis=0).tolist() == [[255, 0, 0]]


def test_first_picture_of_a_multi_picture_jpeg() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert data.startswith(b"\xff\xd8")
    np.testing.assert_allclose(pixels(data)[4, 4], [255, 0, 0], atol=2)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_truncated_files_are_broken(file_format: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(Image.fromarray(noise), file_format)
    with pytest.raises(UnusableImageError):
        stored_image(data[: len(data) * 2 // 3])


def test_reasons_are_the_same_every_time() -> None:
    reasons = []
    for _ in range(2):
        with pytest.raises(UnusableImageError) as caught:
            stored_image(b"no image")
        reasons.append(str(caught.value))
    assert reasons[0] == reasons[1]
    assert "0x" not in reasons[0]


def test_floating_point_values_are_refused() -> None:
    with pytest.raises(UnusableImageError, match="no defined range"):
        stored_image(encoded(Image.fromarray(np.zeros((2, 2), np.float32)), "TIFF"))


def test_postscript_is_never_opened() -> None:
    with pytest.raises(UnusableImageError, match="known format"):
        stored_image(encoded(Image.new("RGB", (4, 4)), "EPS"))


def test_a_flipped_bit_among_the_pixels_of_a_png_is_found() -> None:
    """Any of them: libpng refuses such a file too, while Pillow alone decodes it to other pixels."""
    buffer = io.BytesIO()
    Image.effect_noise((20, 20), 60).convert("RGB").save(buffer, "PNG")
    whole = buffer.getvalue()
    first = whole.index(b"IDAT") + 4
    for position in range(first, whole.index(b"IEND") - 4):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(UnusableImageError, match="broken image"):
            stored_image(bytes(damaged))
