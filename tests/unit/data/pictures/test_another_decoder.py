"""Pictures are those of libvips: the photographs that scikit-image ships, and one of them in every form."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import ExifTags, Image, PngImagePlugin

from stages.lib.data.pictures.decoding import decoded
from stages.lib.data.pictures.formats import SUFFIXES, UnusableImageError
from stages.lib.data.pictures.storing import stored_image

pyvips = pytest.importorskip("pyvips")
DATA = Path(skimage.__file__).parent / "data"
OF_FLOATS = "multipage_rgb.tif"
SHIPPED = sorted(path for path in DATA.iterdir() if path.suffix in SUFFIXES and path.name != OF_FLOATS)
PHOTOGRAPH = Image.open(next(path for path in SHIPPED if path.name == "coffee.png")).convert("RGB")
LEVELS = 2  # of 255, on average


def by_vips(data: bytes) -> np.ndarray:
    """The first page, upright, over white, in sRGB with 8 bits, as libvips makes it."""
    image = pyvips.Image.new_from_buffer(data, "").autorot()
    with Image.open(io.BytesIO(data)) as opened:
        profile = opened.info.get("icc_profile")
    if profile:  # its PNG reader leaves out those of grey
        image = image.copy()
        image.set_type(pyvips.GValue.blob_type, "icc-profile-data", profile)
        image = image.icc_transform("srgb", embedded=True, intent="relative", black_point_compensation=True)
    if image.format == "ushort" or image.interpretation not in ("srgb", "b-w", "multiband"):
        image = image.colourspace("srgb")
    if image.hasalpha():
        image = image.flatten(background=255)
    pixels = image.cast("uchar").numpy().astype(int)
    return np.repeat(pixels.reshape(*pixels.shape[:2], -1)[..., :3], 3 if image.bands == 1 else 1, axis=2)


def assert_alike(data: bytes) -> None:
    stored = stored_image(data, 10**8).image
    ours, theirs = np.asarray(decoded(stored.data)).astype(int), by_vips(data)
    assert ours.shape == theirs.shape == (stored.height, stored.width, 3)
    assert np.abs(ours - theirs).mean() <= LEVELS


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_what_scikit_image_ships(path: Path) -> None:
    assert_alike(path.read_bytes())


def test_floats_are_refused() -> None:
    with pytest.raises(UnusableImageError):
        stored_image((DATA / OF_FLOATS).read_bytes(), 10**8)


def encoded(image: Image.Image, file_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def transparent(mode: str) -> Image.Image:
    image = PHOTOGRAPH.convert(mode)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


FORMS = {
    "jpeg": lambda: encoded(PHOTOGRAPH, "JPEG"),
    "jpeg, 4:4:4": lambda: encoded(PHOTOGRAPH, "JPEG", subsampling=0),
    "jpeg, progressive": lambda: encoded(PHOTOGRAPH, "JPEG", progressive=True),
    "jpeg, grey": lambda: encoded(PHOTOGRAPH.convert("L"), "JPEG"),
    "png": lambda: encoded(PHOTOGRAPH, "PNG"),
    "png, grey": lambda: encoded(PHOTOGRAPH.convert("L"), "PNG"),
    "png, grey and alpha": lambda: encoded(transparent("L"), "PNG"),
    "png, alpha": lambda: encoded(transparent("RGB"), "PNG"),
    "png, palette": lambda: encoded(PHOTOGRAPH.quantize(64), "PNG"),
    "png, one bit": lambda: encoded(PHOTOGRAPH.convert("1"), "PNG"),
    "png, 16 bits": lambda: encoded(
        Image.fromarray(np.asarray(PHOTOGRAPH.convert("L")).astype(np.uint16) * 257), "PNG"
    ),
    "webp": lambda: encoded(PHOTOGRAPH, "WEBP", quality=90),
    "webp, lossless with alpha": lambda: encoded(transparent("RGB"), "WEBP", lossless=True),
    "tiff, LZW": lambda: encoded(PHOTOGRAPH, "TIFF", compression="tiff_lzw"),
    "tiff, deflate": lambda: encoded(PHOTOGRAPH, "TIFF", compression="tiff_adobe_deflate"),
    "tiff, JPEG": lambda: encoded(PHOTOGRAPH, "TIFF", compression="jpeg"),
    "tiff, 16 bits": lambda: encoded(
        Image.fromarray(np.asarray(PHOTOGRAPH.convert("L")).astype(np.uint16) * 257), "TIFF"
    ),
    "gif": lambda: encoded(PHOTOGRAPH, "GIF"),
    "ppm": lambda: encoded(PHOTOGRAPH, "PPM"),
    "jpeg 2000": lambda: encoded(PHOTOGRAPH, "JPEG2000"),
    "avif": lambda: encoded(PHOTOGRAPH, "AVIF", quality=90),
}


@pytest.mark.parametrize("name", FORMS)
def test_a_photograph_in_every_form(name: str) -> None:
    try:
        pyvips.Image.new_from_buffer(FORMS[name](), "").avg()
    except pyvips.Error:
        pytest.skip("this libvips does not read it")
    assert_alike(FORMS[name]())


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_orientation(file_format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    assert_alike(encoded(PHOTOGRAPH.reduce(3), file_format, exif=exif))


XMP = b"""<?xpacket begin='' id='W5M0MpCehiHzreSzNTczkc9d'?><x:xmpmeta xmlns:x='adobe:ns:meta/'>
<rdf:RDF xmlns:rdf='http://www.w3.org/1999/02/22-rdf-syntax-ns#'><rdf:Description rdf:about=''
 xmlns:tiff='http://ns.adobe.com/tiff/1.0/' tiff:Orientation="6"/></rdf:RDF></x:xmpmeta><?xpacket end='w'?>"""


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_viewers_turn_nothing_for_what_xmp_says(file_format: str) -> None:
    if file_format == "PNG":
        texts = PngImagePlugin.PngInfo()
        texts.add_itxt("XML:com.adobe.xmp", XMP.decode())
        options: dict[str, object] = {"pnginfo": texts}
    elif file_format == "TIFF":
        options = {"tiffinfo": {700: XMP}}
    else:
        options = {"xmp": XMP}
    data = encoded(PHOTOGRAPH, file_format, **options)
    assert b'Orientation="6"' in data
    assert_alike(data)
    assert decoded(data).size == PHOTOGRAPH.size


def test_viewers_turn_nothing_for_a_text_of_a_png() -> None:
    """As ImageMagick keeps the EXIF of a photograph in it."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    digits = exif.tobytes().hex()
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Raw profile type exif", f"\nexif\n{len(digits) // 2:8}\n{digits}\n")
    data = encoded(PHOTOGRAPH, "PNG", pnginfo=texts)
    assert_alike(data)
    assert decoded(data).size == PHOTOGRAPH.size


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "AVIF"])
@pytest.mark.parametrize(
    "exif", [b"MM\0*\0\0\0", b"\xff\xff\xff\xff\0\0\0\x08\0\x04", b"II*\0\x08\0\0\0\x09\0\x12\x01"]
)
def test_exif_that_cannot_be_read_is_no_damage(file_format: str, exif: bytes) -> None:
    if file_format == "AVIF" and not exif.startswith(b"II"):
        pytest.skip("Pillow writes none such")
    data = encoded(PHOTOGRAPH, file_format, exif=b"Exif\0\0" + exif)
    assert_alike(data)
