"""The schema of data/pairs that every later stage knows: captions and splits. `image_shards` has the images.

Captions carry the hash of their rows, and of the images that they were prepared with.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from stages.lib.core.sums import remedy
from stages.lib.frame.errors import StageError

TRAIN, VALIDATION = "train", "validation"
CAPTION_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("split", pa.string()),
        ("repeats", pa.int32()),
    ]
)
MAX_DRAWS = 20_000_000  # an epoch; its permutation lies in memory, at about 80 bytes a draw
_ROWS, _IMAGES = b"rows_sha256", b"images_sha256"


@dataclass(frozen=True)
class SampleCaptions:
    """The captions of one sample, one or more, and its split: "train" or "validation".

    ``repeats``, 1 or more, is how often training draws it an epoch; a held-out sample counts once.
    """

    sample_id: str
    captions: tuple[str, ...]
    split: str
    repeats: int = 1


def split_of(image_sha256: str, split_seed: int, validation_fraction: float) -> str:
    """ "train" or "validation", a function of the arguments alone.

    New images move nobody, and copies of one image never stand on both sides, whatever their names.
    """
    return VALIDATION if unit_hash("split", split_seed, image_sha256) < validation_fraction else TRAIN


def write_captions(path: Path, samples: Iterable[SampleCaptions], images: str) -> None:
    """Write captions.parquet, sorted by sample_id.

    Args:
        path: of the file.
        samples: of both splits.
        images: hash of the images that they belong to, see `image_shards.fingerprint_of_images`.

    Raises:
        StageError: if ``repeats`` of a sample is not a whole number of 1 or more, or an epoch of all of them
            were longer than `MAX_DRAWS` for their repeats.
    """
    ordered = sorted(samples, key=lambda sample: sample.sample_id)
    _check_repeats(path, ordered)
    rows = [{**vars(sample), "captions": list(sample.captions)} for sample in ordered]
    schema = CAPTION_SCHEMA.with_metadata({_ROWS: _hash_of(ordered, images), _IMAGES: images})
    table = pa.Table.from_pylist(rows, schema=schema)
    pq.write_table(table, path, compression="zstd", compression_level=3, write_page_checksum=True)


def read_captions(path: Path) -> list[SampleCaptions]:
    """The samples of captions.parquet, sorted by sample_id.

    Raises:
        StageError: if the file is missing, damaged or of another schema.
    """
    return read_captions_and_images(path)[0]


def read_captions_and_images(path: Path) -> tuple[list[SampleCaptions], str]:
    """As `read_captions`, with the hash of the images that the file was written with."""
    file = open_table(path, CAPTION_SCHEMA)
    table = read_group(file, path, None, CAPTION_SCHEMA.names)
    metadata = file.schema_arrow.metadata or {}
    images = metadata.get(_IMAGES, b"").decode(errors="replace")
    try:
        samples = [
            SampleCaptions(row["sample_id"], tuple(row["captions"]), row["split"], row["repeats"])
            for row in sorted(table.to_pylist(), key=lambda row: row["sample_id"])
        ]
    except (TypeError, ValueError, KeyError) as error:  # of rows that are none of ours
        raise StageError(
            f"{path}: expected sample_id, captions, split and repeats, got {error!r}; {remedy('prepare')}"
        ) from error
    if metadata.get(_ROWS, b"").decode(errors="replace") != _hash_of(samples, images):
        raise StageError(
            f"{path}: expected the rows whose hash it carries, got {len(samples)} rows that are others; "
            f"{remedy('prepare')}"
        )
    _check_repeats(path, samples)
    return samples, images


def _check_repeats(path: Path, samples: Sequence[SampleCaptions]) -> None:
    for sample in samples:
        if type(sample.repeats) is not int or not 1 <= sample.repeats < 2**31:
            raise StageError(
                f"{path}: {sample.sample_id}: expected repeats of 1 or more, a whole number, got "
                f"{sample.repeats!r}; see repeats in prepare.sources, and run `dvc repro prepare`"
            )
    draws = sum(sample.repeats for sample in samples)
    if draws > max(MAX_DRAWS, len(samples)):
        most = max(samples, key=lambda sample: sample.repeats)
        raise StageError(
            f"{path}: expected an epoch of at most {MAX_DRAWS:,} draws, got {draws:,}, of {len(samples):,} "
            f"samples with up to {most.repeats:,} repeats ({most.sample_id}); lower repeats in "
            "prepare.sources, or the number that a folder's name begins with"
        )


def _hash_of(samples: Sequence[SampleCaptions], images: str) -> str:
    rows = [[sample.sample_id, *sample.captions, sample.split, sample.repeats] for sample in samples]
    return hashlib.sha256(json.dumps([rows, images]).encode()).hexdigest()


def unit_hash(*key: str | int) -> float:
    """A number in [0, 1) that depends on the key alone."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def open_table(path: Path, schema: pa.Schema) -> pq.ParquetFile:
    """A Parquet file of a schema.

    Raises:
        StageError: if it is missing, damaged, or of another schema.
    """
    try:
        file = pq.ParquetFile(path, page_checksum_verification=True)
        found = file.schema_arrow
    except FileNotFoundError as error:
        raise StageError(f"{path}: missing; run `dvc repro prepare`") from error
    except (OSError, ValueError, pa.ArrowException) as error:
        raise StageError(f"{path}: not a whole Parquet file ({error}); {remedy('prepare')}") from error
    if not found.equals(schema):
        raise StageError(
            f"{path}: expected the columns {_columns(schema)}, found {_columns(found)}; "
            "run `dvc repro prepare`"
        )
    return file


def read_group(file: pq.ParquetFile, path: Path, group: int | None, columns: list[str]) -> pa.Table:
    """Columns of a row group, of all of them with None.

    Raises:
        StageError: if a page is damaged.
    """
    try:
        return file.read(columns) if group is None else file.read_row_group(group, columns)
    except (OSError, ValueError, OverflowError, MemoryError, pa.ArrowException) as error:
        raise StageError(f"{path}: damaged ({error}); {remedy('prepare')}") from error


def _columns(schema: pa.Schema) -> str:
    return ", ".join(f"{field.name} {field.type}" for field in schema)
