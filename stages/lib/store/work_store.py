"""The work store: finished rows of the encoders, each under the key of everything that made it.

Rows lie in block files, ``<root>/<stage>/<recipe>/<hash of the block's keys>.safetensors``. The
recipe names what is common to all rows (weights, preprocessing, dtype, libraries); a row's key is
the hash of its input. A block appears by rename after fsync, so it is whole or absent, and each of
its rows carries a checksum, so that a damaged one is encoded again and never read.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from stages.lib.core.files import remove_partials, write_atomically
from stages.lib.core.fingerprints import fingerprint
from stages.lib.frame.errors import StageError
from stages.lib.frame.work_directory import RECIPE, Room, mark_used, use
from stages.lib.store.blocks import Block, Row, check_alike, describe_rows

logger = logging.getLogger(__name__)
NUM_OPEN_BLOCKS = 32


class WorkStore:
    """Rows of one recipe. Its directory is in use, and so never trimmed, while this object lives.

    Several processes may put rows into one directory at once; a key may then lie in two blocks.

    Args:
        root: the work directory.
        stage: that encodes these rows.
        recipe: everything common to all rows that determines their bytes.
    """

    def __init__(self, root: Path, stage: str, recipe: dict[str, Any]) -> None:
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
        check_alike(keys, rows)
        columns = {name: np.ascontiguousarray(np.stack([row[name] for row in rows])) for name in rows[0]}
        # One entry: the library writes several in the order of a hash map, another in each process.
        content = safetensors.numpy.save(columns, {"rows": describe_rows(self.directory.name, keys, rows)})
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


def _discard(path: Path, error: Exception) -> None:
    """Remove a block that was read and found wrong; one that could not be read is left where it is."""
    logger.warning("%s: damaged or gone, its rows are encoded again (%s)", path, error)
    if isinstance(error, ValueError):
        path.unlink(missing_ok=True)
