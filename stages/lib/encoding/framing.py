"""Which rectangle of an image the VAE sees: the shapes allowed, the nearest one, and where it is cropped.

Everything here is whole-number geometry on widths and heights. A `Framing` says all there is to
say about a view, so its text is part of the key under which the view is encoded once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stages.lib.core.draws import unit_interval
from stages.lib.data.image_shards import ImageEntry
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import EncodeImages
from stages.lib.models.families.family import View


class Size(NamedTuple):
    """Pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True, slots=True)
class Framing:
    """A view of an image: resized to ``resized``, cropped to ``size`` at (left, top), perhaps mirrored."""

    resized: Size
    left: int
    top: int
    size: Size
    flipped: bool

    @property
    def left_as_seen(self) -> int:
        """The crop's left side in the resized image, mirrored first where the view is."""
        return self.resized.width - self.size.width - self.left if self.flipped else self.left

    def __str__(self) -> str:
        mirrored = "-flipped" if self.flipped else ""
        return f"{self.resized}+{self.left}+{self.top}-{self.size}{mirrored}"


@dataclass(frozen=True, slots=True)
class FramedImage:
    """An image and the views that are kept of it for one resolution, all of one size."""

    entry: ImageEntry
    views: list[Framing]
    resolution: int

    @property
    def sample_id(self) -> str:
        return self.entry.sample_id

    @property
    def size(self) -> Size:
        """Of every view."""
        return self.views[0].size

    @property
    def keys(self) -> list[str]:
        """Of the views' rows in the work store: the image's bytes, and what is done to them."""
        return [f"{self.entry.image_sha256}-{view}" for view in self.views]

    @property
    def told(self) -> list[View]:
        """What a UNet may be told of each view: of a mirrored one, where it was cropped once mirrored."""
        original = (self.entry.height, self.entry.width)
        return [
            View(original, (view.top, view.left_as_seen), (view.size.height, view.size.width))
            for view in self.views
        ]

    @property
    def cropped_fraction(self) -> float:
        """Share of the resized image outside the crop, 0 to 1."""
        return 1.0 - math.prod(self.size) / math.prod(self.views[0].resized)

    @property
    def upscaled(self) -> float:
        """How many times the image is enlarged; below 1 it is reduced."""
        return upscale(Size(self.entry.width, self.entry.height), self.size)


class LeftOut(NamedTuple):
    """An image that no shape fits, and why."""

    sample_id: str
    reason: str


def frame_images(
    entries: Sequence[ImageEntry], sizes_of: Mapping[int, Sequence[Size]], options: EncodeImages
) -> tuple[list[FramedImage], list[LeftOut]]:
    """The views of each image for each resolution, and the images that all would enlarge too much.

    Args:
        entries: of the images.
        sizes_of: resolution -> shapes, as `allowed_sizes` gives them.
        options: which views, and how much an image may be enlarged.

    Returns:
        By image, and of an image in the order of the resolutions: the first is its nominal one.
    """
    framed, left_out = [], []
    for entry in entries:
        image = Size(entry.width, entry.height)
        fitting = [
            FramedImage(entry, framings(image, size, entry.image_sha256, options), resolution)
            for resolution, sizes in sizes_of.items()
            if (size := nearest_size(image, sizes, options.max_upscale)) is not None
        ]
        if not fitting:
            least = min(upscale(image, allowed) for sizes in sizes_of.values() for allowed in sizes)
            limit = f"encode_images.max_upscale is {options.max_upscale:g}"
            left_out.append(
                LeftOut(entry.sample_id, f"{image} pixels would be enlarged {least:.2f} times, {limit}")
            )
        framed += fitting
    return framed, left_out


def nominal_views(images: Iterable[FramedImage]) -> list[FramedImage]:
    """Each image once, in the first of the resolutions that it is framed for."""
    first: dict[str, FramedImage] = {}
    for image in images:
        first.setdefault(image.sample_id, image)
    return list(first.values())


