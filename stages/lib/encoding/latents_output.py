"""data/latents.zarr, assembled from the work store; `latents` reads it.

Rows lie in the order of their names, so that the bytes do not depend on the order of encoding.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from stages.lib.core.paths import LATENTS
from stages.lib.encoding.framing import FramedImage
from stages.lib.frame.params import EncodeImages
from stages.lib.models.families.family import Family
from stages.lib.models.families.sd import SD
from stages.lib.store.blocks import Row
from stages.lib.store.work_store import WorkStore
from stages.lib.store.zarr_store import ArraySpec, create_store, finish_store, subgroup, write_rows


def by_shape(images: list[FramedImage], options: EncodeImages) -> dict[str, list[FramedImage]]:
    """Where in the store -> images: the root where there is one shape, else a group a shape."""
    if options.buckets == "square" and len(options.resolution) == 1:
        return {"": images}
    groups: dict[str, list[FramedImage]] = defaultdict(list)
    for image in images:
        groups[f"{image.size}/"].append(image)
    return dict(sorted(groups.items()))


def resolution_of_each(groups: dict[str, list[FramedImage]]) -> dict[str, int]:
    """Group of the store -> the resolution of its images."""
    return {name.rstrip("/"): images[0].resolution for name, images in groups.items()}


def write_latents(
    moments: WorkStore,
    masks: Callable[[Sequence[FramedImage]], Iterator[Row]] | None,
    groups: dict[str, list[FramedImage]],
    attributes: dict[str, Any],
    factor: int,
    latent_channels: int,
    family: Family = SD,
) -> set[str]:
    """data/latents.zarr: moments, masks where there are any, and names, each group in ``sample_id`` order.

    Of a family whose UNet is told of views, what it is told too.

    Returns:
        Keys of the views that overflowed in the dtype of the params, and were encoded in float32.
    """
    dimensions = ("sample", "view", "channel", "height", "width")
    schema = {}
    for name, images in groups.items():
        width, height = (side // factor for side in images[0].size)
        shape = (len(images), len(images[0].views), latent_channels, height, width)
        schema[f"{name}mean"] = ArraySpec(shape, np.float16, dimensions)
        schema[f"{name}logvar"] = ArraySpec(shape, np.float16, dimensions)
        if masks is not None:
            schema[f"{name}mask"] = ArraySpec((*shape[:2], 1, height, width), np.float16, dimensions)
        for condition, length in family.of_view.items():
            schema[f"{name}{condition}"] = ArraySpec(
                (*shape[:2], length), np.int32, ("sample", "view", "number")
            )
        schema[f"{name}sample_id"] = ArraySpec(shape[:1], str, ("sample",))
    store = create_store(LATENTS, schema, attributes)
    redone: set[str] = set()
    for name, images in groups.items():
        write_rows(subgroup(store, name.rstrip("/")), _sample_rows(moments, masks, images, redone, family))
    finish_store(LATENTS, store)
    return redone


def all_keys(images: Sequence[FramedImage]) -> list[str]:
    return [key for image in images for key in image.keys]


def _sample_rows(
    moments: WorkStore,
    masks: Callable[[Sequence[FramedImage]], Iterator[Row]] | None,
    images: list[FramedImage],
    redone: set[str],
    family: Family,
) -> Iterator[Row]:
    """Each image's views side by side, (V, 4, h, w), and its name; adds redone views' keys to ``redone``."""
    rows = moments.rows(all_keys(images))
    mask_rows = None if masks is None else masks(images)
    for image in images:
        views = [next(rows) for _ in image.views]
        redone.update(key for key, view in zip(image.keys, views, strict=True) if view.get("redone"))
        row = {
            "mean": np.stack([view["mean"] for view in views]),
            "logvar": np.stack([view["logvar"] for view in views]),
            "sample_id": np.asarray(image.sample_id, np.dtypes.StringDType()),
        }
        told = [family.view_conditions(view) for view in image.told]
        row |= {name: np.array([view[name] for view in told], np.int32) for name in family.of_view}
        if mask_rows is not None:
            row["mask"] = np.stack([next(mask_rows)["mask"] for _ in image.views])
        yield row
