"""Files that are refused are so for one reason of their own, and nothing is said without their name."""

from __future__ import annotations

import io
import threading

import numpy as np
import pytest
from PIL import Image

from stages.lib.data.pictures.formats import UnusableImageError
from stages.lib.data.pictures.storing import stored_image
from tests.unit.data.pictures.test_decoding import encoded

tifffile = pytest.importorskip("tifffile")
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
FAX = encoded(Image.fromarray(NOISE[..., 0]).convert("1"), "TIFF", compression="group4")
SHORT = encoded(Image.fromarray(NOISE), "TIFF", compression="tiff_lzw")


def damaged_fax() -> bytes:
    """Whose lower half is no fax."""
    with Image.open(io.BytesIO(FAX)) as image:
        offset, count = image.tag_v2[273][0], image.tag_v2[279][0]
    return FAX[: offset + count // 2] + b"U" * (count - count // 2) + FAX[offset + count :]


def of_compression(number: int) -> bytes:
    """A TIFF that says so of its pixels."""
    plain = encoded(Image.fromarray(NOISE), "TIFF", compression="tiff_deflate")
    entry = b"\x03\x01\x03\x00\x01\x00\x00\x00"
    assert plain.count(entry) == 1
    at = plain.index(entry) + len(entry)
    return plain[:at] + number.to_bytes(2, "little") + plain[at + 2 :]


def grey_and_opacity_of_16_bits() -> bytes:
    buffer = io.BytesIO()
    samples = NOISE[..., :2].astype(np.uint16)
    tifffile.imwrite(buffer, samples, photometric="minisblack", extrasamples=["unassalpha"], metadata=None)
    return buffer.getvalue()


REFUSED = {
    "rows of a fax that are lost": (damaged_fax, r"^broken image: Fax4Decode: .* of strip 0"),
    "a compression without a decoder": (
        lambda: of_compression(50001),
        r"^broken image: WEBP compression support is not configured",
    ),
    "samples that Pillow does not know": (
        grey_and_opacity_of_16_bits,
        r"^broken image, or a kind of TIFF that is not read: unknown pixel mode",
    ),
    "a PNG of a broken chunk": (
        lambda: encoded(Image.fromarray(NOISE), "PNG")[:33] + bytes(range(200, 220)),
        r"^broken image, or a kind of PNG that is not read: broken PNG file",
    ),
    "no image": (lambda: b"no image", r"^not an image in a known format \(PNG, "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_is_refused_for_its_own_reason(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(UnusableImageError, match=reason):
        stored_image(make(), 10**6)
    assert capfd.readouterr() == ("", "")


def test_reasons_of_threads_are_not_mixed() -> None:
    data, found = [damaged_fax(), of_compression(50001), FAX, SHORT] * 5, {}

    def read(number: int) -> None:
        try:
            stored_image(data[number], 10**6)
            found[number] = "stored"
        except UnusableImageError as error:
            found[number] = str(error)[14:18]

    threads = [threading.Thread(target=read, args=(number,)) for number in range(len(data))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(len(data))] == ["Fax4", "WEBP", "stored", "stored"] * 5
