"""Good image files that look odd: another suffix, turned, transparent, 16 bits, several frames, unusual containers.

What they have to show is computed here by hand, from the picture that they were made of.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

import numpy as np
from PIL import Image, PngImagePlugin

from tests.bad_inputs.cases import REJECTED, TAKEN, Case, Row, encoded, picture
from tests.bad_inputs.damaged_images import SHOWN, case, chunk, png_chunks, png_of, tags_of, tiff, whole

_ORIENTATION = 0x0112
# EXIF 2.3, 4.6.4.A: where row 0 and column 0 of what is stored lie in what is seen.
_TURNED = {
    2: lambda seen: seen[:, ::-1],
    3: lambda seen: seen[::-1, ::-1],
    4: lambda seen: seen[::-1],
    5: lambda seen: seen.transpose(1, 0, 2),
    6: lambda seen: np.rot90(seen, 1),
    7: lambda seen: np.rot90(seen, 2).transpose(1, 0, 2),
    8: lambda seen: np.rot90(seen, -1),
}


def cases() -> Iterator[Case]:
    yield from _other_suffixes()
    yield from _turned()
    yield from _modes()
    yield from _frames()
    yield from _odd_metadata()


def _taken(
    name: str, file: str, content: bytes, shown: Image.Image, tolerance: float = 0.0, *may: str
) -> Case:
    return case(name, file, content, *(may or (TAKEN,)), row=Row((), shown, tolerance))


def _other_suffixes() -> Iterator[Case]:
    for kind, suffix, tolerance in (
        ("jpg", "png", 6.0),
        ("png", "jpg", 0.0),
        ("webp", "png", 0.0),
        ("bmp", "jpg", 0.0),
        ("gif", "png", 24.0),
        ("tif", "jpg", 0.0),
        ("ppm", "bmp", 0.0),
        ("jp2", "jpg", 0.0),
        ("avif", "jpg", 14.0),
    ):
        yield _taken(f"{kind} called .{suffix}", f"odd.{suffix}", whole(kind), SHOWN, tolerance)
    yield _taken("suffix in capitals", "odd.JPEG", whole("jpg"), SHOWN, 6.0)


def _turned() -> Iterator[Case]:
    """What was stored turned is to be seen upright: the stored pixels are made from what is seen."""
    for orientation, store in _TURNED.items():
        seen = np.asarray(SHOWN)
        stored = Image.fromarray(np.ascontiguousarray(store(seen)))
        exif = Image.Exif()
        exif[_ORIENTATION] = orientation
        yield _taken(f"png, orientation {orientation}", "odd.png", encoded(stored, "PNG", exif=exif), SHOWN)
    exif = Image.Exif()
    exif[_ORIENTATION] = 9
    yield _taken("png, orientation 9", "odd.png", encoded(SHOWN, "PNG", exif=exif), SHOWN)


def _modes() -> Iterator[Case]:
    grey = np.asarray(SHOWN)[..., 0]
    as_rgb = Image.fromarray(np.repeat(grey[..., None], 3, axis=-1))
    yield _taken("png, grey", "odd.png", encoded(Image.fromarray(grey)), as_rgb)
    wide = Image.fromarray(grey.astype(np.uint16) * 257)
    yield _taken("png, 16 bits grey", "odd.png", encoded(wide), as_rgb)
    yield _taken("tif, 16 bits grey", "odd.tif", encoded(wide, "TIFF"), as_rgb)
    black = Image.fromarray((grey > 100).astype(np.uint8) * 255)
    yield _taken("png, one bit", "odd.png", encoded(black.convert("1")), black.convert("RGB"))
    yield _taken(
        "tif, one bit",
        "odd.tif",
        encoded(black.convert("1"), "TIFF", compression="group4"),
        black.convert("RGB"),
    )
    alpha = np.where(np.arange(SHOWN.width) < 20, 0, 255).astype(np.uint8)[None].repeat(SHOWN.height, 0)
    white = Image.fromarray(np.where(alpha[..., None] == 0, 255, np.asarray(SHOWN)).astype(np.uint8))
    clear = Image.fromarray(np.concatenate([np.asarray(SHOWN), alpha[..., None]], axis=-1))
    for suffix, options in (
        ("png", {}),
        ("webp", {"lossless": True, "exact": True}),
        ("tif", {}),
        ("tga", {}),
    ):
        kind = {"tif": "TIFF"}.get(suffix, suffix.upper())
        yield _taken(
            f"{suffix}, transparent over white", f"odd.{suffix}", encoded(clear, kind, **options), white
        )
    indexed = picture(2, (16, 12)).quantize(16)
    shown = indexed.convert("RGB")
    yield _taken("png, palette", "odd.png", encoded(indexed), shown)
    numbers, hole = np.asarray(indexed), int(np.asarray(indexed)[0, 0])
    seen = np.where((numbers == hole)[..., None], 255, np.asarray(shown)).astype(np.uint8)
    yield _taken(
        "png, palette, one colour transparent",
        "odd.png",
        encoded(indexed, transparency=hole),
        Image.fromarray(seen),
    )
    ink = SHOWN.convert("CMYK")
    yield _taken("tif, CMYK", "odd.tif", encoded(ink, "TIFF"), SHOWN, 3.0)
    yield _taken("jpg, CMYK", "odd.jpg", encoded(ink, "JPEG", quality=95), SHOWN, 8.0)


def _frames() -> Iterator[Case]:
    others = [picture(number, SHOWN.size) for number in (3, 4)]
    for suffix, options in (("gif", {}), ("webp", {"lossless": True}), ("png", {}), ("tif", {})):
        kind = {"tif": "TIFF"}.get(suffix, suffix.upper())
        content = encoded(SHOWN, kind, save_all=True, append_images=others, **options)
        yield _taken(
            f"{suffix}, three frames", f"odd.{suffix}", content, SHOWN, 24.0 if suffix == "gif" else 0.0
        )
    content = encoded(SHOWN, "MPO", save_all=True, append_images=others, quality=95)
    yield _taken("jpg of a stereo camera", "odd.jpg", content, SHOWN, 14.0)


def _odd_metadata() -> Iterator[Case]:
    either = (TAKEN, REJECTED)
    yield _taken(
        "png, no profile of colours",
        "odd.png",
        encoded(SHOWN, icc_profile=b"no profile"),
        SHOWN,
        0.0,
        *either,
    )
    yield _taken(
        "png, EXIF that is none", "odd.png", encoded(SHOWN, exif=b"Exif\0\0no tiff here"), SHOWN, 0.0, *either
    )
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x02" + b"\x01\x12\0\3\0\0\0\1\0\1\0\0" + b"\xff" * 12
    yield _taken(
        "jpg, EXIF cut", "odd.jpg", encoded(SHOWN, "JPEG", quality=95, exif=exif), SHOWN, 14.0, *either
    )
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "\x1b[31mred\x07")
    yield _taken("png, a comment that steers terminals", "odd.png", encoded(SHOWN, pnginfo=info), SHOWN)
    head, *rest = png_chunks(whole("png"))
    pixels = b"".join(data for kind, data in rest if kind == b"IDAT")
    many = [(b"IDAT", pixels[at : at + 1]) for at in range(len(pixels))]
    yield _taken("png, a chunk for each byte", "odd.png", png_of([head, *many, (b"IEND", b"")]), SHOWN)
    unknown = whole("png")[:33] + chunk(b"zzZz", b"private") + whole("png")[33:]
    yield _taken("png, a chunk of nobody", "odd.png", unknown, SHOWN)
    yield _taken(
        "tif, tags of nobody", "odd.tif", tiff({**tags_of(SHOWN), 65000: (4, [7])}, SHOWN.tobytes()), SHOWN
    )
    flipped = np.ascontiguousarray(np.asarray(SHOWN)[::-1])
    bmp = bytearray(encoded(Image.fromarray(flipped), "BMP"))
    bmp[22:26] = (-SHOWN.height).to_bytes(4, "little", signed=True)
    yield _taken("bmp from top to bottom", "odd.bmp", bytes(bmp), SHOWN)
    yield _taken(
        "ppm with comments", "odd.ppm", b"P6\n# by hand\n64 48\n# more\n255\n" + SHOWN.tobytes(), SHOWN
    )
    plain = b"P3\n64 48\n255\n" + b" ".join(str(value).encode() for value in SHOWN.tobytes())
    yield _taken("ppm in letters", "odd.ppm", plain, SHOWN)
    buffer = io.BytesIO()
    SHOWN.save(buffer, "TGA", compression="tga_rle")
    yield _taken("tga, run lengths", "odd.tga", buffer.getvalue(), SHOWN)
    yield _taken("one pixel", "odd.png", encoded(picture(1, (1, 1))), picture(1, (1, 1)))
    yield _taken("one row", "odd.png", encoded(picture(1, (500, 1))), picture(1, (500, 1)))
