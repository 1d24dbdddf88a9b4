"""Where pairs come from: OpenMoji, or a folder (or an archive of one) of images with captions.

A folder is read by what it holds, in this order:

- ``openmoji.json``: the artwork of the installed package it names;
- ``data.csv`` at its top: columns ``image_path`` and ``caption``;
- ``metadata.csv``, ``.jsonl`` or ``.parquet`` at any depth (the imagefolder of Hugging Face
  `datasets`): column ``file_name``, relative to the metadata file, and a caption column;
- otherwise every image with a caption file beside it, ``cat.png`` with ``cat.txt``.

Names that start with ``.`` and ``__MACOSX`` are no part of a folder.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import posixpath
from collections.abc import Iterator
from pathlib import Path

from stages.lib.data.archives import extract, is_archive
from stages.lib.data.listing import Listing, PairSource
from stages.lib.data.openmoji import DESCRIPTOR, read_openmoji
from stages.lib.data.sidecars import read_sidecars
from stages.lib.data.tables import METADATA_NAMES, read_table
from stages.lib.frame.errors import StageError
from stages.lib.frame.work_directory import extraction


@contextlib.contextmanager
def open_source(path: Path, caption_column: str, render_resolution: int) -> Iterator[PairSource]:
    """The source at ``path``, usable inside the `with` block.

    Args:
        path: a folder or an archive of one. An archive may hold everything in one top-level folder; it is
            unpacked in the work directory until the end of the block.
        caption_column: of the metadata files.
        render_resolution: pixels, side of the OpenMoji renders.

    Raises:
        StageError: if there is nothing readable at ``path``.
    """
    if path.is_dir():
        yield read_folder(path, caption_column, render_resolution)
        return
    if not path.is_file() or not is_archive(path):
        found = "another kind of file" if path.exists() else "nothing there"
        raise StageError(
            f"prepare.source {path}: expected a folder or a .tar, .tar.gz or .zip archive, found {found}"
        )
    with extraction() as directory:
        extract(path, directory)
        yield read_folder(_single_folder(directory), caption_column, render_resolution, shown=path)


def read_folder(
    folder: Path, caption_column: str, render_resolution: int, shown: Path | None = None
) -> PairSource:
    """The source in a folder; errors call it ``shown``."""
    shown = shown or folder
    if (folder / DESCRIPTOR).is_file():
        return read_openmoji(folder / DESCRIPTOR, render_resolution)
    files = _files(folder)
    tables = [name for name in files if posixpath.basename(name) in METADATA_NAMES]
    if "data.csv" in files:
        tables = ["data.csv", *(name for name in tables if "/" not in name)]
    for name, rival in itertools.combinations(tables, 2):
        if posixpath.dirname(name) == posixpath.dirname(rival):
            raise StageError(f"{shown}: found both {name} and {rival}, expected one of them; keep one")
    listing = Listing(folder, set(files))
    if tables:
        for name in tables:
            read_table(listing, shown, name, caption_column)
    else:
        read_sidecars(listing, shown, files)
    return listing.source()


def _files(folder: Path) -> list[str]:
    """Paths of all files below the folder, relative to it, sorted."""
    found = []
    for directory, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _is_hidden(name)]
        found += [
            Path(directory, name).relative_to(folder).as_posix() for name in files if not _is_hidden(name)
        ]
    return sorted(found)


def _single_folder(folder: Path) -> Path:
    """The one top-level folder of an unpacked archive, or the archive's own top."""
    entries = [path for path in sorted(folder.iterdir()) if not _is_hidden(path.name)]
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else folder


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
