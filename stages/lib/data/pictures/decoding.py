"""From an image file to the pixels that a viewer shows: upright, sRGB, 8 bits, transparency over white."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageChops, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from stages.lib.data.pictures import colour_spaces, png_chunks
from stages.lib.data.pictures.colour import to_srgb
from stages.lib.data.pictures.formats import FORMATS, UnusableImageError
from stages.lib.data.pictures.tiff_remarks import remarks_raised
from stages.lib.data.pictures.tiff_tags import Samples, check_tiff

Image.init()  # loads every format now: left to the first images, it races between threads
# How large an image may be is said by the caller. Text and profiles are as large as files have them.
Image.MAX_IMAGE_PIXELS = None
PngImagePlugin.MAX_TEXT_CHUNK, PngImagePlugin.MAX_TEXT_MEMORY = 2**26, 2**28
TiffImagePlugin.READ_LIBTIFF = True  # of 16 bits in separate planes Pillow's own reader makes noise
# What Pillow remarks on a file it can read does not say which; what it cannot read, it raises.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)

HEIC_PACKAGE = "pip install -e '.[heic]'"
_TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = range(5, 9)
_16_BITS = Samples(0xFFFF, white_is_zero=False)
_BAND_PIXELS = 2**20
_LARGE_PIXELS = 2**24
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
_one_large_image = threading.Lock()  # at a time in a process: each takes 4 to 8 bytes a pixel


def decoded(data: bytes, draft: tuple[int, int] | None = None) -> Image.Image:
    """The picture in an image file.

    Args:
        data: the file.
        draft: width and height that the picture will be reduced to: of a JPEG, the decoder may then leave out
            what is smaller, which is several times faster and slightly different.

    Returns:
        RGB, the first frame.

    Raises:
        UnusableImageError: what cannot be decoded, and pixel values without a defined range.
    """
    with opened(data) as image:
        return picture_of(image, data, draft).over_white()


@contextlib.contextmanager
def opened(data: bytes) -> Iterator[Image.Image]:
    """An image file whose header is read; every failure within the block is an UnusableImageError."""
    try:
        _register_heif(data)
        with remarks_raised(), Image.open(io.BytesIO(data), formats=_formats()) as image:
            if image.format == "TIFF":  # which Pillow turns when it is decoded, by what XMP says too
                image.info.pop("xmp", None)
            yield image
    except UnidentifiedImageError as error:
        raise UnusableImageError(_why_unidentified(data)) from error
    except (UnusableImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise everything from SyntaxError to struct.error on damaged files
        raise UnusableImageError(f"broken image: {_reason(error)}") from error


def _why_unidentified(data: bytes) -> str:
    """Pillow's reason where the first bytes are those of a known format."""
    for name in _formats():
        factory, accept = Image.OPEN[name]
        if accept is not None and accept(data[:16]) is True:
            try:
                factory(io.BytesIO(data), "")
            except Exception as error:
                return f"broken image, or a kind of {name} that is not read: {_reason(error)}"
    return f"not an image in a known format ({', '.join(FORMATS)})"


def _reason(error: Exception) -> str:
    return _ADDRESS.sub("", str(error)) or type(error).__name__


class Picture(NamedTuple):
    """An upright picture.

    Attributes:
        colours: RGB, sRGB, what is transparent in the colours that the file has there.
        alpha: opacity, L; None where all is opaque.
        is_converted: whether the colours were converted to sRGB.
    """

    colours: Image.Image
    alpha: Image.Image | None
    is_converted: bool

    def over_white(self) -> Image.Image:
        """RGB, as on a white page."""
        if self.alpha is None:
            return self.colours
        picture = self.colours.copy()
        picture.putalpha(self.alpha)
        return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def picture_of(image: Image.Image, data: bytes, draft: tuple[int, int] | None = None) -> Picture:
    """The picture in a file that is `opened`; ``draft`` as of `decoded`."""
    width, height = image.size
    with _one_large_image if width * height > _LARGE_PIXELS else contextlib.nullcontext():
        if draft is not None and image.format in ("JPEG", "MPO"):
            image.draft(image.mode, draft[::-1] if orientation(image) in _ON_ITS_SIDE else draft)
        samples = check_tiff(image, data) if image.format == "TIFF" else _16_BITS
        profile = profile_of(image)
        if image.format in ("AVIF", "HEIF") and not profile:
            profile = _profile_of_box(data)
        image.load()
        if image.format == "PNG":
            png_chunks.check_pixels(data)
            if profile is None or png_chunks.has_cicp(data):
                space = png_chunks.colour_space(data)
                profile = colour_spaces.profile_of(space) if space else None
        turned = _TURNED.get(orientation(image))
        colours, alpha = _colours_and_alpha(image, data, samples)
        picture, is_converted = to_srgb(colours, profile)
        if picture.mode != "RGB":
            picture = picture.convert("RGB")
        if turned is not None:
            picture, alpha = picture.transpose(turned), alpha and alpha.transpose(turned)
        return Picture(picture, alpha, is_converted)


