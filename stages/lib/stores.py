"""Zarr stores under data/: the schema is written first, the data is checked against it, then `complete`.

Zarr reads a missing chunk as zeros, silently. A store is therefore usable only with
``complete: true``, set after every chunk file was counted, and it is counted again on opening.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from stages.lib.errors import StageError

# A chunk of zeros must be a file too, or a lost one could not be told from it.
zarr.config.set({"array.write_empty_chunks": True})

CHUNK_ROWS = 64
UNSHARDED_ROWS = 10_000
SHARD_ROWS, SHARD_CHUNK_ROWS = 512, 8


@dataclass(frozen=True)
class ArraySpec:
    """Shape, dtype and dimension names of an array; the first dimension is the row."""

    shape: tuple[int, ...]
    dtype: Any
    dimensions: tuple[str, ...]


def create_store(path: Path, arrays: Mapping[str, ArraySpec], attributes: Mapping[str, Any]) -> zarr.Group:
    """A new store with its whole schema and no data; what lay at ``path`` is removed."""
    if path.exists():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    group = zarr.create_group(path, zarr_format=3, attributes={**attributes, "complete": False})
    for name, spec in arrays.items():
        rows = spec.shape[0]
        chunks, shards = (max(1, min(CHUNK_ROWS, rows)), *spec.shape[1:]), None
        if rows > UNSHARDED_ROWS:
            chunks, shards = (SHARD_CHUNK_ROWS, *spec.shape[1:]), (SHARD_ROWS, *spec.shape[1:])
        group.create_array(
            name,
            shape=spec.shape,
            dtype=spec.dtype,
            chunks=chunks,
            shards=shards,
            compressors=[Crc32cCodec()],
            dimension_names=spec.dimensions,
        )
    return group


def write_rows(group: zarr.Group, rows: Iterable[Mapping[str, np.ndarray]]) -> None:
    """Fill arrays from an iterable of rows, a file at a time: memory stays bounded."""
    start, pending = 0, []
    size = None
    for row in rows:
        size = size or _file_rows(_array(group, next(iter(row))))
        pending.append(row)
        if len(pending) == size:
            start = _flush(group, start, pending)
            pending = []
    if pending:
        _flush(group, start, pending)


def finish_store(path: Path, group: zarr.Group) -> None:
    """Remove what a kill left, count the chunk files, and mark the store complete."""
    for partial in path.rglob("*.partial"):
        partial.unlink()
    _check_files(path, group, "write it")
    group.attrs["complete"] = True


def open_store(path: Path, stage: str) -> zarr.Group:
    """Open a complete store.

    Args:
        path: of the store.
        stage: that makes it, named in errors.

    Raises:
        StageError: if it is absent, incomplete or lacks a file.
    """
    remedy = f"run `dvc repro {stage}`"
    try:
        group = zarr.open_group(path, mode="r")
    except (FileNotFoundError, OSError, ValueError) as error:
        raise StageError(f"{path}: expected a Zarr store, found none ({error}); {remedy}") from error
    if group.attrs.get("complete") is not True:
        raise StageError(f"{path}: not complete, its stage was stopped; {remedy}")
    _check_files(path, group, remedy)
    return group


def read_array(path: Path, group: zarr.Group, name: str, stage: str) -> np.ndarray:
    """A whole array; a checksum that fails becomes a StageError naming the store."""
    try:
        return np.asarray(_array(group, name)[:])
    except (ValueError, OSError, KeyError) as error:
        raise StageError(
            f"{path}/{name}: damaged or missing ({error}); run `dvc repro -f {stage}`"
        ) from error


def _array(group: zarr.Group, name: str) -> zarr.Array:
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise KeyError(name)
    return array


def _file_rows(array: zarr.Array) -> int:
    return (array.shards or array.chunks)[0]


def _flush(group: zarr.Group, start: int, pending: list[Mapping[str, np.ndarray]]) -> int:
    stop = start + len(pending)
    for name in pending[0]:
        array = _array(group, name)
        block = np.stack([row[name] for row in pending])
        if block.shape[1:] != array.shape[1:] or block.dtype != array.dtype:
            expected, got = (array.shape[1:], array.dtype), (block.shape[1:], block.dtype)
            raise StageError(f"{name}: rows {start} to {stop} are {got}, the store's schema is {expected}")
        array[start:stop] = block
    return stop


def _check_files(path: Path, group: zarr.Group, remedy: str) -> None:
    for name, array in sorted(group.arrays()):
        files = sum(1 for file in (path / name / "c").rglob("*") if file.is_file())
        expected = math.ceil(array.shape[0] / _file_rows(array))
        if files != expected:
            raise StageError(f"{path}/{name}: expected {expected} chunk files, found {files}; {remedy}")


def content_fingerprint(path: Path) -> str:
    """Hash of a store's files: equal for equal content, whenever and wherever it was made."""
    digest = hashlib.sha256()
    for file in sorted(entry for entry in path.rglob("*") if entry.is_file()):
        digest.update(file.relative_to(path).as_posix().encode() + b"\0")
        with open(file, "rb") as handle:
            digest.update(hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()
