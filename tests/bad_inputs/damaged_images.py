"""Image files that are damaged, cut, or no images at all, each beside three good ones."""

from __future__ import annotations

import functools
import gzip
import io
import random
import struct
import zlib
from collections.abc import Iterator

from PIL import Image

from tests.bad_inputs.cases import (
    GOOD,
    GOOD_FILES,
    REJECTED,
    TAKEN,
    Case,
    Row,
    encoded,
    flipped,
    folder,
    picture,
    put,
)

KIND = "images"
SHOWN = picture(9, (64, 48))
FORMATS = {
    "png": ("PNG", {}),
    "jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    "webp": ("WEBP", {"lossless": True}),
    "gif": ("GIF", {}),
    "tif": ("TIFF", {"compression": "tiff_lzw"}),
    "bmp": ("BMP", {}),
    "ppm": ("PPM", {}),
    "tga": ("TGA", {}),
    "jp2": ("JPEG2000", {"irreversible": False}),
    "avif": ("AVIF", {"quality": 90}),
}
_LOSSY = {"jpg": 6.0, "avif": 12.0, "gif": 24.0}
_CAPTION = "what should be rejected"


def case(
    name: str, file: str, content: bytes, *may: str, row: Row | None = None, says: tuple[str, ...] = ()
) -> Case:
    """An image file among good ones; ``row`` is what it holds, if it may be taken."""
    stem = file.rsplit(".", 1)[0]
    files = {**GOOD_FILES, file: content, f"{stem}.txt": _CAPTION.encode()}
    may = may or (REJECTED,)
    bad = {file: Row((_CAPTION,), *(row or Row(()))[1:])} if TAKEN in may else {}
    odd = (file if file.rsplit(".", 1)[1] not in _UNKNOWN else f"{stem}.txt",) if REJECTED in may else ()
    return Case(KIND, name, folder(files), may, GOOD, bad, odd, says)


_UNKNOWN = (
    "svg",
    "pdf",
    "psd",
    "ico",
    "mp4",
    "hdr",
    "exr",
    "dng",
    "nef",
    "cr2",
)  # suffixes that are not read


@functools.cache
def whole(suffix: str) -> bytes:
    """`SHOWN` in a format."""
    kind, options = FORMATS[suffix]
    return encoded(SHOWN, kind, **options)


def cases() -> Iterator[Case]:
    yield from _cut()
    yield from _flipped()
    yield from _pngs()
    yield from _jpegs()
    yield from _no_images()
    yield from _sizes()
    yield from _ranges()
    yield from _tiffs()


def _cut() -> Iterator[Case]:
    for suffix in FORMATS:
        content = whole(suffix)
        yield case(f"{suffix}, cut at half", f"bad.{suffix}", content[: len(content) // 2])
        yield case(f"{suffix}, cut in its header", f"bad.{suffix}", content[:10])
        yield case(f"{suffix}, no byte", f"bad.{suffix}", b"")
    for suffix, count in (
        ("png", 12),
        ("jpg", 2),
        ("gif", 1),
        ("webp", 1),
        ("tif", 1),
        ("bmp", 1),
        ("ppm", 1),
        ("tga", 1),
    ):
        row = Row((), SHOWN, _LOSSY.get(suffix, 0.0))
        yield case(
            f"{suffix}, last {count} bytes cut",
            f"bad.{suffix}",
            whole(suffix)[:-count],
            REJECTED,
            TAKEN,
            row=row,
        )
    for suffix in ("png", "jpg", "gif", "webp"):
        row = Row((), SHOWN, _LOSSY.get(suffix, 0.0))
        yield case(
            f"{suffix}, text behind",
            f"bad.{suffix}",
            whole(suffix) + b"garbage" * 20,
            REJECTED,
            TAKEN,
            row=row,
        )
        yield case(f"{suffix}, text in front", f"bad.{suffix}", b"garbage" + whole(suffix))


def _flipped() -> Iterator[Case]:
    """A bit of the first bytes, which say what it is; the rest has no checksum in most formats."""
    for suffix in ("png", "jpg", "webp", "gif", "bmp", "jp2", "avif"):
        place = {"webp": 8, "jp2": 5, "avif": 5}.get(suffix, 0)
        yield case(f"{suffix}, magic flipped", f"bad.{suffix}", flipped(whole(suffix), place, 2))
    for suffix in ("webp", "avif", "jp2"):
        content = whole(suffix)
        noise = random.Random(suffix).randbytes(len(content) // 2)
        yield case(
            f"{suffix}, second half is noise",
            f"bad.{suffix}",
            content[: -len(noise)] + noise,
            REJECTED,
            TAKEN,
        )


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_chunks(content: bytes) -> list[tuple[bytes, bytes]]:
    """(kind, data) of each chunk."""
    found, place = [], 8
    while place < len(content):
        (size,) = struct.unpack(">I", content[place : place + 4])
        found.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + size]))
        place += size + 12
    return found


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)


