"""The images of data/pairs: Parquet shards, written by `prepare` and read by later stages.

A sample lies in the shard that the hash of its sample_id names: a new, edited or removed image
changes one shard, and the others keep their bytes. The number of shards is a power of two, so that
only doubling the data set moves samples between shards. Beside them lies the hash of what they list,
so that a shard of another run is told from the one that belongs there; each image has a hash of its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import json
import re
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from stages.lib.core.files import read_json, write_json
from stages.lib.core.sums import remedy
from stages.lib.data.pairs import open_table, read_group, unit_hash
from stages.lib.frame.errors import StageError

INDEX = "__index.json"  # readers of a folder of Parquet files pass over such names
MAX_SHARDS = 64
SAMPLES_PER_SHARD = 64
ROW_GROUP_BYTES = 2**20
_SHARD_NAME = re.compile(r"images-(\d{5})-of-(\d{5})\.parquet")
_IMAGE_FEATURES = {
    "sample_id": {"dtype": "string", "_type": "Value"},
    "image": {"_type": "Image"},
    "image_sha256": {"dtype": "string", "_type": "Value"},
    "width": {"dtype": "int32", "_type": "Value"},
    "height": {"dtype": "int32", "_type": "Value"},
}
IMAGE_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
        ("image_sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
    ],
    # `datasets.load_dataset("parquet", ...)` reads its feature types from here and decodes `image`.
    metadata={"huggingface": json.dumps({"info": {"features": _IMAGE_FEATURES}})},
)


class StoredImage(NamedTuple):
    """An encoded image, the size of its upright picture in pixels, and the hash of its bytes if known."""

    data: bytes
    width: int
    height: int
    image_sha256: str | None = None


class ImageEntry(NamedTuple):
    """What is known of a stored image without reading it: name, hash of its bytes, size in pixels."""

    sample_id: str
    image_sha256: str
    width: int
    height: int


def write_images(
    directory: Path, sample_ids: Sequence[str], load: Callable[[list[str]], Iterable[StoredImage | None]]
) -> list[ImageEntry]:
    """Write the shards, and the hash of what they list; memory stays within a row group a shard.

    Args:
        directory: exists and is empty.
        sample_ids: unique.
        load: yields the image of each sample_id it is given, in order; None leaves it out. It is given all of
            them at once, sorted, so that a source can be read from its start to its end.

    Returns:
        What was written, sorted by sample_id.
    """
    order = sorted(sample_ids)
    paths = _shard_paths(directory, _num_shards(len(order)))
    with contextlib.ExitStack() as open_files:
        shards = [_Shard(open_files, path) for path in paths]
        for sample_id, image in zip(order, load(order), strict=True):
            if image is not None:
                shards[_shard_of(sample_id, len(shards))].add(sample_id, image)
        for shard in shards:
            shard.flush()
    written = [entry for shard in shards for entry in shard.written]
    write_json(directory / INDEX, {"images_sha256": fingerprint_of_images(written)})
    return sorted(written)


def fingerprint_of_images(entries: Sequence[ImageEntry]) -> str:
    """Hash of all names, contents and sizes."""
    return hashlib.sha256(json.dumps([list(entry) for entry in sorted(entries)]).encode()).hexdigest()


def image_index(directory: Path) -> list[ImageEntry]:
    """What there is, sorted by sample_id; no image is read.

    Raises:
        StageError: if a shard is missing, damaged, of another schema or of another run.
    """
    columns = list(ImageEntry._fields)
    entries: list[ImageEntry] = []
    for path in _found_shards(directory):
        table = read_group(open_table(path, IMAGE_SCHEMA), path, None, columns)
        entries += map(ImageEntry, *(table[column].to_pylist() for column in columns))
    recorded = read_json(directory / INDEX, remedy("prepare")).get("images_sha256")
    if recorded != fingerprint_of_images(entries):
        raise StageError(
            f"{directory}: expected the images whose hash {INDEX} holds, got {len(entries)}, some of them "
            f"others: a shard is damaged, or of another run; {remedy('prepare')}"
        )
    return sorted(entries)


def bind_masks(masks: Path, images: str) -> None:
    """Note beside the shards of masks which images they belong to, by `fingerprint_of_images`."""
    write_json(masks / INDEX, {**read_json(masks / INDEX, remedy("prepare")), "of_images_sha256": images})


def masks_of_images(masks: Path, images: Path) -> list[ImageEntry]:
    """The masks that there are, sorted by sample_id.

    Raises:
        StageError: as `image_index`, or if they belong to other images.
    """
    found, of_images = image_index(masks), fingerprint_of_images(image_index(images))
    if read_json(masks / INDEX, remedy("prepare")).get("of_images_sha256") != of_images:
        raise StageError(
            f"{masks}: expected the masks of the images in {images}, got those of others; {remedy('prepare')}"
        )
    return found


def iter_images(directory: Path, wanted: Container[str] | None = None) -> Iterator[tuple[str, bytes]]:
    """Yield (sample_id, encoded image) sorted by sample_id, a row group a shard in memory.

    Args:
        directory: of the shards.
        wanted: sample_ids; None for all. Row groups without any of them are not read.

    Raises:
        StageError: if a shard is missing, damaged or of another schema.
    """
    shards = [_shard_rows(path, wanted) for path in _found_shards(directory)]
    yield from heapq.merge(*shards, key=lambda row: row[0])


def scan_images(directory: Path, wanted: Container[str] | None = None) -> Iterator[tuple[str, bytes]]:
    """As `iter_images`, but shard by shard: one row group is in memory, whatever the data set's size."""
    for path in _found_shards(directory):
        yield from _shard_rows(path, wanted)