def profile_of(image: Image.Image) -> bytes | None:
    """The colour profile that an image file carries."""
    return image.info.get("icc_profile")


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 is upright. A HEIC is turned by its decoder, a TIFF by Pillow.

    Viewers turn nothing for what XMP, or a text of a PNG, says of it, as `Image.getexif` would, nor for EXIF
    that cannot be read.
    """
    if image.format == "TIFF":
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    else:
        exif = Image.Exif()
        try:
            exif.load(image.info.get("exif") or b"")
            value = exif.get(ExifTags.Base.Orientation, 1)
        except Exception:  # as of `opened`: everything from SyntaxError to struct.error
            return 1
    return value if value in _TURNED else 1


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of the picture, in pixels."""
    return image.size[::-1] if orientation(image) in _ON_ITS_SIDE else image.size


def alpha_of(data: bytes) -> Image.Image | None:
    """The opacity of each pixel of the picture, L, upright; None where all are opaque."""
    with opened(data) as image:
        if not image.has_transparency_data:  # as the header says: a JPEG need not be decoded
            return None
        samples = check_tiff(image, data) if image.format == "TIFF" else _16_BITS
        image.load()
        turned = _TURNED.get(orientation(image))
        _, alpha = _colours_and_alpha(image, data, samples)
        return alpha if alpha is None or turned is None else alpha.transpose(turned)


def _colours_and_alpha(
    image: Image.Image, data: bytes, samples: Samples
) -> tuple[Image.Image, Image.Image | None]:
    """The colours as RGB, L, CMYK or LAB, and the opacity as L, None where all is opaque."""
    alpha, is_bmp = None, image.format == "BMP"
    if image.format == "PNG" and (colour := png_chunks.transparent_colour(data)) is not None:
        depth = png_chunks.header(data).bit_depth
        alpha = ImageChops.invert(_equal_to(image, data, colour, depth))
        image.info.pop("transparency", None)
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode == "F":
        raise UnusableImageError("floating-point pixel values have no defined range")
    if image.mode.startswith("I"):
        image = _in_8_bits(image, samples)
    elif image.has_transparency_data:
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        image = image.convert("RGBA")
        alpha = image.getchannel("A")
        if is_bmp and alpha.getextrema() == (0, 0):  # padding, as browsers take it
            alpha = None
    if image.mode not in ("RGB", "L", "CMYK", "LAB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    return image, None if alpha is None or alpha.getextrema() == (255, 255) else alpha


def _equal_to(image: Image.Image, data: bytes, colour: tuple[int, ...], depth: int) -> Image.Image:
    """L, 255 where a PNG's pixels have this colour, all its bits compared."""
    if image.mode.startswith("I"):
        return _each_band(image, lambda band: np.where(band == colour[0], 255, 0))
    if depth == 16:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as again:
            tile = again.tile[0]
            again.tile = [
                tile._replace(args="RGB;16L")
            ]  # the lower byte of each sample, in place of the upper
            again.load()
            lower = _all_equal(again, [value & 0xFF for value in colour])
        return ImageChops.darker(lower, _all_equal(image, [value >> 8 for value in colour]))
    grey_or_rgb = image.convert("L") if image.mode == "1" else image
    return _all_equal(grey_or_rgb, [value * 255 // (2**depth - 1) for value in colour])


def _all_equal(image: Image.Image, colour: list[int]) -> Image.Image:
    masks = [
        channel.point([255 * (level == value) for level in range(256)])
        for channel, value in zip(image.split(), colour, strict=True)
    ]
    return functools.reduce(ImageChops.darker, masks)


def _in_8_bits(image: Image.Image, samples: Samples) -> Image.Image:
    def scaled(band: np.ndarray) -> np.ndarray:
        values = band.astype(np.int64)
        if values.min() < 0 or values.max() > samples.maximum:
            raise UnusableImageError(
                f"pixel values from {values.min()} to {values.max()} are not "
                f"{samples.maximum.bit_length()}-bit"
            )
        if samples.white_is_zero:
            values = samples.maximum - values
        return (values * 255 + samples.maximum // 2) // samples.maximum

    return _each_band(image, scaled)


def _each_band(image: Image.Image, function: object) -> Image.Image:
    """L, from a function of a few rows of pixels at a time."""
    width, height = image.size
    found = Image.new("L", image.size)
    rows = max(1, _BAND_PIXELS // width)
    for top in range(0, height, rows):
        band = np.asarray(image.crop((0, top, width, min(height, top + rows))))
        found.paste(Image.fromarray(function(band).astype(np.uint8)), (0, top))  # type: ignore[operator]
    return found


def _profile_of_box(data: bytes) -> bytes | None:
    """A profile for the colours of an AVIF or HEIC, of its first ``colr`` box with numbers of H.273.

    Transfers of video stand for sRGB, as browsers take them.
    """
    at = data.find(b"colrnclx", 0, 2**16)
    if at < 0:
        return None
    primaries, transfer = (int.from_bytes(data[start : start + 2]) for start in (at + 8, at + 10))
    space = colour_spaces.of_code_points(primaries, 13 if transfer in (1, 6, 14, 15) else transfer)
    return colour_spaces.profile_of(space) if space else None


def _is_heif(data: bytes) -> bool:
    return data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS and b"avif" not in data[8:64]


def _register_heif(data: bytes) -> None:
    if not _is_heif(data) or "HEIF" in Image.OPEN:
        return
    try:
        import pillow_heif
    except ImportError as error:
        raise UnusableImageError(f"HEIC is read by a package of its own; run `{HEIC_PACKAGE}`") from error
    pillow_heif.register_heif_opener()


def _formats() -> list[str]:
    return [name for name in FORMATS if name in Image.OPEN]
