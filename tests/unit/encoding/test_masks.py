"""The opacity of an image as weights of its latents' pixels."""

import io

import numpy as np
import pytest
from PIL import Image

from stages.lib.encoding.framing import Framing, Size, framings
from stages.lib.encoding.pixels import build_mask_encoder, load_mask, load_pixels
from stages.lib.frame.params import read_params
from tests.conftest import REPOSITORY, changed, draw_image, png

OPTIONS = changed(read_params(REPOSITORY / "params.yaml").encode_images, random_crops=3, horizontal_flip=True)


def opacity(width: int, height: int) -> np.ndarray:
    return np.random.default_rng(width * height).integers(0, 256, (height, width), np.uint8)


def see_through(alpha: np.ndarray) -> bytes:
    image = draw_image(3, (alpha.shape[1], alpha.shape[0]))
    image.putalpha(Image.fromarray(alpha))
    return png(image)


def latent_mask(pixels: np.ndarray, factor: int) -> np.ndarray:
    (row,) = build_mask_encoder(factor, "cpu", "float32")([pixels])
    return row["mask"]


@pytest.mark.parametrize("size", [(64, 64), (100, 80), (61, 130), (400, 40), (1200, 90)])
@pytest.mark.parametrize("target", [Size(64, 64), Size(96, 64), Size(40, 56)])
def test_a_mask_is_framed_as_the_image_is(size: tuple[int, int], target: Size) -> None:
    """In each view it is the grey picture of the same values; the last sizes are cropped first."""
    alpha = opacity(*size)
    grey = png(Image.fromarray(alpha))
    for view in framings(Size(*size), target, "digest", OPTIONS):
        found = load_mask(see_through(alpha), view)
        assert found.dtype == np.uint8
        assert np.array_equal(found, load_pixels(grey, view, "box", False)[:, :, 0])


def test_a_latent_pixel_has_the_mean_of_its_area() -> None:
    """In float64, of an image that is three times as large as its view; mirrored and cropped by hand."""
    alpha = opacity(300, 192)
    for flipped in (False, True):
        view = Framing(Size(100, 64), 20, 0, Size(64, 64), flipped)
        cut = alpha[:, 60 : 60 + 192].astype(np.float64) / 255
        expected = cut[:, ::-1].reshape(8, 24, 8, 24) if flipped else cut.reshape(8, 24, 8, 24)
        found = latent_mask(load_mask(see_through(alpha), view), 8)
        assert found.shape == (1, 8, 8)
        assert found.dtype == np.float16
        # Rounded to 8 bits at 64 of its pixels, and to float16.
        np.testing.assert_allclose(found[0].astype(np.float64), expected.mean(axis=(1, 3)), atol=1e-3)


def test_masks_lie_between_nothing_and_all() -> None:
    alpha = np.zeros((64, 64), np.uint8)
    alpha[:32], alpha[32:40] = 255, 128
    view = Framing(Size(64, 64), 0, 0, Size(64, 64), False)
    rows = latent_mask(load_mask(see_through(alpha), view), 8)[0]
    assert (rows[:4] == 1).all()
    assert (rows[4] == np.float16(128 / 255)).all()
    assert (rows[5:] == 0).all()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_an_image_without_transparency_is_seen_as_a_whole(form: str) -> None:
    buffer = io.BytesIO()
    draw_image(1, (90, 70)).save(buffer, form)
    for view in framings(Size(90, 70), Size(64, 48), "digest", OPTIONS):
        mask = load_mask(buffer.getvalue(), view)
        assert mask.shape == (48, 64)
        assert (latent_mask(mask, 8) == 1).all()
