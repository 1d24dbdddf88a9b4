"""data/captions.zarr, assembled from the work store; `conditioning` reads it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from stages.lib.core.paths import ENCODED_CAPTIONS
from stages.lib.encoding.text_encoder import joined, without_caption
from stages.lib.models.families.family import STATES
from stages.lib.store.blocks import Row
from stages.lib.store.work_store import WorkStore
from stages.lib.store.zarr_store import ArraySpec, create_store, finish_store, write_rows


def write_encoded_captions(
    store: WorkStore,
    captions: list[str],
    keys: list[str],
    attributes: dict[str, Any],
    of_caption: Sequence[str],
) -> set[str]:
    """data/captions.zarr: each caption's windows side by side; of what is pooled that of its first window.

    Args:
        store: holds the windows.
        captions: in the order of rows.
        keys: of all windows of the first caption, of the second, and so on.
        attributes: of the store; with ``no_caption`` "zeros" the row of "" is zeros.
        of_caption: names of a caption's conditions.

    Returns:
        Keys of the windows that overflowed in the dtype of the params, and were encoded in float32.
    """
    num_chunks = attributes["num_chunks"]
    first = next(store.rows(keys[:1]))
    length, width = first[STATES].shape
    shape = (len(captions), num_chunks * length, width)
    schema = {STATES: ArraySpec(shape, np.float16, ("caption", "token", "hidden"))}
    for name in of_caption:
        if name != STATES:
            schema[name] = ArraySpec((len(captions), *first[name].shape), np.float16, ("caption", "hidden"))
    schema["caption"] = ArraySpec(shape[:1], str, ("caption",))
    zeros = attributes.get("no_caption") == "zeros"
    redone: set[str] = set()

    def rows() -> Iterator[Row]:
        windows = zip(keys, store.rows(keys), strict=True)
        for caption in captions:
            parts = list(itertools.islice(windows, num_chunks))
            redone.update(key for key, row in parts if row.get("redone"))
            found = joined([{name: row[name] for name in of_caption} for _, row in parts], np.concatenate)
            if zeros and not caption:
                found = without_caption(found)
            yield {**found, "caption": np.asarray(caption, np.dtypes.StringDType())}

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