def read_images(directory: Path, sample_ids: Iterable[str]) -> dict[str, bytes]:
    """The encoded images of a few samples, in the order asked for.

    Raises:
        StageError: if there is no such sample, or a shard is missing, damaged or of another schema.
    """
    order = list(sample_ids)
    paths = _found_shards(directory)
    wanted: dict[Path, set[str]] = defaultdict(set)
    for sample_id in order:
        wanted[paths[_shard_of(sample_id, len(paths))]].add(sample_id)
    found = dict(row for path, members in wanted.items() for row in _shard_rows(path, members))
    if missing := [sample_id for sample_id in order if sample_id not in found]:
        raise StageError(
            f"{directory}: expected the image of {missing[0]!r}, found none ({len(missing)} missing); "
            "run `dvc repro prepare`"
        )
    return {sample_id: found[sample_id] for sample_id in order}


def _num_shards(num_samples: int) -> int:
    num_shards = 1
    while num_shards < MAX_SHARDS and num_shards * SAMPLES_PER_SHARD < num_samples:
        num_shards *= 2
    return num_shards


def _shard_of(sample_id: str, num_shards: int) -> int:
    return int(unit_hash("shard", sample_id) * num_shards)


def _shard_paths(directory: Path, num_shards: int) -> list[Path]:
    return [directory / f"images-{index:05d}-of-{num_shards:05d}.parquet" for index in range(num_shards)]


class _Shard:
    """A shard as it is written: rows wait until they fill a row group."""

    def __init__(self, open_files: contextlib.ExitStack, path: Path) -> None:
        self.written: list[ImageEntry] = []
        self._rows: list[dict[str, Any]] = []
        self._num_bytes = 0
        self._writer = open_files.enter_context(
            pq.ParquetWriter(
                path,
                IMAGE_SCHEMA,
                compression="none",
                use_dictionary=False,
                write_statistics=["sample_id"],
                write_page_checksum=True,
            )
        )

    def add(self, sample_id: str, image: StoredImage) -> None:
        digest = image.image_sha256 or hashlib.sha256(image.data).hexdigest()
        entry = ImageEntry(sample_id, digest, image.width, image.height)
        self.written.append(entry)
        self._rows.append({**entry._asdict(), "image": {"bytes": image.data, "path": sample_id}})
        self._num_bytes += len(image.data)
        if self._num_bytes >= ROW_GROUP_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.Table.from_pylist(self._rows, schema=IMAGE_SCHEMA))
        self._rows, self._num_bytes = [], 0


def _found_shards(directory: Path) -> list[Path]:
    """All shards of the directory in their order, none missing."""
    remedy = "run `dvc repro prepare`"
    names = sorted(path.name for path in directory.glob("*.parquet"))
    matches = [_SHARD_NAME.fullmatch(name) for name in names]
    if not names or not all(matches):
        raise StageError(
            f"{directory}: expected shards named images-00000-of-00001.parquet and so on, "
            f"found {', '.join(names[:3]) or 'none'}; {remedy}"
        )
    expected = _shard_paths(directory, int(next(match[2] for match in matches if match)))
    if names != [path.name for path in expected]:
        odd = sorted({path.name for path in expected} ^ set(names))
        raise StageError(
            f"{directory}: expected {len(expected)} shards, found {len(names)}; missing or from another "
            f"run: {', '.join(odd[:3])}; {remedy}"
        )
    return expected


def _shard_rows(path: Path, wanted: Container[str] | None) -> Iterator[tuple[str, bytes]]:
    file = open_table(path, IMAGE_SCHEMA)
    for group in range(file.num_row_groups):
        names = read_group(file, path, group, ["sample_id"])["sample_id"].to_pylist()
        chosen = [index for index, name in enumerate(names) if wanted is None or name in wanted]
        if not chosen:
            continue
        table = read_group(file, path, group, ["image", "image_sha256"])
        if table.num_rows != len(names):
            raise StageError(f"{path}: columns of different lengths; {remedy('prepare')}")
        for index in chosen:
            content = table["image"][index]["bytes"].as_py()
            if content is None or hashlib.sha256(content).hexdigest() != table["image_sha256"][index].as_py():
                raise StageError(f"{path}: image {names[index]!r} is damaged; {remedy('prepare')}")
            yield names[index], content
