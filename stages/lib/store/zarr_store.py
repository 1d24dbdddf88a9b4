"""Zarr stores under data/: the schema is written first, the data is checked against it, then `complete`.

Zarr reads a missing chunk as zeros, silently, and a chunk of another run without a word. A store is
therefore usable only with ``complete: true``. In the same write the root's attributes get ``files``,
the hash of every other file, and ``fingerprint``, the hash of those attributes themselves; both are
verified on opening.

`python -m stages.show_store data/latents.zarr` prints what a store holds and whether it is whole.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.codecs import Crc32cCodec

from stages.lib.core.sums import differences, hash_files, remedy
from stages.lib.frame.errors import StageError, some
from stages.lib.store.shards import chunk_file, chunk_files, chunks_and_shards, num_files, rows_per_file

# A chunk of zeros must be a file too, or a lost one could not be told from it.
zarr.config.set({"array.write_empty_chunks": True})


@dataclass(frozen=True)
class ArraySpec:
    """Shape, dtype and dimension names of an array; the first dimension is the row."""

    shape: tuple[int, ...]
    dtype: Any
    dimensions: tuple[str, ...]


def create_store(path: Path, arrays: Mapping[str, ArraySpec], attributes: Mapping[str, Any]) -> zarr.Group:
    """A new store with its whole schema and no data; what lay at ``path`` is removed.

    Args:
        path: of the store.
        arrays: by name; "512x768/mean" lies in a group of its own, "mean" at the root.
        attributes: of the root, JSON values.

    Raises:
        StageError: for an array without rows.
    """
    if path.exists():
        shutil.rmtree(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    group = zarr.create_group(path, zarr_format=3, attributes={**attributes, "complete": False})
    for name, spec in arrays.items():
        if not spec.shape[0]:
            raise StageError(f"{path}/{name}: expected one row or more, got none")
        chunks, shards = chunks_and_shards(spec.shape)
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
    """Fill the arrays of a group from an iterable of rows, a file at a time: memory stays bounded.

    Raises:
        StageError: if the rows, or their number, are not those of the schema.
    """
    start, size, pending = 0, 0, []
    names: list[str] = []
    for row in rows:
        names = names or list(row)
        size = size or rows_per_file(_array(group, names[0]))
        pending.append(row)
        if len(pending) == size:
            start = _flush(group, start, pending)
            pending = []
    if pending:
        start = _flush(group, start, pending)
    for name in names:  # the rest of the last chunk would read as zeros
        expected = _array(group, name).shape[0]
        if start != expected:
            path = str(group.store_path).removeprefix("file://")
            raise StageError(
                f"{path}/{name}: expected {expected} rows, got {start}; the stage's inputs changed while "
                "it ran, or its code is wrong: run it again"
            )


def finish_store(path: Path, group: zarr.Group) -> None:
    """Remove what a kill left, count the chunk files, and mark the store complete.

    Raises:
        StageError: if rows were not written.
    """
    for partial in path.rglob("*.partial"):
        partial.unlink()
    for name, array in arrays_of(group):
        expected, found = num_files(array), len(chunk_files(path, name))
        if found != expected:
            raise StageError(f"{path}/{name}: expected {expected} chunk files, found {found}; write all rows")
    document = json.loads((path / "zarr.json").read_bytes())
    document["attributes"] |= {"complete": True, "files": _file_hashes(path)}
    attributes = {**document["attributes"], "fingerprint": _fingerprint(document)}
    group.update_attributes(attributes)  # one rename: complete with its fingerprint, or not complete


def open_store(path: Path, stage: str) -> zarr.Group:
    """Open a store after every file of it was verified; ``attrs["fingerprint"]`` is that of its content.

    Args:
        path: of the store.
        stage: that makes it, named in errors.

    Raises:
        StageError: if it is absent, incomplete or damaged, naming the files.
    """
    if not (path / "zarr.json").is_file():
        raise StageError(f"{path}: expected a Zarr store, found none; run `dvc repro {stage}`")
    try:
        document = json.loads((path / "zarr.json").read_bytes())
        attributes = document["attributes"]
        recorded = attributes.get("fingerprint")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise StageError(f"{path}/zarr.json: damaged ({error!r}); {remedy(stage)}") from error
    if recorded is None:
        raise StageError(f"{path}: not complete, its stage was stopped; {remedy(stage)}")
    if recorded != _fingerprint(document):
        raise StageError(f"{path}/zarr.json: changed since it was written; {remedy(stage)}")
    if problems := differences(attributes["files"], _file_hashes(path)):
        raise StageError(f"{path}: damaged, {'; '.join(problems)}; {remedy(stage)}")
    return zarr.open_group(path, mode="r")


def verify_store(path: Path, stage: str) -> zarr.Group:
    """Open a store and read all of it, a file at a time: what a stage does with a store it has made.

    Args:
        path: of the store.
        stage: that makes it, named in errors.

    Raises:
        StageError: as `open_store`, and if a checksum fails, if the arrays of a group have different
            numbers of rows, or if a value is not finite, naming array and rows.
    """
    group = open_store(path, stage)
    rows_of: dict[str, int] = {}
    for name, array in arrays_of(group):
        rows = rows_of.setdefault(name.rpartition("/")[0], array.shape[0])
        if array.shape[0] != rows:
            raise StageError(f"{path}/{name}: {array.shape[0]} rows, other arrays beside it have {rows}")
        for index, block in enumerate(iter_array(path, group, name, stage)):
            if bad := _non_finite_rows(block):
                rows_shown = some([str(index * rows_per_file(array) + row) for row in bad])
                raise StageError(f"{path}/{name}: non-finite values in rows {rows_shown}; {remedy(stage)}")
    return group


def read_array(path: Path, group: zarr.Group, name: str, stage: str) -> np.ndarray:
    """A whole array; a checksum that fails becomes a StageError naming the store."""
    try:
        return np.asarray(_array(group, name)[:])
    except (ValueError, OSError, KeyError) as error:
        raise StageError(f"{path}/{name}: damaged or missing ({error}); {remedy(stage)}") from error


def iter_array(path: Path, group: zarr.Group, name: str, stage: str) -> Iterator[np.ndarray]:
    """An array in blocks of the rows of one file each, in order: memory stays bounded.

    Raises:
        StageError: if a checksum fails, naming the file.
    """
    array = _array(group, name)
    size = rows_per_file(array)
    for start in range(0, array.shape[0], size):
        try:
            yield np.asarray(array[start : start + size])
        except (ValueError, OSError) as error:
            file = chunk_file(name, start // size, array.ndim)
            raise StageError(f"{path}/{file.as_posix()}: damaged ({error}); {remedy(stage)}") from error


def store_bytes(path: Path) -> int:
    """Bytes of all files of a store; 0 where there is none."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def attributes_of(group: zarr.Group) -> dict[str, Any]:
    """The attributes of a store's root: JSON values, whose types its stage knows."""
    return dict(group.attrs)


