"""What the encoders leave behind: data/latents.zarr and data/captions.zarr, assembled from the work store.

`latents` and `conditioning` read them. Rows are put in the order of their names, whatever order they were
encoded in, so that the bytes do not depend on it.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from stages.lib.core.paths import ENCODED_CAPTIONS, LATENTS
from stages.lib.encoding.framing import FramedImage
from stages.lib.frame.params import EncodeImages
from stages.lib.store.blocks import Row
from stages.lib.store.work_store import WorkStore
from stages.lib.store.zarr_store import ArraySpec, create_store, finish_store, subgroup, write_rows


def by_shape(images: list[FramedImage], options: EncodeImages) -> dict[str, list[FramedImage]]:
    """Where in the store -> images: the root without buckets, else a group a shape."""
    if options.buckets == "square":
        return {"": images}
    groups: dict[str, list[FramedImage]] = defaultdict(list)
    for image in images:
        groups[f"{image.size}/"].append(image)
    return dict(sorted(groups.items()))


def write_latents(
    moments: WorkStore,
    groups: dict[str, list[FramedImage]],
    attributes: dict[str, Any],
    factor: int,
    latent_channels: int,
) -> set[str]:
    """data/latents.zarr: moments and names, each group in ``sample_id`` order.

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
        schema[f"{name}sample_id"] = ArraySpec(shape[:1], str, ("sample",))
    store = create_store(LATENTS, schema, attributes)
    redone: set[str] = set()
    for name, images in groups.items():
        write_rows(subgroup(store, name.rstrip("/")), _sample_rows(moments, images, redone))
    finish_store(LATENTS, store)
    return redone


def write_captions(
    store: WorkStore, captions: list[str], keys: list[str], attributes: dict[str, Any]
) -> set[str]:
    """data/captions.zarr: each caption's windows side by side.

    Returns:
        Keys of the windows that overflowed in the dtype of the params, and were encoded in float32.
    """
    num_chunks = attributes["num_chunks"]
    length, width = next(store.rows(keys[:1]))["encoder_hidden_states"].shape
    shape = (len(captions), num_chunks * length, width)
    schema = {
        "encoder_hidden_states": ArraySpec(shape, np.float16, ("caption", "token", "hidden")),
        "caption": ArraySpec(shape[:1], str, ("caption",)),
    }
    redone: set[str] = set()

    def rows() -> Iterator[Row]:
        windows = zip(keys, store.rows(keys), strict=True)
        for caption in captions:
            parts = list(itertools.islice(windows, num_chunks))
            redone.update(key for key, row in parts if row.get("redone"))
            yield {
                "encoder_hidden_states": np.concatenate([row["encoder_hidden_states"] for _, row in parts]),
                "caption": np.asarray(caption, np.dtypes.StringDType()),
            }

    output = create_store(ENCODED_CAPTIONS, schema, attributes)
    write_rows(output, rows())
    finish_store(ENCODED_CAPTIONS, output)
    return redone


def mean_and_std(arrays: Iterable[np.ndarray]) -> dict[str, float]:
    """Mean and standard deviation over all values, summed in float64, one array in memory at a time."""
    count, total, squares = 0, 0.0, 0.0
    for array in arrays:
        values = array.astype(np.float64)
        count, total, squares = count + values.size, total + values.sum(), squares + np.square(values).sum()
    mean = total / count
    return {"embedding_mean": mean, "embedding_std": math.sqrt(max(0.0, squares / count - mean**2))}


def all_keys(images: Sequence[FramedImage]) -> list[str]:
    return [key for image in images for key in image.keys]


def _sample_rows(moments: WorkStore, images: list[FramedImage], redone: set[str]) -> Iterator[Row]:
    """Each image's views side by side, (V, 4, h, w), and its name; adds redone views' keys to ``redone``."""
    rows = moments.rows(all_keys(images))
    for image in images:
        views = [next(rows) for _ in image.views]
        redone.update(key for key, view in zip(image.keys, views, strict=True) if view.get("redone"))
        yield {
            "mean": np.stack([view["mean"] for view in views]),
            "logvar": np.stack([view["logvar"] for view in views]),
            "sample_id": np.asarray(image.sample_id, np.dtypes.StringDType()),
        }
