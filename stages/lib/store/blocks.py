"""Block files of the work store: some finished rows, each with a checksum."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from stages.lib.core.tensors import read_header

Row = dict[str, np.ndarray]
RECIPE_ENTRY = "recipe"  # in the place of a key, which is a hash
_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4",
    "U64": "<u8", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8",
}  # fmt: skip


class Block:
    """An open block file: its keys, and its rows read one at a time.

    It lies in the directory of its recipe, whose name it holds: a block of another is none of this one.

    Raises:
        ValueError: if the file, or a row, is not as it was put.
    """

    def __init__(self, path: Path) -> None:
        self._recipe = path.parent.name
        self._file: IO[bytes] = open(path, "rb", buffering=0)  # noqa: SIM115
        try:
            self._read_header()
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            self.close()
            raise ValueError(f"header: {error}") from error

    def _read_header(self) -> None:
        header = read_header(self._file, os.fstat(self._file.fileno()).st_size)
        entries = [entry.rsplit(":", 1) for entry in header.metadata["rows"].split()]
        if entries and entries[0][0] == RECIPE_ENTRY and entries.pop(0)[1] != self._recipe:
            raise ValueError("rows of another recipe")
        self._checksums = [checksum for _, checksum in entries]
        self._index_of = {key: index for index, (key, _) in enumerate(entries)}
        self._columns: dict[str, tuple[np.dtype, tuple[int, ...], int, int]] = {}
        for name, column in header.tensors.items():
            dtype = np.dtype(_DTYPES[column.dtype])
            if column.shape[0] != len(entries):
                raise ValueError(f"column {name} is not whole")
            num_bytes = column.num_bytes // len(entries)
            self._columns[name] = dtype, column.shape[1:], num_bytes, column.start

    @property
    def keys(self) -> list[str]:
        """In the order they were put."""
        return list(self._index_of)

    def row(self, key: str) -> Row:
        """The row of ``key``, checked."""
        index = self._index_of.get(key)
        if index is None:
            raise ValueError(f"no row {key}")
        row = {}
        for name, (dtype, shape, num_bytes, start) in self._columns.items():
            content = self._read(num_bytes, start + index * num_bytes)
            row[name] = np.frombuffer(content, dtype).reshape(shape)
        if checksum(key, row) != self._checksums[index]:
            raise ValueError(f"checksum of row {key}")
        return row

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Block:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, num_bytes: int, start: int) -> bytearray:
        content = bytearray(num_bytes)
        if os.preadv(self._file.fileno(), [content], start) != num_bytes:
            raise ValueError("truncated")
        return content


def describe_rows(recipe: str, keys: Sequence[str], rows: Sequence[Row]) -> str:
    """What a block says of itself: the name of its recipe, and each key with the checksum of its row."""
    checksums = (f"{key}:{checksum(key, row)}" for key, row in zip(keys, rows, strict=True))
    return " ".join([f"{RECIPE_ENTRY}:{recipe}", *checksums])


def check_alike(keys: Sequence[str], rows: Sequence[Row]) -> None:
    expected = _layout(rows[0])
    for key, row in zip(keys, rows, strict=True):
        if _layout(row) != expected:
            raise ValueError(
                f"rows of one block must be alike: {keys[0]} is {expected}, {key} is {_layout(row)}"
            )


def _layout(row: Row) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (np.shape(value), np.asarray(value).dtype.str) for name, value in sorted(row.items())}


def checksum(key: str, row: Row) -> str:
    total = zlib.crc32(f"{key} {_layout(row)}".encode())
    for name in sorted(row):
        total = zlib.crc32(np.ascontiguousarray(row[name]).data, total)
    return f"{total:08x}"