def subgroup(group: zarr.Group, name: str) -> zarr.Group:
    """The group of a name, "512x768"; with "" the group itself."""
    found = group[name] if name else group
    if not isinstance(found, zarr.Group):
        raise KeyError(name)
    return found


def _array(group: zarr.Group, name: str) -> zarr.Array[Any]:
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise KeyError(name)
    return array


def arrays_of(group: zarr.Group) -> list[tuple[str, zarr.Array[Any]]]:
    """Every array below ``group``, by its name in it, "mean" or "512x768/mean"."""
    members = sorted(group.members(max_depth=None), key=lambda member: member[0])
    return [(name, node) for name, node in members if isinstance(node, zarr.Array)]


def _non_finite_rows(block: np.ndarray) -> list[int]:
    if block.dtype.kind != "f":
        return []
    finite = np.isfinite(block).all(axis=tuple(range(1, block.ndim)))
    return np.flatnonzero(~finite).tolist()


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


def _file_hashes(path: Path) -> dict[str, str]:
    """Path in the store -> SHA-256 of every file but the root's zarr.json, which records them."""
    files = sorted(file for file in path.rglob("*") if file.is_file() and file != path / "zarr.json")
    return {file.relative_to(path).as_posix(): digest for file, digest in hash_files(files).items()}


def _fingerprint(document: Mapping[str, Any]) -> str:
    """Hash of the root's zarr.json without the fingerprint itself; through ``files`` of the whole store."""
    attributes = {name: value for name, value in document["attributes"].items() if name != "fingerprint"}
    content = json.dumps({**document, "attributes": attributes}, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()
