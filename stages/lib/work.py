"""The work store: finished rows of the encoders, each under the key of everything that made it.

Rows lie in block files, ``<root>/<stage>/<recipe>/<hash of the block's keys>.safetensors``. The
recipe names what is common to all rows (weights, preprocessing, dtype, libraries); a row's key is
the hash of its input. A block appears by rename after fsync, so it is whole or absent, and each of
its rows carries a checksum, so that a damaged one is encoded again and never read.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import logging
import math
import os
import platform
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import IO

import numpy as np
import safetensors.numpy
import torch

from stages.lib.errors import StageError
from stages.lib.work_directory import RECIPE, Room, mark_used, use

logger = logging.getLogger(__name__)

Row = dict[str, np.ndarray]

NUM_OPEN_BLOCKS = 32
_DAY = 24 * 60 * 60  # seconds
_DTYPES = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4",
    "U64": "<u8", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8",
}  # fmt: skip


def fingerprint(value: object) -> str:
    """Hash of a JSON-serialisable value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def environment(*packages: str) -> dict[str, str]:
    """What of this environment can change a row's bytes: package versions, processor, GPU."""
    found = {
        **{package: version(package) for package in ("torch", *packages)},
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        found["cuda"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def source_fingerprint(*functions: Callable[..., object]) -> str:
    """Hash of the source files that define ``functions``: the code that computes a row."""
    return hashlib.sha256(b"".join(Path(inspect.getfile(f)).read_bytes() for f in functions)).hexdigest()


class WorkStore:
    """Rows of one recipe. Its directory is in use, and so never trimmed, while this object lives.

    Several processes may put rows into one directory at once; a key may then lie in two blocks.

    Args:
        root: the work directory.
        stage: that encodes these rows.
        recipe: everything common to all rows that determines their bytes.
    """

    def __init__(self, root: Path, stage: str, recipe: dict) -> None:
        self.directory = root / stage / fingerprint(recipe)[:20]
        self._use = use(self.directory)
        self._room = Room(root)
        if not (self.directory / RECIPE).exists():
            content = json.dumps(recipe, indent=2, sort_keys=True)
            write_atomically(self.directory / RECIPE, content.encode())
        remove_partials(self.directory)
        self._block_of: dict[str, Path] = {}
        self._blocks: set[Path] = set()
        self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._block_of

    def __len__(self) -> int:
        return len(self._block_of)

    def refresh(self) -> None:
        """Take in the blocks that other processes put since, and forget those that are gone."""
        present = set(self.directory.glob("*.safetensors"))
        self._forget(self._blocks - present)
        for path in sorted(present - self._blocks):
            try:
                with Block(path) as block:
                    self._index(block.keys, path)
            except (OSError, ValueError) as error:
                _discard(path, error)

    def put(self, keys: Sequence[str], rows: Sequence[Row]) -> None:
        """Add rows as one block; durable when this returns.

        Args:
            keys: one a row, without blanks.
            rows: arrays or scalars, of the same names, shapes and dtypes in each.

        Raises:
            ValueError: if the rows differ in names, shapes or dtypes.
        """
        _check_alike(keys, rows)
        columns = {name: np.ascontiguousarray(np.stack([row[name] for row in rows])) for name in rows[0]}
        checksums = (f"{key}:{_checksum(key, row)}" for key, row in zip(keys, rows, strict=True))
        # One entry: the library writes several in the order of a hash map, another in each process.
        content = safetensors.numpy.save(columns, {"rows": " ".join(checksums)})
        path = self.directory / f"{fingerprint(sorted(keys))[:32]}.safetensors"
        self._room.make(len(content))
        write_atomically(path, content)
        mark_used(path)
        self._index(keys, path)

    def damaged(self, keys: Iterable[str]) -> list[str]:
        """Verify the blocks that hold ``keys``; drop the damaged ones and return the keys lost."""
        held = [key for key in dict.fromkeys(keys) if key in self]
        for path in sorted({self._block_of[key] for key in held}):
            try:
                with Block(path) as block:
                    for key in block.keys:
                        block.row(key)
                mark_used(path)
            except (OSError, ValueError) as error:
                _discard(path, error)
                self._forget({path})
        return [key for key in held if key not in self]

    def rows(self, keys: Iterable[str]) -> Iterator[Row]:
        """The rows of ``keys`` in their order, each read by itself, so that memory does not grow.

        Raises:
            StageError: if a block is gone or has changed since it was verified.
        """
        opened: dict[Path, Block] = {}  # the last used comes last
        marked: set[Path] = set()
        try:
            for key in keys:
                path = self._block_of[key]
                try:
                    opened[path] = opened.pop(path) if path in opened else Block(path)
                    row = opened[path].row(key)
                    if path not in marked:
                        mark_used(path)
                        marked.add(path)
                except (OSError, ValueError) as error:
                    raise StageError(
                        f"{path}: gone or changed since it was verified ({error}); run the stage again, "
                        "which encodes these rows anew"
                    ) from error
                if len(opened) > NUM_OPEN_BLOCKS:
                    opened.pop(next(iter(opened))).close()
                yield row
        finally:
            for block in opened.values():
                block.close()

    def _index(self, keys: Iterable[str], path: Path) -> None:
        self._blocks.add(path)
        for key in keys:
            self._block_of.setdefault(key, path)

    def _forget(self, paths: set[Path]) -> None:
        self._blocks -= paths
        if paths:
            self._block_of = {key: path for key, path in self._block_of.items() if path not in paths}


class Block:
    """An open block file: its keys, and its rows read one at a time.

    Raises:
        ValueError: if the file, or a row, is not as it was put.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = open(path, "rb", buffering=0)  # noqa: SIM115
        try:
            self._read_header()
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            self.close()
            raise ValueError(f"header: {error}") from error

    def _read_header(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        start = 8 + int.from_bytes(self._read(8, 0), "little")
        if start > size:
            raise ValueError("truncated")
        header = json.loads(self._read(start - 8, 8))
        entries = [entry.rsplit(":", 1) for entry in header.pop("__metadata__")["rows"].split()]
        self._checksums = [checksum for _, checksum in entries]
        self._index_of = {key: index for index, (key, _) in enumerate(entries)}
        self._columns: dict[str, tuple[np.dtype, tuple[int, ...], int, int]] = {}
        for name, column in header.items():
            dtype, shape = np.dtype(_DTYPES[column["dtype"]]), tuple(column["shape"][1:])
            num_bytes = dtype.itemsize * math.prod(shape)
            begin, end = column["data_offsets"]
            if end - begin != num_bytes * len(entries) or start + end > size:
                raise ValueError(f"column {name} is not whole")
            self._columns[name] = dtype, shape, num_bytes, start + begin

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
        if _checksum(key, row) != self._checksums[index]:
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


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which is there as a whole and durable at the end, and after an error not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}@{platform.node()}.partial")
    try:
        with open(partial, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)
        _sync_directory(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # writing to a full disk does not name it
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is whole or absent, and durable when this returns."""
    with open_atomically(path) as handle:
        handle.write(content)


def remove_partials(directory: Path) -> None:
    """Remove what killed processes were writing, and what another host began more than a day ago."""
    for partial in directory.glob("*.partial"):
        writer, _, host = partial.name.removesuffix(".partial").rpartition("@")
        with contextlib.suppress(FileNotFoundError):  # finished meanwhile
            if host == platform.node():
                abandoned = not _is_alive(int(writer.rpartition(".")[2]))
            else:
                abandoned = time.time() - partial.stat().st_mtime > _DAY
            if abandoned:
                partial.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(path: Path, error: Exception) -> None:
    """Remove a block that was read and found wrong; one that could not be read is left where it is."""
    logger.warning("%s: damaged or gone, its rows are encoded again (%s)", path, error)
    if isinstance(error, ValueError):
        path.unlink(missing_ok=True)


def _check_alike(keys: Sequence[str], rows: Sequence[Row]) -> None:
    expected = _layout(rows[0])
    for key, row in zip(keys, rows, strict=True):
        if _layout(row) != expected:
            raise ValueError(
                f"rows of one block must be alike: {keys[0]} is {expected}, {key} is {_layout(row)}"
            )


def _layout(row: Row) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (np.shape(value), np.asarray(value).dtype.str) for name, value in sorted(row.items())}


def _checksum(key: str, row: Row) -> str:
    total = zlib.crc32(f"{key} {_layout(row)}".encode())
    for name in sorted(row):
        total = zlib.crc32(np.ascontiguousarray(row[name]).data, total)
    return f"{total:08x}"
