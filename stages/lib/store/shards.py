"""How Zarr lays the rows of an array out in files: chunks, or shards of chunks, along the first dimension.

Source: the Zarr specification, version 3, and its sharding_indexed codec. No other module knows it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import zarr

# Up to 10,000 rows a file is a chunk of 64 rows; above, a shard of 64 chunks of 8 rows.
CHUNK_ROWS = 64
UNSHARDED_ROWS = 10_000
SHARD_ROWS, SHARD_CHUNK_ROWS = 512, 8
_ENTRY_BYTES, _CHECKSUM_BYTES = 16, 4  # of a shard's index


def chunks_and_shards(shape: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...] | None]:
    """Shapes of the chunks and of the shards, if any, that an array of ``shape`` is stored in."""
    if shape[0] <= UNSHARDED_ROWS:
        return (min(CHUNK_ROWS, shape[0]), *shape[1:]), None
    return (SHARD_CHUNK_ROWS, *shape[1:]), (SHARD_ROWS, *shape[1:])


def rows_per_file(array: zarr.Array[Any]) -> int:
    """Rows that a file holds, the last one perhaps fewer."""
    return (array.shards or array.chunks)[0]


def num_files(array: zarr.Array[Any]) -> int:
    """Files that a whole array has."""
    return math.ceil(array.shape[0] / rows_per_file(array))


def chunk_files(path: Path, name: str) -> list[Path]:
    """The files that are there of the array ``name`` of the store at ``path``."""
    return [file for file in (path / name / "c").rglob("*") if file.is_file()]


def chunk_file(name: str, number: int, num_dimensions: int) -> Path:
    """Where in the store the ``number``-th file of an array lies."""
    return Path(name, "c", str(number), *["0"] * (num_dimensions - 1))


def shard_index(content: np.ndarray, num_chunks: int) -> np.ndarray:
    """Offset and length of each chunk of a shard, (num_chunks, 2) uint64, from its bytes (N,) uint8.

    The index lies at the shard's end, with a checksum after it.
    """
    index_bytes = _ENTRY_BYTES * num_chunks
    index = content[-(index_bytes + _CHECKSUM_BYTES) : -_CHECKSUM_BYTES].tobytes()
    return np.frombuffer(index, dtype="<u8").reshape(num_chunks, 2)
