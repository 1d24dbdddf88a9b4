"""Which rectangle of an image becomes pixels: shapes, buckets, crops."""

import io
import itertools
import math
import resource
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stages.lib.data.image_shards import ImageEntry
from stages.lib.encoding.framing import (
    Framing,
    Size,
    allowed_sizes,
    auto_sizes,
    frame_images,
    framings,
    nearest_size,
    nominal_views,
    view_names,
)
from stages.lib.encoding.pixels import load_pixels, scaled_pixels
from stages.lib.frame.params import read_params
from tests.conftest import REPOSITORY, changed, draw_image, png

OPTIONS = changed(read_params(REPOSITORY / "params.yaml").encode_images, interpolation="bicubic")


def options(**changes: object):
    return changed(OPTIONS, **changes)


def pixels_of(image: Image.Image, size: Size, **changes: object) -> list[np.ndarray]:
    chosen = options(**changes)
    return [
        load_pixels(png(image), framing, chosen.interpolation, chosen.jpeg_draft)
        for framing in framings(Size(*image.size), size, "digest", chosen)
    ]


@pytest.mark.parametrize("image", [(64, 64), (100, 64), (64, 101), (33, 90), (301, 200), (7, 500)])
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (48, 80)])
def test_every_view_covers_its_shape_and_keeps_proportions(image, size):
    views = framings(Size(*image), Size(*size), "digest", options(random_crops=3, horizontal_flip=True))
    assert len(views) == len(view_names(options(random_crops=3, horizontal_flip=True))) == 8
    for view in views:
        assert view.resized.width - size[0] >= view.left >= 0
        assert view.resized.height - size[1] >= view.top >= 0
        assert view.resized.width == size[0] or view.resized.height == size[1]
        scale = max(size[0] / image[0], size[1] / image[1])
        assert abs(view.resized.width - image[0] * scale) < 1
        assert abs(view.resized.height - image[1] * scale) < 1
    assert [view.flipped for view in views] == [False] * 4 + [True] * 4


def test_the_square_is_what_diffusers_scripts_crop():
    """torchvision's Resize(64) and CenterCrop(64), by hand: the longer side is int(64 * long / short)."""
    for width, height in [(100, 64), (64, 101), (333, 90), (301, 200), (1023, 767)]:
        (view,) = framings(Size(width, height), Size(64, 64), "digest", OPTIONS)
        short, long = min(width, height), max(width, height)
        longer = int(64 * long / short)
        assert view.resized == ((64, longer) if width <= height else (longer, 64))
        assert view.left == round((view.resized.width - 64) / 2.0)
        assert view.top == round((view.resized.height - 64) / 2.0)


def test_a_centred_mark_stays_in_the_centre():
    image = Image.new("RGB", (300, 100), "white")
    image.paste("black", (140, 40, 160, 60))
    (pixels,) = pixels_of(image, Size(50, 50), interpolation="box")
    dark = np.argwhere(pixels[:, :, 0] < 128)
    assert dark.min(axis=0).tolist() == [20, 20]
    assert dark.max(axis=0).tolist() == [29, 29]


def test_random_crops_are_windows_of_the_resized_image_where_the_seed_says():
    image = draw_image(5, (160, 64))
    resized = np.asarray(image)
    crops = pixels_of(image, Size(64, 64), random_crops=6)
    views = framings(Size(160, 64), Size(64, 64), "digest", options(random_crops=6))
    for view, crop in zip(views, crops, strict=True):
        assert np.array_equal(crop, resized[:, view.left : view.left + 64])
    assert len({view.left for view in views}) > 4
    again = framings(Size(160, 64), Size(64, 64), "digest", options(random_crops=6))
    assert again == views
    for change in ({"crop_seed": 1}, {}):
        digest = "digest" if change else "another"
        other = framings(Size(160, 64), Size(64, 64), digest, options(random_crops=6, **change))
        assert other[0] == views[0]
        assert other[1:] != views[1:]
    fewer = framings(Size(160, 64), Size(64, 64), "digest", options(random_crops=2))
    assert fewer == views[:3]


def test_random_crops_reach_every_place_equally():
    lefts = [
        framings(Size(67, 64), Size(64, 64), str(number), options(random_crops=1))[1].left
        for number in range(4000)
    ]
    counts = np.bincount(lefts, minlength=4)
    assert counts.min() > 900
    assert counts.max() < 1100


def test_a_flipped_view_is_the_mirror_image():
    plain, flipped = pixels_of(draw_image(1, (100, 64)), Size(64, 64), horizontal_flip=True)
    assert np.array_equal(flipped, plain[:, ::-1])
    scaled = scaled_pixels([plain, flipped])
    assert scaled.shape == (2, 3, 64, 64)
    assert scaled.min() >= -1
    assert scaled.max() <= 1
    np.testing.assert_allclose(scaled[0].permute(1, 2, 0), plain / 255 * 2 - 1, atol=1e-6)


