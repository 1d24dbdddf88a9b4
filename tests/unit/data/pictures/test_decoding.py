"""Images of every kind come out upright, RGB and 8-bit."""

from __future__ import annotations

import importlib
import io
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, PngImagePlugin

from stages.lib.data.image_shards import StoredImage
from stages.lib.data.pictures import decoding, storing
from stages.lib.data.pictures.decoding import decoded
from stages.lib.data.pictures.formats import UnusableImageError

GRADIENT = np.linspace(0, 255, 6 * 8 * 3).reshape(6, 8, 3).round().astype(np.uint8)  # (h, w, 3)


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def stored_image(data: bytes) -> StoredImage:
    return storing.stored_image(data, 10**8).image


def pixels(data: bytes) -> np.ndarray:
    """What every stage sees of a file that prepare has stored."""
    image = stored_image(data)
    picture = decoded(image.data)
    assert picture.mode == "RGB"
    assert picture.size == (image.width, image.height)
    return np.asarray(picture)


@pytest.mark.parametrize(
    ("file_format", "options"), [("JPEG", {}), ("PNG", {"compress_level": 0}), ("WEBP", {})]
)
def test_plain_files_keep_their_bytes(file_format: str, options: dict[str, int]) -> None:
    data = encoded(Image.fromarray(GRADIENT), file_format, **options)
    assert stored_image(data) == StoredImage(data, 8, 6)


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


@pytest.mark.parametrize("file_format", ["JPEG", "WEBP", "AVIF"])
def test_a_turned_photograph_keeps_its_bytes_and_is_turned_when_it_is_decoded(file_format: str) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    smooth = Image.fromarray(GRADIENT).resize((64, 48), Image.Resampling.BICUBIC)
    data = encoded(smooth, file_format, exif=exif, quality=95)
    image = stored_image(data)
    assert (image.data, image.width, image.height) == (data, 48, 64)
    np.testing.assert_allclose(pixels(data), np.rot90(np.asarray(smooth), -1), atol=12)


def test_heic_keeps_its_bytes() -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    smooth = Image.fromarray(GRADIENT).resize((64, 48), Image.Resampling.BICUBIC)
    data = encoded(smooth, "HEIF", quality=95)
    assert stored_image(data) == StoredImage(data, 64, 48)
    np.testing.assert_allclose(pixels(data), np.asarray(smooth), atol=12)


def test_heic_without_its_package_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    with pytest.raises(UnusableImageError, match=r"pip install -e '\.\[heic\]'"):
        stored_image(b"\0\0\0\x18ftypheic" + bytes(100))


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
    assert stored_image(data).data == data
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


