"""Tables with the images inside: Parquet, the Arrow files of `datasets.Dataset.save_to_disk`, and TFRecords.

The captions are read first, they are small; the images later, batch by batch in the order of the rows, so
that memory does not grow with a file. A row is named by its file and its number in it. What `datasets` saves
to disk lists its Arrow files, for others lie beside them: results of `map`, and shards of an earlier save.
"""

from __future__ import annotations

import itertools
import json
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from stages.lib.data.caption_text import text_of, usable_captions
from stages.lib.data.sources.files import Files
from stages.lib.data.sources.listing import PairSource, RejectedRow, SourceRow
from stages.lib.data.sources.names import as_text
from stages.lib.data.sources.splits import TRAIN, split_named
from stages.lib.data.sources.tables import CAPTION, TEXT
from stages.lib.data.sources.tfrecord import TFRecordShard
from stages.lib.frame.errors import StageError

PARQUET, ARROW, TFRECORD = ".parquet", ".arrow", ".tfrecord"
_IMAGE_ROWS, _TEXT_ROWS = 4, 1024  # of a Parquet file in memory at a time
_BUFFER_BYTES = 2**20  # read ahead of a column
_ROW_DIGITS = 8
_USUAL_NAMES = ("image", "jpg", "jpeg", "png", "webp", "img")
_STATE, _SPLITS = "state.json", "dataset_dict.json"  # in the folder of a Dataset, above several of these
_FILE_MAGIC = b"ARROW1"  # of the other format of Arrow files
_ERRORS = (OSError, ValueError, LookupError, OverflowError, MemoryError, pa.ArrowException)  # of damage


class Shard(Protocol):
    """One file of rows."""

    schema: pa.Schema

    def batches(self, column: str) -> Iterator[tuple[int, pa.Array]]:
        """(number of the first row, values) of a column, in order."""


class ParquetShard:
    """A Parquet file."""

    def __init__(self, path: str) -> None:
        self._file = pq.ParquetFile(
            path, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
        )
        self.schema: pa.Schema = self._file.schema_arrow

    def batches(self, column: str) -> Iterator[tuple[int, pa.Array]]:
        first = 0
        num_rows = _IMAGE_ROWS if _holds_images(self.schema.field(column).type) else _TEXT_ROWS
        for batch in self._file.iter_batches(num_rows, columns=[column], use_threads=False):
            yield first, batch.column(column)
            first += batch.num_rows


class ArrowShard:
    """An Arrow file in the streaming format, as `datasets` writes it, or in the one with an index."""

    def __init__(self, path: str) -> None:
        self._map = pa.memory_map(path)
        self._is_indexed = self._map.read(len(_FILE_MAGIC)) == _FILE_MAGIC
        self.schema: pa.Schema = self._opened().schema

    def batches(self, column: str) -> Iterator[tuple[int, pa.Array]]:
        first = 0
        for batch in self._record_batches():
            values = batch.column(column)
            values.validate(full=True)  # its offsets are bytes of the file, and lead anywhere if damaged
            yield first, values
            first += batch.num_rows

    def _record_batches(self) -> Iterator[pa.RecordBatch]:
        reader = self._opened()
        if self._is_indexed:
            yield from map(reader.get_batch, range(reader.num_record_batches))
        else:
            yield from reader

    def _opened(self) -> Any:
        self._map.seek(0)
        return pa.ipc.open_file(self._map) if self._is_indexed else pa.ipc.open_stream(self._map)


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


def saved_tables(files: Files) -> dict[str, str | None]:
    """What `datasets` has saved to disk, a Dataset or a DatasetDict: name of each Arrow file -> its split.

    Raises:
        StageError: if a file that it lists is missing, or none of several splits is to train on.
    """
    present = set(files.names)
    folders = sorted({posixpath.dirname(name) for name in files.names if name.endswith(ARROW)})
    found: dict[str, str | None] = {}
    for folder in folders:
        state, above = posixpath.join(folder, _STATE), posixpath.join(posixpath.dirname(folder), _SPLITS)
        if state not in present:
            continue
        split = posixpath.basename(folder) if folder and above in present else None
        if split is not None and split not in _listed(files, above, "splits"):
            continue  # of an earlier save
        for base in _listed(files, state, "_data_files"):
            name = posixpath.join(folder, base)
            if name not in present:
                raise StageError(
                    f"{files.shown}/{as_text(name)}: missing, and {as_text(state)} lists it; save it again"
                )
            found[name] = split and split_named(split)
    splits = sorted({split for split in found.values() if split})
    if len(splits) > 1 and TRAIN not in splits:
        raise StageError(
            f"{files.shown}: expected a split {TRAIN!r} to train on, found {', '.join(splits)}; "
            "name the folder "
            "of one of them as the source, or several in prepare.sources"
        )
    return found


