"""What is seen through: opacity is kept whatever the form, and pictures stay those over white."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image

from stages.lib.data.pictures.decoding import alpha_of, decoded
from stages.lib.data.pictures.formats import UnusableImageError
from stages.lib.data.pictures.storing import stored_image
from tests.unit.data.pictures.test_decoding import encoded

tifffile = pytest.importorskip("tifffile")
RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (12, 16, 3), np.uint8)
OPACITY = RNG.integers(0, 256, (12, 16), np.uint8)
OPACITY[0], OPACITY[1] = 0, 255
SEE_THROUGH = np.dstack([COLOURS, OPACITY])


def over_white(colours: np.ndarray, opacity: np.ndarray) -> np.ndarray:
    """(h, w, 3) in float64 by hand, of 0 to 255."""
    share = opacity[..., None].astype(np.float64) / 255
    return colours * share + 255 * (1 - share)


def kept(data: bytes) -> tuple[Image.Image, np.ndarray, np.ndarray | None]:
    """What is stored of a file, and the picture and the opacity that are read from it again."""
    stored = stored_image(data, 10**6).image.data
    alpha = alpha_of(stored)
    picture = np.asarray(decoded(stored)).astype(np.float64)
    # What is stored shows what the file itself does, to the level.
    np.testing.assert_array_equal(picture, np.asarray(decoded(data)))
    return Image.open(io.BytesIO(stored)), picture, None if alpha is None else np.asarray(alpha)


def tiff(samples: np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    colours = "rgb" if samples.shape[-1] == 4 else "minisblack"
    planes = samples.transpose(2, 0, 1) if options.get("planarconfig") == "separate" else samples
    tifffile.imwrite(buffer, planes, photometric=colours, extrasamples=[kind], metadata=None, **options)
    return buffer.getvalue()


def test_colours_below_what_is_see_through_are_kept() -> None:
    image, picture, alpha = kept(encoded(Image.fromarray(SEE_THROUGH), "TGA"))
    assert (image.format, image.mode) == ("PNG", "RGBA")
    np.testing.assert_array_equal(np.asarray(image), SEE_THROUGH)
    np.testing.assert_array_equal(alpha, OPACITY)
    np.testing.assert_allclose(picture, over_white(COLOURS, OPACITY), atol=1)


@pytest.mark.parametrize("file_format", ["PNG", "WEBP", "GIF"])
def test_opacity_of_the_first_frame(file_format: str) -> None:
    first = SEE_THROUGH.copy()
    first[..., 3] = np.where(OPACITY > 127, 255, 0)
    if file_format == "GIF":  # of a palette
        first[..., :3] = np.where(COLOURS > 127, 255, 0)
    frames = [Image.fromarray(first), Image.new("RGBA", (16, 12), (1, 2, 3, 255))]
    options = {"lossless": True, "exact": True} if file_format == "WEBP" else {}
    data = encoded(frames[0], file_format, save_all=True, append_images=frames[1:], **options)
    image, picture, alpha = kept(data)
    assert image.mode == "RGBA"
    np.testing.assert_array_equal(alpha, first[..., 3])
    np.testing.assert_array_equal(picture, over_white(first[..., :3], first[..., 3]))


def test_what_is_opaque_is_stored_without_opacity() -> None:
    opaque = np.dstack([COLOURS, np.full((12, 16), 255, np.uint8)])
    image, picture, alpha = kept(encoded(Image.fromarray(opaque), "TIFF"))
    assert (image.mode, alpha) == ("RGB", None)
    np.testing.assert_array_equal(picture, COLOURS)


@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", ["assocalpha", "unassalpha"])
@pytest.mark.parametrize("maximum", [255, 65535])
def test_tiffs_with_straight_and_premultiplied_colours(
    maximum: int, kind: str, order: str, planes: str
) -> None:
    share = OPACITY[..., None] / 255
    colours = COLOURS / 255 * (share if kind == "assocalpha" else 1)
    samples = (np.dstack([colours, share]) * maximum).round().astype(f"uint{8 if maximum == 255 else 16}")
    image, picture, alpha = kept(tiff(samples, kind, byteorder=order, planarconfig=planes))
    assert image.mode == "RGBA"
    np.testing.assert_array_equal(alpha, OPACITY)
    # Of 16 bits Pillow takes the upper 8, and divides them by the opacity.
    np.testing.assert_allclose(picture, over_white(COLOURS, OPACITY), atol=1.5 if maximum == 255 else 2.5)


@pytest.mark.parametrize("kind", ["assocalpha", "unassalpha"])
def test_grey_tiffs(kind: str) -> None:
    share = OPACITY / 255
    grey = COLOURS[..., 0] * (share if kind == "assocalpha" else 1)
    samples = np.dstack([grey.round().astype(np.uint8), OPACITY])
    _, picture, alpha = kept(tiff(samples, kind))
    np.testing.assert_array_equal(alpha, OPACITY)
    np.testing.assert_allclose(picture[..., 0], over_white(COLOURS, OPACITY)[..., 0], atol=1.5)
    with pytest.raises(UnusableImageError, match=r"in separate planes is not read; save it with"):
        kept(tiff(samples, kind, planarconfig="separate"))


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiffs_of_16_bits_in_separate_planes(compression: str | None, order: str) -> None:
    samples = COLOURS.astype(np.uint16) * 257
    buffer = io.BytesIO()
    tifffile.imwrite(
        buffer,
        samples.transpose(2, 0, 1),
        photometric="rgb",
        planarconfig="separate",
        byteorder=order,
        compression=compression,
    )
    np.testing.assert_array_equal(kept(buffer.getvalue())[1], COLOURS)


def test_a_transparent_colour_of_a_palette() -> None:
    palette = Image.fromarray(np.array([[0, 1, 2, 1]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image, picture, alpha = kept(encoded(palette, "GIF", transparency=1))
    assert alpha is not None
    assert alpha.tolist() == [[255, 0, 255, 0]]
    assert picture.tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255], [255, 255, 255]]]
    assert image.getpixel((1, 0)) == (0, 255, 0, 0)


def test_padding_of_a_bmp_is_no_opacity() -> None:
    """A browser shows the colours where no pixel has any opacity."""
    masks = struct.pack("<4I", 0xFF << 16, 0xFF << 8, 0xFF, 0xFF << 24)
    header = struct.pack("<IiiHHIIiiII", 108, 16, -12, 1, 32, 3, 0, 0, 0, 0, 0) + masks + bytes(52)
    padded = np.dstack([COLOURS[..., ::-1], np.zeros_like(OPACITY)]).tobytes()
    start = 14 + len(header)
    data = struct.pack("<2sIHHI", b"BM", start + len(padded), 0, 0, start) + header + padded
    with Image.open(io.BytesIO(data)) as opened:
        assert opened.mode == "RGBA"
    _, picture, alpha = kept(data)
    assert alpha is None
    np.testing.assert_array_equal(picture, COLOURS)


def test_the_opacity_of_a_jpeg_is_told_without_decoding_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.fromarray(COLOURS), "JPEG")

    def load(image: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    assert alpha_of(data) is None
