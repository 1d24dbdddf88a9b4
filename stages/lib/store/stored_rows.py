"""Rows of a store's array read from its files when they are asked for, for data that memory cannot hold.

The stores are uncompressed, so a row lies whole at a known place of a file: any row costs one read of
its own bytes, and data can be shuffled freely. (Zarr itself would read and check the chunk around it.)
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import torch
import zarr

from stages.lib.store.shards import chunk_file, shard_index


class StoredRows:
    """An array of a store that `zarr_store.open_store` has verified, indexed like a tensor.

    ``rows[index]`` and ``rows[index, views]`` copy what (B,) ``index`` names, ``views`` being one
    number or (B,) of them. File pages come and go as the operating system sees fit.

    Args:
        path: of the store.
        group: the open store.
        name: of the array, e.g. ``mean`` or ``512x768/mean``.
    """

    def __init__(self, path: Path, group: zarr.Group, name: str) -> None:
        array = group[name]
        if not isinstance(array, zarr.Array):
            raise KeyError(name)
        self.shape = torch.Size(array.shape)
        self._dtype = np.dtype(array.dtype)
        self._chunk_rows = array.chunks[0]
        self._shard_rows = array.shards[0] if array.shards else 0
        self._path, self._name = path, name

    def __getitem__(self, key: torch.Tensor | tuple[torch.Tensor, torch.Tensor | int]) -> torch.Tensor:
        rows, views = key if isinstance(key, tuple) else (key, None)
        numbers = rows.tolist()
        if views is None:
            return torch.from_numpy(np.stack([self._row(row) for row in numbers]))
        chosen = [views] * len(numbers) if isinstance(views, int) else views.tolist()
        pairs = zip(numbers, chosen, strict=True)
        return torch.from_numpy(np.stack([self._row(row)[view] for row, view in pairs]))

    def _row(self, row: int) -> np.ndarray:
        """A view of one row's bytes in its file."""
        if not self._shard_rows:
            chunk, row_in_chunk = divmod(row, self._chunk_rows)
            return self._chunk(chunk, 0)[row_in_chunk]
        shard, row_in_shard = divmod(row, self._shard_rows)
        chunk, row_in_chunk = divmod(row_in_shard, self._chunk_rows)
        return self._chunk(shard, int(self._index(shard)[chunk, 0]))[row_in_chunk]

    @functools.cache  # noqa: B019 - lives as long as the run
    def _bytes(self, number: int) -> np.ndarray:
        file = self._path / chunk_file(self._name, number, len(self.shape))
        return np.memmap(file, mode="r", dtype=np.uint8)

    def _chunk(self, number: int, offset: int) -> np.ndarray:
        shape = (self._chunk_rows, *self.shape[1:])
        return np.ndarray(shape, self._dtype, self._bytes(number), offset)

    @functools.cache  # noqa: B019
    def _index(self, shard: int) -> np.ndarray:
        return shard_index(self._bytes(shard), self._shard_rows // self._chunk_rows)
