"""Tables with the images inside: Parquet, the Arrow files of `datasets.Dataset.save_to_disk`, and TFRecords.

The captions are read first, they are small; the images later, batch by batch in the order of the rows, so
that memory does not grow with a file. A row is named by its file and its number in it.
"""

from __future__ import annotations

import itertools
import mmap
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from stages.lib.data.caption_text import UnusableCaptionError, usable_caption
from stages.lib.data.sources.files import Files
from stages.lib.data.sources.listing import PairSource, RejectedRow, SourceRow
from stages.lib.data.sources.names import as_text
from stages.lib.data.sources.splits import split_of_path
from stages.lib.data.sources.tables import CAPTION, TEXT
from stages.lib.data.sources.tfrecord import example, records
from stages.lib.frame.errors import StageError

PARQUET, ARROW, TFRECORD = ".parquet", ".arrow", ".tfrecord"
_BATCH_ROWS = 16  # images in memory at a time
_BUFFER_BYTES = 2**20  # read ahead of a column
_ROW_DIGITS = 8
_USUAL_NAMES = ("image", "jpg", "jpeg", "png", "webp", "img")
_TEXTS = ("txt", "text", "caption", "key", "url")  # of a TFRecord, which tells text from bytes by nothing


class Shard(Protocol):
    """One file of rows."""

    schema: pa.Schema

    def batches(self, column: str) -> Iterator[tuple[int, pa.Array]]:
        """(number of the first row, values) of a column, in order."""


class ParquetShard:
    """A Parquet file."""

    def __init__(self, path: str) -> None:
        self._file = pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
        self.schema: pa.Schema = self._file.schema_arrow

    def batches(self, column: str) -> Iterator[tuple[int, pa.Array]]:
        first = 0
        for batch in self._file.iter_batches(_BATCH_ROWS, columns=[column], use_threads=False):
            yield first, batch.column(0)
            first += batch.num_rows


class ArrowShard:
    """An Arrow file in the streaming format, as `datasets` writes it."""

    def __init__(self, path: str) -> None:
        self._map = pa.memory_map(path)
        self.schema: pa.Schema = pa.ipc.open_stream(self._map).schema

    def batches(self, column: str) -> Iterator[tuple[int, pa.Array]]:
        first = 0
        self._map.seek(0)
        for batch in pa.ipc.open_stream(self._map):
            yield first, batch.column(column)
            first += batch.num_rows


class TFRecordShard:
    """A TFRecord file of examples; features that hold bytes are columns of bytes, ``txt`` one of text."""

    def __init__(self, path: str) -> None:
        with open(path, "rb") as file:
            self._content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self._records = list(records(self._content))
        names = sorted(self._example(0)) if self._records else []
        self.schema = pa.schema([(name, pa.string() if name in _TEXTS else pa.binary()) for name in names])

    def batches(self, column: str) -> Iterator[tuple[int, pa.Array]]:
        for number in range(len(self._records)):
            value = next(iter(self._example(number).get(column, [])), None)
            yield number, pa.array([value], pa.binary()).cast(self.schema.field(column).type)

    def _example(self, number: int) -> dict[str, list[bytes]]:
        offset, size = self._records[number]
        return example(bytes(self._content[offset : offset + size]))


_SHARDS: dict[str, Callable[[str], Shard]] = {
    PARQUET: ParquetShard, ARROW: ArrowShard, TFRECORD: TFRecordShard
}  # fmt: skip


@dataclass(frozen=True)
class _Table:
    """A file of rows, its name in the source, and which of its columns count."""

    name: str
    shard: Shard
    image_column: str
    caption_column: str


def image_columns(schema: pa.Schema) -> list[str]:
    """Columns that hold image files: bytes, or the struct of bytes and a path that `datasets` writes."""
    return [field.name for field in schema if _holds_images(field.type)]


def text_columns(schema: pa.Schema) -> list[str]:
    """Columns of texts, or of lists of texts."""
    return [field.name for field in schema if _is_text(field.type) or _is_text_list(field.type)]


def tables_with_images(files: Files, names: Sequence[str]) -> list[str]:
    """Those of ``names`` that hold images; other Parquet files may lie beside images as descriptions."""
    return [name for name in names if image_columns(_open(files, name).schema)]


