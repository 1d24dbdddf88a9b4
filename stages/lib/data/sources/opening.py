"""Opens a source: OpenMoji, a folder, an archive or a table of images with captions, or several of these.

What a folder holds says how it is read, in this order:

- ``openmoji.json``: the artwork of the installed package it names;
- ``state.json`` and Arrow files: what `datasets` saves to disk, one split or several;
- ``data.csv`` at its top: columns ``image_path`` and ``caption``;
- ``metadata.csv``, ``.jsonl`` or ``.parquet`` at any depth (the imagefolder of Hugging Face
  `datasets`): column ``file_name``, relative to the metadata file, and a caption column;
- Parquet files or TFRecords with the images inside;
- otherwise every image, in folders or tars, with a caption file beside it, ``cat.png`` with ``cat.txt``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from stages.lib.data.openmoji import DESCRIPTOR, read_openmoji
from stages.lib.data.sources.archives import SUFFIXES, extract, is_archive, is_plain_tar
from stages.lib.data.sources.embedded import (
    ARROW,
    PARQUET,
    TFRECORD,
    read_embedded,
    saved_tables,
    tables_with_images,
)
from stages.lib.data.sources.files import Files, files_of_folder, files_of_tar, is_hidden
from stages.lib.data.sources.hints import near_misses
from stages.lib.data.sources.hub import open_hub_dataset
from stages.lib.data.sources.listing import Listing, PairSource, RejectedRow
from stages.lib.data.sources.sidecars import read_sidecars
from stages.lib.data.sources.splits import TRAIN, agreed_splits, split_named
from stages.lib.data.sources.tables import METADATA_NAMES, read_table
from stages.lib.frame.errors import StageError
from stages.lib.frame.work_directory import extraction

_EXPECTED = f"a folder, an archive ({' '.join(SUFFIXES)}), or a {PARQUET}, {ARROW} or {TFRECORD} file"


@dataclasses.dataclass(frozen=True)
class Reading:
    """How a source is read.

    Attributes:
        caption_column: of tables and of .json files.
        render_resolution: pixels, side of the OpenMoji renders.
        caption_prefix: text in front of every caption.
        repeats: how often each image is drawn an epoch.
    """

    caption_column: str
    render_resolution: int
    caption_prefix: str = ""
    repeats: int = 1


@contextlib.contextmanager
def open_source(path: Path, reading: Reading) -> Iterator[PairSource]:
    """The source at ``path``, usable inside the `with` block.

    Args:
        path: a folder, an archive of one, or a Parquet, Arrow or TFRecord file. An archive may hold
            everything in one top-level folder. A plain tar is read in place; what is compressed is unpacked
            in the work directory until the end of the block.
        reading: how.

    Raises:
        StageError: if there is nothing readable at ``path``.
    """
    with contextlib.ExitStack() as unpacked:
        yield _split_and_repeated(_read(path, reading, unpacked), reading)


@contextlib.contextmanager
def open_sources(readings: Mapping[str, Reading]) -> Iterator[PairSource]:
    """As `open_source`, of several paths as one; in front of each sample_id stands its source's path."""
    _check_apart(readings)
    with contextlib.ExitStack() as opened:
        sources = {
            posixpath.normpath(path).strip("/"): opened.enter_context(open_source(Path(path), reading))
            for path, reading in readings.items()
        }

        def source_of(sample_id: str) -> str:
            return next(path for path in sources if sample_id.startswith(f"{path}/"))

        def images(sample_ids: Sequence[str]) -> Iterator[bytes | OSError]:
            for path, group in itertools.groupby(sample_ids, source_of):
                yield from sources[path].images([name.removeprefix(f"{path}/") for name in group])

        def masks(sample_ids: Sequence[str]) -> Iterator[bytes | OSError]:
            for path, group in itertools.groupby(sample_ids, source_of):
                yield from sources[path].masks([name.removeprefix(f"{path}/") for name in group])

        rows = [
            dataclasses.replace(row, sample_id=f"{path}/{row.sample_id}")
            for path, source in sources.items()
            for row in source.rows
        ]
        rejected = [
            RejectedRow(f"{path}/{row.name}", row.reason)
            for path, source in sources.items()
            for row in source.rejected
        ]
        num_unlisted = sum(source.num_unlisted_files for source in sources.values())
        yield PairSource(
            sorted(rows, key=lambda row: row.sample_id), sorted(rejected), num_unlisted, images, masks
        )


def _check_apart(paths: Iterable[str]) -> None:
    """Raise StageError where one path is another, or lies inside it, links resolved."""
    places = [(path, Path(path).resolve()) for path in paths]
    for (path, place), (other, above) in itertools.permutations(places, 2):
        if place.is_relative_to(above):
            how = "is the same as" if place == above else "lies inside"
            raise StageError(
                f"prepare.sources: {path} {how} {other}, so that its images would count twice; keep one"
            )