def allowed_sizes(options: EncodeImages, factor: int) -> dict[int, list[Size]]:
    """Resolution -> the shapes that images are cropped to; one that two resolutions share is the first's.

    These are a square, those found by `auto_sizes`, or those listed, which stand for one nominal resolution:
    the side of the square of the median of their areas.

    Args:
        options: which shapes.
        factor: downsampling factor of the VAE, which a nominal resolution is a multiple of.
    """
    if options.buckets == "square":
        return {side: [Size(side, side)] for side in options.resolution}
    if options.buckets == "auto":
        step, max_aspect = options.bucket_step, options.max_aspect
        found: dict[int, list[Size]] = {}
        for side in options.resolution:
            taken = set(itertools.chain.from_iterable(found.values()))  # rarely, and by a large max_aspect
            found[side] = [size for size in auto_sizes(side, step, max_aspect) if size not in taken]
        return found
    areas = sorted(width * height for width, height in options.bucket_sizes)
    nominal = max(1, round(math.sqrt(areas[len(areas) // 2]) / factor)) * factor
    return {nominal: [Size(*pair) for pair in sorted(set(options.bucket_sizes))]}


def check_sizes(sizes_of: Mapping[int, Sequence[Size]], factor: int) -> None:
    """Raise StageError if a shape does not divide by the VAE's downsampling factor."""
    for size in itertools.chain.from_iterable(sizes_of.values()):
        if size.width % factor or size.height % factor:
            raise StageError(
                f"params.yaml: encode_images allows {size} pixels, expected multiples of {factor}, the VAE's "
                "downsampling factor; see resolution, bucket_sizes and bucket_step"
            )


def auto_sizes(resolution: int, step: int, max_aspect: float) -> list[Size]:
    """Every shape whose sides are multiples of ``step``, with at most resolution ** 2 pixels.

    Of those that lie inside another only the larger is kept. This is the bucketing of NovelAI's
    "Improvements on Stable Diffusion" (2022), by area instead of by a largest side.

    Args:
        resolution: pixels; a multiple of ``step``.
        max_aspect: longer over shorter side, 1 or more.
    """
    budget, found = resolution**2, set()
    for width in range(step, budget // step + 1, step):
        height = budget // width // step * step
        if max(width, height) <= max_aspect * min(width, height):
            found |= {Size(width, height), Size(height, width)}
    return sorted(
        size for size in found if not any(other != size and _covers(other, size) for other in found)
    )


def _covers(other: Size, size: Size) -> bool:
    return other.width >= size.width and other.height >= size.height


def upscale(image: Size, size: Size) -> float:
    """How many times ``image`` is enlarged to cover ``size``; below 1 it is reduced."""
    return max(size.width / image.width, size.height / image.height)


def nearest_size(image: Size, sizes: Sequence[Size], max_upscale: float | None) -> Size | None:
    """The allowed shape nearest in aspect ratio, the largest of several; None if all enlarge too much."""
    reachable = [size for size in sizes if max_upscale is None or upscale(image, size) <= max_upscale]
    aspect = image.width / image.height

    def distance(size: Size) -> tuple[float, int]:
        return abs(math.log(size.width / size.height / aspect)), -math.prod(size)

    return min(reachable, key=distance, default=None)


def view_names(options: EncodeImages) -> list[str]:
    """The views kept of each image: the centre crop first, seeded random crops, then all of them mirrored."""
    crops = ["centre", *(f"crop {index}" for index in range(options.random_crops))]
    return crops + [f"{crop} flipped" for crop in crops] if options.horizontal_flip else crops


def framings(image: Size, size: Size, digest: str, options: EncodeImages) -> list[Framing]:
    """One framing for each of `view_names`.

    The image is resized to cover ``size`` with its proportions kept, by the arithmetic of
    torchvision's Resize, CenterCrop and RandomCrop, which diffusers' training scripts use.

    Args:
        image: size of the stored image.
        digest: hash of the image; random crops depend on it and on ``crop_seed`` alone.
    """
    resized = _covering(image, size)
    spare_width, spare_height = resized.width - size.width, resized.height - size.height
    corners = [(round(spare_width / 2), round(spare_height / 2))]
    for index in range(options.random_crops):
        across, down = (
            unit_interval(options.crop_seed, f"crop {side}", digest, index) for side in ("left", "top")
        )
        corners.append((int(across * (spare_width + 1)), int(down * (spare_height + 1))))
    return [
        Framing(resized, left, top, size, flipped)
        for flipped in ([False, True] if options.horizontal_flip else [False])
        for left, top in corners
    ]


def _covering(image: Size, size: Size) -> Size:
    """``image`` scaled, its proportions kept, so that one side fits and the other is not smaller."""
    if size.width * image.height >= size.height * image.width:
        return Size(size.width, size.width * image.height // image.width)
    return Size(size.height * image.width // image.height, size.height)