def _pngs() -> Iterator[Case]:
    content, chunks = whole("png"), png_chunks(whole("png"))
    head, pixels, end = chunks[0], b"".join(data for kind, data in chunks if kind == b"IDAT"), (b"IEND", b"")
    start = content.index(b"IDAT")
    known = Row((), SHOWN)
    for name, place in (
        ("first byte", start + 5),
        ("half", start + len(pixels) // 2),
        ("end", start + len(pixels)),
        ("CRC", start + 5 + len(pixels)),
    ):
        yield case(f"png, bit of its pixels flipped, {name}", "bad.png", flipped(content, place, 4))
    for name, place in (("width", 19), ("depth", 24), ("CRC", 31)):
        yield case(f"png, bit of its header flipped, {name}", "bad.png", flipped(content, place, 1))
    yield case("png, kind of its pixels flipped", "bad.png", flipped(content, start, 1))
    yield case("png, length of its pixels flipped", "bad.png", flipped(content, start - 3, 1))
    yield case("png, length of its pixels 4 GiB", "bad.png", put(content, start - 4, ">I", 2**32 - 1))
    for name, data in (
        ("no pixels", None),
        ("pixels of no length", b""),
        ("half the pixels, right CRC", pixels[: len(pixels) // 2]),
        ("a flipped bit, right CRC", flipped(pixels, len(pixels) // 2)),
        ("too few rows, right CRC", zlib.compress(bytes((64 * 3 + 1) * 40))),
        ("wrong sum of its stream, right CRC", flipped(pixels, -1)),
        ("pixels that are not deflated", b"no stream of zlib"),
        ("an unknown filter", zlib.compress(b"\x09" + bytes((64 * 3 + 1) * 48 - 1))),
    ):
        parts = [head, *([(b"IDAT", data)] if data is not None else []), end]
        yield case(f"png, {name}", "bad.png", png_of(parts))
    yield case("png, no header", "bad.png", png_of([(b"IDAT", pixels), end]))
    yield case("png, its end first", "bad.png", png_of([head, end, (b"IDAT", pixels)]))
    yield case(
        "png, a depth that is none",
        "bad.png",
        png_of([(b"IHDR", put(head[1], 8, "B", 5)), (b"IDAT", pixels), end]),
    )
    yield case(
        "png, palette that is not there",
        "bad.png",
        png_of([(b"IHDR", put(head[1], 9, "B", 3)), (b"IDAT", pixels), end]),
    )
    apple = png_of([(b"CgBI", b"\x50\0\x20\6"), head, (b"IDAT", pixels[2:-4]), end])
    yield case("png as iPhones keep it", "bad.png", apple)
    text = chunk(b"tEXt", b"Comment\0hello")
    yield case(
        "png, checksum of a comment flipped",
        "bad.png",
        content[:33] + flipped(text, -1) + content[33:],
        REJECTED,
        TAKEN,
        row=known,
    )
    bomb = (b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80 * 2**20)))
    yield case(
        "png, 80 MB of zeros in a comment",
        "bad.png",
        png_of([head, bomb, (b"IDAT", pixels), end]),
        REJECTED,
        TAKEN,
        row=known,
    )
    interlaced = png_of([(b"IHDR", put(head[1], 12, "B", 1)), (b"IDAT", pixels), end])
    yield case("png, says that it is interlaced", "bad.png", interlaced, REJECTED, TAKEN)


def _jpegs() -> Iterator[Case]:
    content = whole("jpg")
    scan = content.index(b"\xff\xda")
    start = scan + 14  # behind the header of a scan of three components
    half = start + (len(content) - start) // 2
    yield case("jpg, half of its scan and an end", "bad.jpg", content[:half] + b"\xff\xd9")
    yield case(
        "jpg, a tenth of its scan and an end",
        "bad.jpg",
        content[: start + (len(content) - start) // 10] + b"\xff\xd9",
    )
    yield case(
        "jpg, half of its scan and zeros",
        "bad.jpg",
        content[:half] + bytes(len(content) - half - 2) + b"\xff\xd9",
        REJECTED,
        TAKEN,
    )
    yield case("jpg, a part of its scan cut out", "bad.jpg", content[: half - 80] + content[half + 80 :])
    yield case("jpg, no scan", "bad.jpg", content[:scan] + b"\xff\xd9")
    yield case("jpg, beginning and end alone", "bad.jpg", b"\xff\xd8\xff\xd9")
    # Decoders take the standard ones, and these they were.
    yield case(
        "jpg, no tables of Huffman",
        "bad.jpg",
        _without(content, 0xC4),
        REJECTED,
        TAKEN,
        row=Row((), SHOWN, 14.0),
    )
    yield case("jpg, no tables of quantisation", "bad.jpg", _without(content, 0xDB))
    yield case("jpg, no frame", "bad.jpg", _without(content, 0xC0))
    for name, marker in (("lossless", 0xC3), ("differential", 0xC5), ("hierarchical", 0xC7)):
        yield case(
            f"jpg, says that it is {name}", "bad.jpg", content.replace(b"\xff\xc0", bytes((0xFF, marker)), 1)
        )
    frame = content.index(b"\xff\xc0")
    yield case("jpg, 12 bits", "bad.jpg", put(content, frame + 4, "B", 12))
    yield case("jpg, 3 bits", "bad.jpg", put(content, frame + 4, "B", 3))
    yield case("jpg, twice as high as its scan", "bad.jpg", put(content, frame + 5, ">H", 96))
    yield case("jpg, a table that it has not", "bad.jpg", put(content, frame + 12, "B", 3))
    progressive = encoded(SHOWN, "JPEG", progressive=True, quality=90)
    scans = [at for at in range(len(progressive)) if progressive[at : at + 2] == b"\xff\xda"]
    yield case("jpg, progressive, cut in its third scan", "bad.jpg", progressive[: scans[2] + 30])
    yield case(
        "jpg, progressive, three scans and an end",
        "bad.jpg",
        progressive[: scans[3]] + b"\xff\xd9",
        REJECTED,
        TAKEN,
    )
    restarts = encoded(SHOWN, "JPEG", quality=90, restart_marker_blocks=2)
    at = restarts.index(b"\xff\xd3")
    yield case(
        "jpg, a part between its restarts cut out",
        "bad.jpg",
        restarts[: restarts.index(b"\xff\xd1")] + restarts[at:],
    )
    yield case(
        "jpg, its preview alone",
        "bad.jpg",
        content[:2] + b"\xff\xe1" + struct.pack(">H", 2 + 6 + 40) + b"Exif\0\0" + bytes(40),
    )


def _without(content: bytes, marker: int) -> bytes:
    """A JPEG without the segments of a marker."""
    while (at := content.find(bytes((0xFF, marker)))) >= 0:
        (size,) = struct.unpack(">H", content[at + 2 : at + 4])
        content = content[:at] + content[at + 2 + size :]
    return content


def _no_images() -> Iterator[Case]:
    page = b"<!DOCTYPE html>\n<html><head><title>404 Not Found</title></head></html>\n"
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 12345\n"
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><rect width="8" height="8"/></svg>'
    pdf, ico = encoded(SHOWN, "PDF"), encoded(SHOWN, "ICO")
    psd = (
        b"8BPS\0\1"
        + bytes(6)
        + struct.pack(">HIIHH", 3, 8, 8, 8, 3)
        + bytes(12)
        + struct.pack(">H", 0)
        + bytes(192)
    )
    film = (
        struct.pack(">I4s4sI8s", 24, b"ftyp", b"isom", 512, b"isommp41")
        + struct.pack(">I4s", 16, b"mdat")
        + bytes(8)
    )
    heic = struct.pack(">I4s4sI8s", 24, b"ftyp", b"heic", 0, b"mif1heic") + bytes(64)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    for name, file, content in (
        ("text", "bad.png", b"no picture\n"),
        ("a page", "bad.jpg", page),
        ("JSON", "bad.webp", b'{"error": "access denied"}'),
        ("XML", "bad.jpg", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'),
        ("a pointer of Git LFS", "bad.png", pointer),
        ("gzip of a png", "bad.png", gzip.compress(whole("png"), mtime=0)),
        ("base64 of a png", "bad.png", b"iVBORw0KGgoAAAANSUhEUgAAAEAAAAAwCAIAAAAuKetI"),
        ("zeros", "bad.png", bytes(5000)),
        ("noise", "bad.jpg", random.Random(5).randbytes(5000)),
        ("an SVG", "bad.png", svg),
        ("an SVG by its name", "bad.svg", svg),
        ("a PDF", "bad.png", pdf),
        ("a PDF by its name", "bad.pdf", pdf),
        ("a PSD", "bad.png", psd),
        ("a PSD by its name", "bad.psd", psd),
        ("a film", "bad.gif", film),
        ("a film by its name", "bad.mp4", film),
        ("an ICO", "bad.png", ico),
        ("an ICO by its name", "bad.ico", ico),
        ("HEIC", "bad.jpg", heic),
        ("HEIC by its name", "bad.heic", heic),
        ("PostScript", "bad.png", postscript),
        ("a DDS", "bad.png", encoded(SHOWN.convert("RGBA"), "DDS")),
        ("an XBM", "bad.png", encoded(SHOWN.convert("1"), "XBM")),
    ):
        yield case(f"{name} ({file})", file, content)


def _sizes() -> Iterator[Case]:
    """Sizes that are none, and sizes that a few bytes cannot have."""
    head = png_chunks(whole("png"))[0][1]
    little = zlib.compress(bytes(100))
    for width, height in (
        (0, 48),
        (64, 0),
        (0, 0),
        (9000, 9000),
        (60_000, 60_000),
        (2**31 - 1, 2**31 - 1),
        (2**32 - 1, 1),
    ):
        changed = put(head, 0, ">II", width, height)
        content = png_of([(b"IHDR", changed), (b"IDAT", little), (b"IEND", b"")])
        yield case(f"png, {width} x {height}", "bad.png", content)
    frame = whole("jpg").index(b"\xff\xc0")
    for width, height in ((0, 48), (64, 0), (9000, 9000), (65_500, 65_500)):
        yield case(f"jpg, {width} x {height}", "bad.jpg", put(whole("jpg"), frame + 5, ">HH", height, width))
    for width, height in ((0, 0), (9000, 9000), (65_535, 65_535)):
        yield case(f"tga, {width} x {height}", "bad.tga", put(whole("tga"), 12, "<HH", width, height))
    for width, height in ((0, 48), (9000, 9000), (60_000, 60_000), (64, -(2**31))):
        yield case(f"bmp, {width} x {height}", "bad.bmp", put(whole("bmp"), 18, "<ii", width, height))
    for text in (b"P6 0 0 255\n", b"P6 -8 8 255\n", b"P6 100000 100000 255\n", b"P6 8 8 0\n", b"P6 8 8 70000\n", b"P6 8",
                 b"P3 2 2 255\n1 2 3 four"):  # fmt: skip
        yield case(f"ppm, {text.decode().strip()!r}", "bad.ppm", text + b"\x80" * 30)
    for width, height in ((0, 0), (65_535, 65_535)):
        yield case(f"gif, {width} x {height}", "bad.gif", _gif_of(width, height))


def _gif_of(width: int, height: int) -> bytes:
    content = put(whole("gif"), 6, "<HH", width, height)
    at = content.index(b"\x2c", 13 + 3 * 256)
    return put(content, at + 5, "<HH", width, height)


def _ranges() -> Iterator[Case]:
    """Pixels without a range of values."""
    single = Image.new("F", (8, 8), 0.5)
    yield case("tif, floats", "bad.tif", encoded(single, "TIFF"), says=("float", "floating"))
    yield case("tif, not a number", "bad.tif", encoded(Image.new("F", (8, 8), float("nan")), "TIFF"))
    yield case("tif, 32-bit numbers", "bad.tif", encoded(Image.new("I", (8, 8), 2**30), "TIFF"))
    yield case("pfm called .ppm", "bad.ppm", b"Pf\n8 8\n-1.0\n" + struct.pack("<64f", *([0.5] * 64)))
    hdr = b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 8 +X 8\n" + bytes(256)
    yield case("Radiance called .png", "bad.png", hdr)
    yield case("Radiance by its name", "bad.hdr", hdr)
    yield case("OpenEXR called .png", "bad.png", b"v/1\x01\x02\0\0\0" + bytes(300))
    yield case("OpenEXR by its name", "bad.exr", b"v/1\x01\x02\0\0\0" + bytes(300))


def tiff(tags: dict[int, tuple[int, list[int]]], pixels: bytes, following: int = 0) -> bytes:
    """A little-endian TIFF of one strip: tag -> (type 3 or 4, values); the strip's offset is filled in."""
    entries, extra = b"", b""
    behind = 8 + 2 + 12 * len(tags) + 4
    for tag, (kind, values) in sorted(tags.items()):
        data = struct.pack(f"<{len(values)}{'H' if kind == 3 else 'B' if kind == 1 else 'I'}", *values)
        if len(data) > 4:
            entries += struct.pack("<HHII", tag, kind, len(values), behind + len(extra))
            extra += data
        else:
            entries += struct.pack("<HHI4s", tag, kind, len(values), data.ljust(4, b"\0"))
    start = behind + len(extra)
    entries = entries.replace(struct.pack("<HHII", 273, 4, 1, 0xFFFF), struct.pack("<HHII", 273, 4, 1, start))
    return (
        b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", following) + extra + pixels
    )


def tags_of(image: Image.Image, **more: int) -> dict[int, tuple[int, list[int]]]:
    width, height = image.size
    return {256: (4, [width]), 257: (4, [height]), 258: (3, [8, 8, 8]), 259: (3, [1]), 262: (3, [2]), 273: (4, [0xFFFF]),
            277: (3, [3]), 278: (4, [height]), 279: (4, [width * height * 3])}  # fmt: skip


def _tiffs() -> Iterator[Case]:
    pixels, tags = SHOWN.tobytes(), tags_of(SHOWN)
    preview = "preview", "reduced", "thumbnail", "raw"
    yield case("tif, a preview", "bad.tif", tiff({**tags, 254: (4, [1])}, pixels), says=preview)
    yield case(
        "tif, a preview of a raw file",
        "bad.tif",
        tiff({**tags, 254: (4, [1]), 50706: (1, [1, 4, 0, 0])}, pixels),
        says=preview,
    )
    yield case("DNG called .tif", "bad.tif", tiff({**tags, 50706: (1, [1, 4, 0, 0])}, pixels), says=preview)
    yield case(
        "DNG called .jpg",
        "bad.jpg",
        tiff({**tags, 254: (4, [1]), 50706: (1, [1, 4, 0, 0])}, pixels),
        says=preview,
    )
    for suffix in ("dng", "nef", "cr2"):
        yield case(f"raw file by its name, .{suffix}", f"bad.{suffix}", tiff({**tags, 254: (4, [1])}, pixels))
    row = Row((), SHOWN)
    yield case(
        "tif, its list of pages is a loop",
        "bad.tif",
        tiff(tags, pixels, following=8),
        REJECTED,
        TAKEN,
        row=row,
    )
    yield case(
        "tif, its second page is behind the end",
        "bad.tif",
        tiff(tags, pixels, following=10**6),
        REJECTED,
        TAKEN,
        row=row,
    )
    yield case("tif, its strip is behind the end", "bad.tif", tiff({**tags, 273: (4, [10**8])}, pixels))
    yield case(
        "tif, a strip of 4 GiB",
        "bad.tif",
        tiff({**tags, 279: (4, [2**32 - 1])}, pixels),
        REJECTED,
        TAKEN,
        row=row,
    )
    yield case("tif, its pixels cut", "bad.tif", tiff(tags, pixels[:3000]))
    yield case("tif, no width", "bad.tif", tiff({k: v for k, v in tags.items() if k != 256}, pixels))
    yield case(
        "tif, no pixels", "bad.tif", tiff({k: v for k, v in tags.items() if k not in (273, 279)}, pixels)
    )
    yield case("tif, 0 x 0", "bad.tif", tiff({**tags, 256: (4, [0]), 257: (4, [0])}, pixels))
    yield case(
        "tif, 60000 x 60000", "bad.tif", tiff({**tags, 256: (4, [60_000]), 257: (4, [60_000])}, pixels)
    )
    yield case("tif, unknown compression", "bad.tif", tiff({**tags, 259: (3, [777])}, pixels))
    for name, kind in (("LZW", "tiff_lzw"), ("deflate", "tiff_adobe_deflate"), ("JPEG", "jpeg")):
        content = encoded(SHOWN, "TIFF", compression=kind)
        with Image.open(io.BytesIO(content)) as image:
            (start, *_), (size, *_) = image.tag_v2[273], image.tag_v2[279]  # type: ignore[attr-defined]
        damaged = content[: start + size // 3] + bytes(size // 3) + content[start + 2 * (size // 3) :]
        yield case(f"tif, {name}, a part of its strip zeroed", "bad.tif", damaged)
    yield case("tif, entries of 65535 tags", "bad.tif", b"II*\0\x08\0\0\0\xff\xff" + bytes(100))