def test_the_text_of_a_framing_tells_views_apart():
    chosen = options(random_crops=4, horizontal_flip=True)
    views = framings(Size(160, 64), Size(64, 64), "digest", chosen)
    assert len({str(view) for view in views}) == len(set(views))
    assert str(Framing(Size(96, 64), 16, 0, Size(64, 64), True)) == "96x64+16+0-64x64-flipped"


def test_auto_shapes_keep_to_the_budget_by_exhaustive_search():
    cases = [(64, 16, 2.0), (64, 16, 3.75), (512, 64, 2.0), (768, 64, 1.5), (96, 8, 3.0)]
    for resolution, step, max_aspect in cases:
        sides = range(step, resolution**2 // step + 1, step)
        fits = {
            Size(width, height)
            for width, height in itertools.product(sides[: 8 * resolution // step], repeat=2)
            if width * height <= resolution**2
        }
        largest = {
            size
            for size in fits
            if not any(other != size and other[0] >= size[0] and other[1] >= size[1] for other in fits)
        }
        expected = {size for size in largest if max(size) <= max_aspect * min(size)}
        found = auto_sizes(resolution, step, max_aspect)
        assert expected <= set(found)
        assert all(size in fits and max(size) <= max_aspect * min(size) for size in found)
        assert Size(resolution, resolution) in found
        assert {(height, width) for width, height in found} == set(found)
        assert found == sorted(found)


def test_the_sizes_of_the_params():
    assert allowed_sizes(options(resolution=(64,)), 8) == {64: [(64, 64)]}
    several = allowed_sizes(options(resolution=(96, 64)), 8)
    assert list(several.items()) == [(96, [(96, 96)]), (64, [(64, 64)])]
    listed = options(buckets="sizes", bucket_sizes=((96, 64), (64, 64), (96, 64)), resolution=(16, 32))
    assert allowed_sizes(listed, 8) == {80: [(64, 64), (96, 64)]}  # 78.4 squared is 96 * 64
    assert allowed_sizes(listed, 4) == {80: [(64, 64), (96, 64)]}
    assert allowed_sizes(listed, 2) == {78: [(64, 64), (96, 64)]}
    auto = options(buckets="auto", resolution=(64, 96), bucket_step=32)
    assert allowed_sizes(auto, 8) == {64: auto_sizes(64, 32, 2.0), 96: auto_sizes(96, 32, 2.0)}


def test_the_nearest_aspect_wins_and_then_the_largest():
    sizes = [Size(64, 64), Size(128, 128), Size(96, 64), Size(64, 96)]
    assert nearest_size(Size(1000, 1000), sizes, None) == (128, 128)
    assert nearest_size(Size(1000, 660), sizes, None) == (96, 64)
    assert nearest_size(Size(660, 1000), sizes, None) == (64, 96)
    # 1.22 is the geometric mean of 1 and 1.5: on either side another shape is nearer.
    assert nearest_size(Size(1220, 1000), sizes, None) == (128, 128)
    assert nearest_size(Size(1230, 1000), sizes, None) == (96, 64)


def test_images_are_not_enlarged_beyond_the_limit():
    sizes = [Size(64, 64), Size(128, 128)]
    assert nearest_size(Size(100, 100), sizes, 1.28) == (128, 128)
    assert nearest_size(Size(100, 100), sizes, 1.27) == (64, 64)
    assert nearest_size(Size(30, 100), sizes, 2.0) is None
    entries = [ImageEntry("small", "a", 30, 30), ImageEntry("large", "b", 90, 60)]
    framed, left_out = frame_images(entries, {64: [Size(64, 64)]}, options(max_upscale=2.0))
    assert [image.sample_id for image in framed] == ["large"]
    assert left_out[0].sample_id == "small"
    assert "30x30 pixels would be enlarged 2.13 times" in left_out[0].reason
    assert framed[0].upscaled == pytest.approx(64 / 60)
    assert framed[0].cropped_fraction == pytest.approx(1 - 64 / 96)


def test_an_image_is_framed_for_each_resolution_that_it_is_large_enough_for():
    sizes_of = {96: [Size(96, 96)], 64: [Size(64, 64)], 32: [Size(32, 32)]}
    entries = [ImageEntry(f"{side}.png", str(side), side, side) for side in (20, 40, 70, 100)]
    framed, left_out = frame_images(entries, sizes_of, options(max_upscale=1.0))
    assert [(image.sample_id, image.resolution, image.size) for image in framed] == [
        ("40.png", 32, (32, 32)),
        ("70.png", 64, (64, 64)),
        ("70.png", 32, (32, 32)),
        ("100.png", 96, (96, 96)),
        ("100.png", 64, (64, 64)),
        ("100.png", 32, (32, 32)),
    ]
    assert left_out == [
        ("20.png", "20x20 pixels would be enlarged 1.60 times, encode_images.max_upscale is 1")
    ]
    nominal = [(image.sample_id, image.resolution) for image in nominal_views(framed)]
    assert nominal == [("40.png", 32), ("70.png", 64), ("100.png", 96)]


def test_views_of_a_resolution_are_those_of_it_alone():
    """So their rows in the work store are, and a resolution more encodes nothing again."""
    chosen = options(random_crops=2, horizontal_flip=True, buckets="auto", resolution=(64, 96))
    entries = [ImageEntry(f"{width}.png", str(width), width, 100) for width in range(60, 190, 10)]
    both, _ = frame_images(entries, allowed_sizes(chosen, 8), chosen)
    for side in (64, 96):
        alone, _ = frame_images(entries, {side: auto_sizes(side, 16, 2.0)}, chosen)
        assert [image for image in both if image.resolution == side] == alone


def test_a_shape_that_two_resolutions_share_is_the_first_ones():
    chosen = options(buckets="auto", resolution=(160, 144), bucket_step=16, max_aspect=8.7)
    shared = {Size(26 * 16, 3 * 16), Size(3 * 16, 26 * 16)}
    of_each = [set(auto_sizes(side, 16, 8.7)) for side in (160, 144)]
    assert of_each[0] & of_each[1] == shared
    found = allowed_sizes(chosen, 8)
    assert set(found[160]) == of_each[0]
    assert set(found[144]) == of_each[1] - shared


def jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def test_jpeg_draft_is_close_and_of_the_same_shape():
    image = Image.effect_mandelbrot((1024, 768), (-2, -1.5, 1, 1.5), 60).convert("RGB")
    (view,) = framings(Size(1024, 768), Size(64, 64), "digest", OPTIONS)
    plain = load_pixels(jpeg(image), view, "lanczos", False).astype(int)
    draft = load_pixels(jpeg(image), view, "lanczos", True).astype(int)
    assert plain.shape == draft.shape == (64, 64, 3)
    assert 0 < np.abs(plain - draft).mean() < 8
    of_png = [load_pixels(png(image), view, "lanczos", draft) for draft in (True, False)]
    assert np.array_equal(*of_png)


def test_params_of_shapes_are_checked(tmp_path: Path):
    from stages.lib.frame.errors import StageError

    text = (REPOSITORY / "params.yaml").read_text()
    bad = text.replace("buckets: square ", "buckets: auto ").replace("bucket_step: 16", "bucket_step: 48")
    (tmp_path / "params.yaml").write_text(bad.replace("[[64, 64]]", "[[64, 64], [32]]"))
    with pytest.raises(StageError) as error:
        read_params(tmp_path / "params.yaml")
    assert "encode_images.resolution: expected a multiple of bucket_step 48" in str(error.value)
    assert "encode_images.bucket_sizes: expected pairs of [width, height]" in str(error.value)


@pytest.mark.parametrize("filter_", ["lanczos", "bicubic", "bilinear", "box"])
@pytest.mark.parametrize("size", [(900, 40), (40, 900), (1200, 150)])
def test_of_a_long_picture_only_the_kept_box_is_resized(size: tuple[int, int], filter_: str) -> None:
    """Within a level of the whole picture resized and cropped, as torchvision does it."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    chosen = changed(options(), interpolation=filter_, random_crops=3)
    entry = ImageEntry("a", "0" * 64, *size)
    (framed,), _ = frame_images([entry], {64: [Size(64, 64)]}, chosen)
    for view in framed.views:
        assert math.prod(view.resized) > 4 * math.prod(view.size)
        found = load_pixels(png(Image.fromarray(noise)), view, filter_, False).astype(int)
        resized = Image.fromarray(noise).resize(view.resized, Image.Resampling[filter_.upper()])
        whole = np.asarray(resized.crop((view.left, view.top, view.left + 64, view.top + 64))).astype(int)
        assert np.abs(found - whole).max() <= 1


@pytest.mark.parametrize("size", [(30_000, 1), (1, 30_000), (1, 1), (2, 4001)])
def test_memory_of_a_view_is_bounded_by_its_target(size: tuple[int, int]) -> None:
    """Resized as a whole, the first would be of 15,360,000 x 512 pixels."""
    entry = ImageEntry("a", "0" * 64, *size)
    (framed,), _ = frame_images([entry], {512: [Size(512, 512)]}, options())
    picture = Image.new("RGB", size, (10, 20, 30))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pixels = load_pixels(png(picture), framed.views[0], "lanczos", False)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 50e6
    assert pixels.shape == (512, 512, 3)
    assert np.abs(pixels.astype(int) - [10, 20, 30]).max() <= 1
