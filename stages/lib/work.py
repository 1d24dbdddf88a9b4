"""The work store: finished rows of the encoders, each under the key of everything that made it.

Rows lie in block files, ``<root>/<stage>/<recipe>/<hash of the block's keys>.safetensors``. The
recipe names what is common to all rows (weights, preprocessing, dtype, libraries); a row's key is
the hash of its input. A block appears by rename after fsync, so it is whole or absent, and its
payload carries a checksum, so that a damaged one is encoded again and never read.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy
import torch

logger = logging.getLogger(__name__)

Row = dict[str, np.ndarray]


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
    """Rows of one recipe.

    Args:
        root: the work directory.
        stage: that encodes these rows.
        recipe: everything common to all rows that determines their bytes.
    """

    def __init__(self, root: Path, stage: str, recipe: dict) -> None:
        self.directory = root / stage / fingerprint(recipe)[:20]
        self.directory.mkdir(parents=True, exist_ok=True)
        write_atomically(
            self.directory / "recipe.json", json.dumps(recipe, indent=2, sort_keys=True).encode()
        )
        remove_partials(self.directory)
        self._block_of: dict[str, Path] = {}
        for path in sorted(self.directory.glob("*.safetensors")):
            self._index(path)

    def __contains__(self, key: str) -> bool:
        return key in self._block_of

    def __len__(self) -> int:
        return len(self._block_of)

    def put(self, keys: Sequence[str], rows: Sequence[Row]) -> None:
        """Add rows as one block; durable when this returns."""
        columns = {name: np.ascontiguousarray(np.stack([row[name] for row in rows])) for name in rows[0]}
        metadata = {"keys": " ".join(keys), "checksum": _checksum(columns)}
        path = self.directory / f"{fingerprint(sorted(keys))[:32]}.safetensors"
        write_atomically(path, safetensors.numpy.save(columns, metadata))
        self._block_of.update(dict.fromkeys(keys, path))

    def damaged(self, keys: Iterable[str]) -> list[str]:
        """Verify the blocks that hold ``keys``; drop the damaged ones and return the keys lost."""
        wanted = set(keys)
        lost: list[str] = []
        for path in sorted({self._block_of[key] for key in wanted if key in self}):
            if self._load(path) is None:
                logger.warning("%s: damaged, its rows are encoded again", path)
                path.unlink(missing_ok=True)
                lost += [key for key, block in self._block_of.items() if block == path]
        for key in lost:
            del self._block_of[key]
        return [key for key in lost if key in wanted]

    def rows(self, keys: Sequence[str]) -> Iterator[Row]:
        """The rows of ``keys`` in their order; the blocks last used stay in memory."""
        recent: dict[Path, tuple[list[str], dict[str, np.ndarray]]] = {}
        for key in keys:
            path = self._block_of[key]
            if path not in recent:
                loaded = self._load(path)
                if loaded is None:
                    raise OSError(f"{path}: changed or damaged since it was verified")
                if len(recent) >= 64:
                    recent.pop(next(iter(recent)))
                recent[path] = loaded
            block_keys, columns = recent[path]
            index = block_keys.index(key)
            yield {name: column[index] for name, column in columns.items()}

    def _index(self, path: Path) -> None:
        try:
            with safetensors.safe_open(path, framework="np") as block:
                keys = (block.metadata() or {})["keys"].split()
        except (safetensors.SafetensorError, KeyError):
            logger.warning("%s: not a whole block, left out", path)
            path.unlink(missing_ok=True)
            return
        self._block_of.update(dict.fromkeys(keys, path))

    @staticmethod
    def _load(path: Path) -> tuple[list[str], dict[str, np.ndarray]] | None:
        try:
            with safetensors.safe_open(path, framework="np") as block:
                metadata = block.metadata() or {}
                columns = {name: block.get_tensor(name) for name in block.keys()}  # noqa: SIM118
        except (safetensors.SafetensorError, OSError):
            return None
        if metadata.get("checksum") != _checksum(columns):
            return None
        return metadata["keys"].split(), columns


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is whole or absent, and durable when this returns."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    partial.replace(path)


def remove_partials(directory: Path) -> None:
    """Remove what killed processes were writing; those alive keep theirs."""
    for partial in directory.glob("*.partial"):
        pid = partial.name.split(".")[-2]
        if not Path("/proc", pid).exists():
            partial.unlink(missing_ok=True)


def _checksum(columns: dict[str, np.ndarray]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(columns):
        digest.update(f"{name} {columns[name].dtype} {columns[name].shape};".encode())
        digest.update(columns[name].tobytes())
    return digest.hexdigest()
