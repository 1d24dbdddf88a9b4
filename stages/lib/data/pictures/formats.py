"""Which image files are read, and the error for those that are not."""

from __future__ import annotations

# Pillow also opens PostScript, by running an interpreter on it; only plain raster formats are read.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "HEIF", "GIF", "TIFF", "BMP", "PPM", "TGA", "JPEG2000")
SUFFIXES = frozenset(
    [
        ".png",
        ".jpg",
        ".jpeg",
        ".jfif",
        ".jpe",
        ".mpo",
        ".webp",
        ".avif",
        ".heic",
        ".heif",
        ".hif",
        ".gif",
        ".tif",
        ".tiff",
        ".bmp",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".tga",
        ".jp2",
        ".j2k",
        ".jpx",
    ]
)


class UnusableImageError(Exception):
    """The image cannot be used; the message is the reason given in rejected.jsonl."""