def open_hub_source(hub_id: str, revision: str, subset: str | None, reading: Reading) -> PairSource:
    """A data set of the Hub at a commit; its splits are kept apart.

    Raises:
        StageError: as `open_hub_dataset`; if it has several splits and none to train on.
    """
    dataset = open_hub_dataset(hub_id, revision, subset)
    kinds = {name: split_named(name) for name in dataset.splits}
    if len(kinds) > 1 and TRAIN not in kinds.values():
        raise StageError(
            f"{hub_id}: expected a split {TRAIN!r} to train on, found "
            f"{', '.join(sorted(kinds))}; take another subset"
        )
    split_of_file = {file: kinds[name] for name, files in dataset.splits.items() for file in files}
    if len(dataset.caption_columns) == 1 and reading.caption_column not in dataset.caption_columns:
        reading = dataclasses.replace(reading, caption_column=dataset.caption_columns[0])
    shown = Path(f"{hub_id}@{revision[:8]}")
    files = files_of_folder(dataset.folder, shown, dataset.folder.parents[1], split_of_file)
    source = read_files(files, reading)
    rows = [
        dataclasses.replace(row, split=_split_of(row.sample_id, split_of_file) if len(kinds) > 1 else None)
        for row in source.rows
    ]
    return dataclasses.replace(source, rows=rows)


def _split_of(sample_id: str, split_of_file: Mapping[str, str]) -> str | None:
    """Of the file, or of the table or tar in which it lies."""
    places = itertools.accumulate(sample_id.split("/"), posixpath.join)
    return next((split_of_file[place] for place in places if place in split_of_file), None)


def _split_and_repeated(source: PairSource, reading: Reading) -> PairSource:
    rows = [
        row if reading.repeats == 1 else dataclasses.replace(row, repeats=row.repeats * reading.repeats)
        for row in agreed_splits(source.rows)
    ]
    return dataclasses.replace(source, rows=rows)


def _read(path: Path, reading: Reading, unpacked: contextlib.ExitStack) -> PairSource:
    if path.is_dir():
        return read_folder(path, reading)
    if not path.is_file():
        found = "another kind of file, such as a pipe" if path.exists() else "nothing there"
        raise StageError(f"prepare.source {path}: expected {_EXPECTED}, found {found}")
    if path.suffix.lower() in (PARQUET, ARROW, TFRECORD):
        files = Files(path.parent, path.parent, [path.name], {}, None)
        return read_embedded(files, [path.name], reading.caption_column, reading.caption_prefix)
    if not is_archive(path.name):
        raise StageError(f"prepare.source {path}: expected {_EXPECTED}, found another kind of file")
    if is_plain_tar(path):
        return read_files(files_of_tar(path), reading)
    directory = unpacked.enter_context(extraction())
    extract(path, directory)
    return read_files(files_of_folder(_single_folder(directory), shown=path), reading)


def read_folder(folder: Path, reading: Reading) -> PairSource:
    """The source in a folder."""
    if (folder / DESCRIPTOR).is_file():
        return read_openmoji(folder / DESCRIPTOR, reading.render_resolution)
    return read_files(files_of_folder(folder), reading)


def read_files(files: Files, reading: Reading) -> PairSource:
    """The source that some files make up."""
    if saved := saved_tables(files):
        return read_embedded(files, saved, reading.caption_column, reading.caption_prefix)
    if tables := _metadata(files):
        listing = Listing(files, reading.caption_prefix)
        for name in tables:
            read_table(listing, name, reading.caption_column)
        _check_found(listing, tables)
        return listing.source()
    for suffix in (PARQUET, TFRECORD):
        names = [name for name in files.names if name.lower().endswith(suffix)]
        if embedded := tables_with_images(files, names):
            return read_embedded(files, embedded, reading.caption_column, reading.caption_prefix)
    listing = Listing(files, reading.caption_prefix)
    read_sidecars(listing, reading.caption_column)
    return listing.source()


def _metadata(files: Files) -> list[str]:
    """The metadata files; ``data.csv`` at the top comes before all others."""
    names = {*files.names, *files.odd}
    tables = sorted(name for name in names if posixpath.basename(name) in METADATA_NAMES)
    if "data.csv" in names:
        tables = ["data.csv", *(name for name in tables if "/" not in name)]
    for name, rival in itertools.combinations(tables, 2):
        if posixpath.dirname(name) == posixpath.dirname(rival):
            raise StageError(f"{files.shown}: found both {name} and {rival}, expected one of them; keep one")
    for name in tables:
        if odd := files.odd.get(name):
            raise StageError(f"{files.shown}/{name}: expected a file, found {odd}; put the file itself there")
    return tables


def _check_found(listing: Listing, tables: Sequence[str]) -> None:
    """Say so where the images of a table are still packed."""
    packed = [name for name in listing.files.names if is_archive(name)]
    if packed and not listing.captions_of and listing.rejected:
        raise StageError(
            f"{listing.files.shown}/{tables[0]}: expected its images beside it, found none of "
            f"{len(listing.rejected)}{near_misses(packed)}"
        )


def _single_folder(folder: Path) -> Path:
    """The one top-level folder of an unpacked archive, or the archive's own top."""
    entries = [path for path in sorted(folder.iterdir()) if not is_hidden(path.name)]
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else folder