def png_of(
    depth: int, colour_type: int, size: tuple[int, int], rows: bytes, *chunks: tuple[bytes, bytes]
) -> bytes:
    """A PNG of given bits, rows with their filter bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", *size, depth, colour_type, 0, 0, 0)
    parts = ((b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    ("depth", "row", "transparent", "expected"),
    [
        (1, bytes([0b01000000]), 0, [255, 255]),
        (1, bytes([0b01000000]), 1, [0, 255]),
        (2, bytes([0b00011011]), 2, [0, 85, 255, 255]),
        (4, bytes([0x05, 0xAF]), 5, [0, 255, 170, 255]),
        (8, bytes([0, 7, 8, 255]), 7, [0, 255, 8, 255]),
        (16, struct.pack(">4H", 0, 0x0700, 0x0701, 0xFFFF), 0x0701, [0, 7, 255, 255]),
    ],
)
def test_the_transparent_grey_of_any_depth(
    depth: int, row: bytes, transparent: int, expected: list[int]
) -> None:
    """PNG, third edition, 11.3.2.1: all bits of the sample are compared."""
    data = png_of(depth, 0, (len(expected), 1), b"\0" + row, (b"tRNS", struct.pack(">H", transparent)))
    assert pixels(data)[0, :, 0].tolist() == expected


def test_the_transparent_colour_of_16_bits_is_compared_with_all_of_them() -> None:
    colours = [(0x1234, 0x5678, 0x9ABC), (0x1234, 0x5678, 0x9ABD), (0x1235, 0x5678, 0x9ABC), (0, 0, 0)]
    row = b"".join(struct.pack(">3H", *colour) for colour in colours)
    data = png_of(16, 2, (4, 1), b"\0" + row, (b"tRNS", struct.pack(">3H", *colours[0])))
    assert pixels(data)[0].tolist() == [[255] * 3, [0x12, 0x56, 0x9A], [0x12, 0x56, 0x9A], [0, 0, 0]]


def tiff_of(bits: int, photometric: int, samples: bytes, width: int, *extra: tuple[int, int, int]) -> bytes:
    """A little-endian TIFF of one grey row: (tag, type, value) each."""
    tags = sorted(
        [(256, 4, width), (257, 4, 1), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8),
         (277, 3, 1), (278, 4, 1), (279, 4, len(samples)), *extra]
    )  # fmt: skip
    body = samples + b"\0" * (len(samples) % 2)
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    start = 8 + len(body)
    return b"II*\0" + struct.pack("<I", start) + body + struct.pack("<H", len(tags)) + entries + bytes(4)


def test_12_bit_grey_is_scaled_by_its_own_maximum() -> None:
    packed = bytes([0x00, 0x0F, 0xFF, 0x80, 0x04, 0x00])  # 0, 4095, 2048, 1024
    assert pixels(tiff_of(12, 1, packed, 4))[0, :, 0].tolist() == [0, 255, 128, 64]


@pytest.mark.parametrize(("photometric", "expected"), [(1, [0, 128, 255]), (0, [255, 127, 0])])
def test_16_bit_grey_the_right_way_round(photometric: int, expected: list[int]) -> None:
    samples = struct.pack("<3H", 0, 0x8000, 0xFFFF)
    assert pixels(tiff_of(16, photometric, samples, 3))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(("photometric", "expected"), [(1, [0, 128, 255]), (0, [255, 127, 0])])
def test_8_bit_grey_the_right_way_round(photometric: int, expected: list[int]) -> None:
    assert pixels(tiff_of(8, photometric, bytes([0, 128, 255]), 3))[0, :, 0].tolist() == expected


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ((254, 4, 1), "raw camera file"),  # NewSubfileType: a thumbnail
        ((50706, 1, 0x00000401), "raw camera file"),  # DNGVersion
        ((339, 3, 2), "signed"),
    ],
)
def test_what_is_no_picture_in_a_tiff_is_refused(extra: tuple[int, int, int], message: str) -> None:
    with pytest.raises(UnusableImageError, match=message):
        stored_image(tiff_of(8, 1, bytes(64), 64, extra))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 4}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_that_can_only_be_half_decoded(mode: str, options: dict[str, object]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    whole = encoded(Image.fromarray(noise).resize((192, 192)).convert(mode), "JPEG", quality=90, **options)
    assert stored_image(whole).data == whole
    scan = whole.rindex(b"\xff\xda")
    # Of a progressive one, the last scans only refine: libjpeg cannot tell what was lost inside of them.
    inside = [
        whole[: scan + 400] + bytes(300) + whole[scan + 700 :],
        whole[: scan + 400] + whole[scan + 900 :],
    ]
    cut = [whole[: len(whole) // 2] + b"\xff\xd9", whole[:-200] + b"\xff\xd9"]
    for damaged in cut if options.get("progressive") else cut + inside:
        with pytest.raises(UnusableImageError, match="broken image"):
            stored_image(damaged)
    for odd in (whole + b"what follows", whole[:-2] + bytes(16) + whole[-2:], whole + whole):
        np.testing.assert_array_equal(pixels(odd), pixels(whole))


def test_large_texts_and_profiles_are_no_damage() -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    info.add_itxt("more", "y" * 3_000_000, zip=True)
    data = encoded(Image.fromarray(GRADIENT), "PNG", pnginfo=info, icc_profile=bytes(2_000_000))
    np.testing.assert_array_equal(pixels(data), GRADIENT)


def test_the_limit_of_pixels_is_named_and_is_ours() -> None:
    data = png_of(1, 0, (20_000, 10_000), (b"\0" + bytes(2500)) * 10_000)
    with pytest.raises(
        UnusableImageError, match=r"20000 x 10000 pixels, prepare\.max_image_pixels is 199999999; raise"
    ):
        storing.stored_image(data, 199_999_999)
    image = storing.stored_image(data, 200_000_000).image
    assert (image.data, image.width, image.height) == (data, 20_000, 10_000)


@pytest.mark.slow
def test_memory_of_a_large_16_bit_image_is_bounded() -> None:
    """13000 x 13000 of 16 bits: Pillow's own buffer, the picture in 8 bits, and little more."""
    code = """
import resource, sys, zlib, struct
from tests.unit.data.pictures.test_decoding import png_of
from stages.lib.data.pictures.decoding import decoded
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
data = png_of(16, 0, (6000, 6000), (b"\\0" + bytes(12000)) * 6000)
picture = decoded(data)
assert picture.size == (6000, 6000)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 6000**2)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 9  # bytes a pixel: 2 of 16 bits, 1 of grey, 4 of RGB, and the file's


def test_nothing_is_said_of_files_that_can_be_read(capfd: pytest.CaptureFixture[str]) -> None:
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    exif = encoded(
        Image.fromarray(GRADIENT), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01" * 40
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(decoding)  # sets its filter again, which pytest has taken away
        for data in (encoded(palette, "PNG", transparency=bytes([255, 128, 0])), exif,
                     tiff_of(8, 1, bytes([1, 2, 3]), 3, (65000, 99, 1))):  # fmt: skip
            decoding.decoded(data)
    assert capfd.readouterr() == ("", "")


def graded() -> Image.Image:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3)).astype(np.uint8))
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def cut_out() -> Image.Image:
    image = graded()
    image.putalpha(image.getchannel("A").point(lambda value: 255 * (value > 99)))
    return image


def premultiplied() -> bytes:
    """A TIFF with associated alpha, ExtraSamples 1."""
    pixels = np.asarray(graded()).astype(np.uint32)
    pixels[..., :3] = (pixels[..., :3] * pixels[..., 3:] + 127) // 255
    extra = struct.pack("<HHLL", 338, 3, 1, 1)
    data = encoded(Image.fromarray(pixels.astype(np.uint8)), "TIFF")
    start = int.from_bytes(data[4:8], "little")
    at = data.index(struct.pack("<HHL", 338, 3, 1), start)
    return data[:at] + extra + data[at + len(extra) :]


WITH_ALPHA = {
    "tiff": (lambda: encoded(graded(), "TIFF"), graded),
    "tiff, associated": (premultiplied, graded),
    "tga": (lambda: encoded(graded(), "TGA"), graded),
    "tga, packed": (lambda: encoded(graded(), "TGA", compression="tga_rle"), graded),
    "gif": (lambda: encoded(cut_out(), "GIF"), cut_out),
    "gif, moving": (
        lambda: encoded(cut_out(), "GIF", save_all=True, append_images=[Image.new("RGB", (16, 12), "red")]),
        cut_out,
    ),
    "png, moving": (
        lambda: encoded(graded(), "PNG", save_all=True, append_images=[Image.new("RGBA", (16, 12), "red")]),
        graded,
    ),
    "webp, moving": (
        lambda: encoded(
            graded(), "WEBP", lossless=True, exact=True, save_all=True,
            append_images=[Image.new("RGBA", (16, 12), "red")],
        ),
        graded,
    ),
    "png": (lambda: encoded(graded(), "PNG"), graded),
    "webp": (lambda: encoded(graded(), "WEBP", lossless=True, exact=True), graded),
}  # fmt: skip


@pytest.mark.parametrize("form", WITH_ALPHA)
def test_opacity_is_kept_in_every_form(form: str) -> None:
    make, expected = WITH_ALPHA[form]
    data, alpha = make(), np.asarray(expected().getchannel("A")).astype(int)
    stored = stored_image(data).data
    found = decoding.alpha_of(stored)
    assert found is not None
    assert np.abs(np.asarray(found) - alpha).max() == 0
    over_white = Image.alpha_composite(Image.new("RGBA", (16, 12), "white"), expected()).convert("RGB")
    difference = np.abs(np.asarray(decoded(stored)).astype(int) - np.asarray(over_white))
    # Colours of what is nearly transparent are coarse where they are stored premultiplied; a GIF has few.
    assert difference.max() <= (2 if "associated" in form else 32 if "gif" in form else 0)
    np.testing.assert_array_equal(np.asarray(decoded(data)), np.asarray(decoded(stored)))


def test_a_jpeg_is_opaque_and_not_decoded_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.fromarray(GRADIENT), "JPEG")
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("decoded"))
    assert decoding.alpha_of(data) is None