def read_embedded(files: Files, names: Sequence[str], caption_column: str, caption_prefix: str) -> PairSource:
    """The rows of tables with images inside.

    Args:
        files: of the source.
        names: of the tables, all of one kind.
        caption_column: of the captions; "caption" where there is none of that name.
        caption_prefix: text in front of every caption.

    Raises:
        StageError: if a table is damaged, or has no such columns.
    """
    tables = {as_text(name): _table(files, name, caption_column) for name in names}
    rows: list[SourceRow] = []
    rejected: list[RejectedRow] = []
    for name, table in tables.items():
        split = split_of_path(name)
        for sample_id, value in _captions(files, name, table):
            captions, reasons = _usable(value, caption_prefix)
            rejected += [RejectedRow(sample_id, reason) for reason in reasons]
            if captions:
                rows.append(SourceRow(sample_id, captions, split))

    def images(sample_ids: Sequence[str]) -> Iterator[bytes | OSError]:
        for name, group in itertools.groupby(sample_ids, posixpath.dirname):
            wanted = [int(posixpath.basename(sample_id)) for sample_id in group]
            yield from _images(files, tables[name], wanted)

    num_unlisted = len(set(files.names) - set(names))
    return PairSource(sorted(rows, key=lambda row: row.sample_id), sorted(rejected), num_unlisted, images)


def _usable(value: Any, prefix: str) -> tuple[tuple[str, ...], list[str]]:
    captions, reasons = [], []
    for each in value if isinstance(value, list) else [value]:
        try:
            captions.append(usable_caption(f"{prefix}{each}" if isinstance(each, str) else each))
        except UnusableCaptionError as error:
            reasons.append(str(error))
    return tuple(dict.fromkeys(captions)), reasons or ([] if captions else ["empty caption"])


def _open(files: Files, name: str) -> Shard:
    if not files.is_on_disk(name):
        raise StageError(
            f"{files.shown}/{as_text(name)}: a table inside a tar is not read; unpack it, or "
            "name it as the source"
        )
    try:
        return _SHARDS[posixpath.splitext(name)[1].lower()](str(files.root / name))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _damaged(files, name, error) from error


def _damaged(files: Files, name: str, error: Exception) -> StageError:
    first = str(error).strip().split("\n")[0]
    return StageError(
        f"{files.shown}/{as_text(name)}: damaged, or of another kind than its suffix says "
        f"({first}); nothing of it is "
        "used: make or fetch it again"
    )


def _table(files: Files, name: str, caption_column: str) -> _Table:
    shard = _open(files, name)
    columns = image_columns(shard.schema)
    usual = [column for column in _USUAL_NAMES if column in columns]
    if len(columns) > 1 and not usual:
        raise StageError(
            f"{files.shown}/{as_text(name)}: expected one column of images, found "
            f"{', '.join(columns)}; name the one "
            "to take 'image'"
        )
    captions = [each for each in (caption_column, CAPTION, TEXT) if each in shard.schema.names]
    if not captions:
        texts = ", ".join(text_columns(shard.schema)) or "none"
        raise StageError(
            f"{files.shown}/{as_text(name)}: no column {caption_column!r}, its columns of text are {texts}; "
            "set prepare.caption_column"
        )
    return _Table(name, shard, (usual or columns)[0], captions[0])


def _captions(files: Files, shown: str, table: _Table) -> Iterator[tuple[str, Any]]:
    """(sample_id, value of the caption column) of each row."""
    try:
        for first, values in table.shard.batches(table.caption_column):
            for number, value in enumerate(values.to_pylist(), first):
                yield f"{shown}/{number:0{_ROW_DIGITS}d}", value
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _damaged(files, table.name, error) from error


def _images(files: Files, table: _Table, wanted: Sequence[int]) -> Iterator[bytes | OSError]:
    """The images of rows, whose numbers ascend."""
    waiting = iter(wanted)
    row = next(waiting, None)
    try:
        for first, values in table.shard.batches(table.image_column):
            while row is not None and row < first + len(values):
                yield _content(values[row - first].as_py())
                row = next(waiting, None)
            if row is None:
                return
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _damaged(files, table.name, error) from error


def _content(value: Any) -> bytes | OSError:
    path = value.get("path") if isinstance(value, dict) else None
    content = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(content, bytes):
        return content
    return OSError(0, f"the row holds no image{f', but a path, {path}' if path else ''}")


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_text_list(kind: pa.DataType) -> bool:
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _is_text(kind.value_type)
