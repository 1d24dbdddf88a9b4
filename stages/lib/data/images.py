"""From the bytes of any image file to the upright 8-bit RGB image that is stored."""

from __future__ import annotations

import io
import zlib

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from stages.lib.data.image_shards import StoredImage

Image.init()  # loads every format now: left to the first images, it races between threads


# Pillow also opens PostScript, by running an interpreter on it; only plain raster formats are read.
FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "TIFF", "BMP", "PPM", "TGA", "JPEG2000")
SUFFIXES = frozenset(
    [
        ".png",
        ".jpg",
        ".jpeg",
        ".jfif",
        ".webp",
        ".avif",
        ".gif",
        ".tif",
        ".tiff",
        ".bmp",
        ".ppm",
        ".pgm",
        ".pnm",
        ".tga",
        ".jp2",
    ]
)
_UPRIGHT = 1
_PNG_SIGNATURE_BYTES = 8
_PNG_BIT_DEPTH = 24  # offset of the byte in the header chunk, which comes first


class UnusableImageError(Exception):
    """The image cannot be stored; the message is the reason given in rejected.jsonl."""


def stored_image(data: bytes) -> StoredImage:
    """The image of a file as it is stored: upright, RGB, 8 bits, one frame.

    Bytes that are such a JPEG, PNG or WebP already are kept unchanged, all others become a PNG.
    The whole image is decoded, so that a truncated file is found here.

    Raises:
        UnusableImageError: what Pillow cannot decode, and pixel values without a defined range.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            kept = _is_plain(image, data)
            image.load()
            if image.format == "PNG":
                _check_pixels_of_png(data)
            if kept:
                return StoredImage(data, *image.size)
            return png(upright_rgb(image))
    except UnidentifiedImageError as error:
        raise UnusableImageError(f"not an image in a known format ({', '.join(FORMATS)})") from error
    except (UnusableImageError, MemoryError):
        raise
    except Exception as error:  # decoders raise everything from SyntaxError to struct.error on damaged files
        raise UnusableImageError(f"broken image: {error}") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """First frame, turned as EXIF says, 16 bits scaled to 8, transparency over white, as RGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise UnusableImageError("floating-point pixel values have no defined range")
    if image.mode.startswith("I"):
        image = _scaled_to_8_bits(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def png(image: Image.Image) -> StoredImage:
    """An RGB image as PNG without metadata: the same bytes for the same pixels."""
    bare = Image.frombytes("RGB", image.size, image.tobytes())
    buffer = io.BytesIO()
    bare.save(buffer, "PNG")
    return StoredImage(buffer.getvalue(), *image.size)


def _check_pixels_of_png(data: bytes) -> None:
    """Raise UnusableImageError if a chunk of pixels is damaged: Pillow passes over their CRCs."""
    position = _PNG_SIGNATURE_BYTES
    while position + 12 <= len(data):
        end = position + 8 + int.from_bytes(data[position : position + 4])
        kind = data[position + 4 : position + 8]
        if kind == b"IDAT" and zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4]):
            raise UnusableImageError("broken image: a checksum of its pixels fails")
        if kind == b"IEND":
            return
        position = end + 4


def _is_plain(image: Image.Image, data: bytes) -> bool:
    return (
        image.format in ("JPEG", "PNG", "WEBP")
        and image.mode == "RGB"
        and not image.has_transparency_data
        and not (image.format == "PNG" and data[_PNG_BIT_DEPTH] != 8)
        and getattr(image, "n_frames", 1) == 1
        and image.getexif().get(ExifTags.Base.Orientation, _UPRIGHT) not in range(2, 9)
    )


def _scaled_to_8_bits(image: Image.Image) -> Image.Image:
    values = np.asarray(image).astype(np.int64)  # (h, w)
    if values.min() < 0 or values.max() > 0xFFFF:
        raise UnusableImageError(f"pixel values from {values.min()} to {values.max()} are not 16-bit")
    eight_bits = (values + 128) // 257
    if "transparency" in image.info:
        eight_bits[values == image.info["transparency"]] = 255
    return Image.fromarray(eight_bits.astype(np.uint8))