def _listed(files: Files, name: str, key: str) -> list[str]:
    try:
        entries = json.loads(files.read(name))[key]
        return [str(entry["filename"] if isinstance(entry, dict) else entry) for entry in entries]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _damaged(files, name, error) from error


def read_embedded(
    files: Files,
    names: Sequence[str] | Mapping[str, str | None],
    caption_column: str,
    caption_prefix: str,
) -> PairSource:
    """The rows of tables with images inside.

    Args:
        files: of the source.
        names: of the tables, all of one kind; with the split of each where the source says so.
        caption_column: of the captions; "caption" where there is none of that name.
        caption_prefix: text in front of every caption.

    Raises:
        StageError: if a table is damaged, or has no such columns.
    """
    tables = {as_text(name): _table(files, name, caption_column) for name in names}
    rows: list[SourceRow] = []
    rejected: list[RejectedRow] = []
    splits = names if isinstance(names, Mapping) else {}
    for name, table in tables.items():
        for sample_id, value in _captions(files, name, table):
            captions, reasons = usable_captions(value, caption_prefix)
            rejected += [RejectedRow(sample_id, reason) for reason in reasons]
            if captions:
                rows.append(SourceRow(sample_id, tuple(dict.fromkeys(captions)), splits.get(table.name)))

    def images(sample_ids: Sequence[str]) -> Iterator[bytes | OSError]:
        for name, group in itertools.groupby(sample_ids, posixpath.dirname):
            wanted = [int(posixpath.basename(sample_id)) for sample_id in group]
            yield from _images(files, tables[name], wanted)

    num_unlisted = len(set(files.names) - set(names))
    return PairSource(sorted(rows, key=lambda row: row.sample_id), sorted(rejected), num_unlisted, images)


def _open(files: Files, name: str) -> Shard:
    if not files.is_on_disk(name):
        raise StageError(
            f"{files.shown}/{as_text(name)}: a table inside a tar is not read; unpack it, or "
            "name it as the source"
        )
    try:
        shard = _SHARDS[posixpath.splitext(name)[1].lower()](str(files.root / name))
        _ = shard.schema.names, image_columns(shard.schema)  # bytes of the file, decoded when asked for
        return shard
    except _ERRORS as error:
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
    if not columns:
        raise StageError(
            f"{files.shown}/{as_text(name)}: expected a column of images, as bytes or as `datasets` writes "
            f"them, found {', '.join(shard.schema.names) or 'no columns'}; images that are named "
            "by a path or "
            "an address are not read from a table: put them beside a metadata.csv"
        )
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
                yield f"{shown}/{number:0{_ROW_DIGITS}d}", _decoded(value)
    except _ERRORS as error:
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
    except _ERRORS as error:
        raise _damaged(files, table.name, error) from error


def _decoded(value: Any) -> Any:
    """A text, or a list of texts, that a table holds as bytes; what is not UTF-8 stays as it is."""
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    text = text_of(value) if isinstance(value, bytes) else None
    return value if text is None else text


def _content(value: Any) -> bytes | OSError:
    path = value.get("path") if isinstance(value, dict) else None
    content = value.get("bytes") if isinstance(value, dict) else value
    if isinstance(content, bytes):
        return content
    found = f", but a path, {path}; `datasets.save_to_disk` puts the image itself there" if path else ""
    return OSError(0, f"the row holds no image{found}")


def _holds_images(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_text_list(kind: pa.DataType) -> bool:
    return (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and _is_text(kind.value_type)
