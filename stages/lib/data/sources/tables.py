"""Captions in a table: metadata.csv, .jsonl or .parquet, or data.csv. Odd rows are rejected by line."""

from __future__ import annotations

import csv
import io
import itertools
import json
import posixpath
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.lib.data.pictures.formats import SUFFIXES
from stages.lib.data.sources.listing import Listing
from stages.lib.frame.errors import StageError

METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
CAPTION, TEXT = "caption", "txt"  # where there is no column as the params name it
_LINES_OF_A_ROW = 1000  # beyond, a quote was never closed
_OTHER_SEPARATORS = {";": "semicolons", "\t": "tabs"}


def read_table(listing: Listing, table: str, caption_column: str) -> None:
    """Rows of data.csv or of a metadata file; ``table`` is its path in the source."""
    where = f"{listing.files.shown}/{table}"
    listing.listed.add(table)
    if not listing.files.lies_inside(table):
        raise StageError(f"{where}: is a link to a file outside of the folder; put the file itself there")
    wanted = ("file_name", "image_path", CAPTION, caption_column)
    rows = list(_table_rows(listing, where, table, wanted))
    columns = list(dict.fromkeys(column for _, row in rows for column in row))
    if not rows:
        return
    if posixpath.basename(table) == "data.csv":
        file_column = "image_path"
        caption_column = caption_column if caption_column in columns else CAPTION
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


def _table_rows(
    listing: Listing, where: str, table: str, wanted: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, column -> value) of each row; malformed rows are rejected by their place.

    Of Parquet only the columns ``wanted`` are read; what lies in others, even of types that Python has not,
    does not matter.
    """
    kind = posixpath.splitext(table)[1][1:]
    try:
        content = listing.files.read(table)
        if kind == "parquet":
            file = pq.ParquetFile(io.BytesIO(content), page_checksum_verification=True)
            unread = dict.fromkeys(file.schema_arrow.names)
            columns = [name for name in unread if name in wanted]
            for number, row in enumerate(file.read(columns).to_pylist(), 1):
                yield f"{table} row {number}", {**unread, **row}
        elif kind == "jsonl":
            yield from _json_rows(listing, _lines(content), table)
        else:
            yield from _csv_rows(listing, _lines(content), table)
    except (ValueError, ArithmeticError, TypeError, csv.Error, OSError, pa.ArrowException) as error:
        raise StageError(f"{where}: cannot be read ({error}); expected {kind} in UTF-8") from error


def _lines(content: bytes) -> list[str]:
    """The lines of a text, with their ends; bytes that are not UTF-8 stand as surrogates in the line.

    Raises:
        ValueError: if it is text of another kind than UTF-8 and its relatives.
    """
    if content.startswith((b"\xff\xfe", b"\xfe\xff")) or content[:200].count(b"\0") > len(content[:200]) // 4:
        raise ValueError("looks like UTF-16: save it as UTF-8")
    text = content.decode("utf-8-sig", errors="surrogateescape")
    return io.StringIO(text, newline="").readlines()


def _csv_rows(listing: Listing, lines: list[str], table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    header: list[str] | None = None
    for number, cells in _records(listing, lines, table):
        place = f"{table} line {number}"
        if header is None:
            header = _header(cells, number)
        elif not _is_utf8(cells):
            listing.reject(place, "not UTF-8")
        elif len(cells) != len(header):
            reason = f"{len(cells)} cells, the header has {len(header)}; quote captions that hold commas"
            listing.reject(place, reason)
        else:
            yield place, dict(zip(header, cells, strict=True))


def _records(listing: Listing, lines: list[str], table: str) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of each row.

    A row that is no csv is rejected by its line, and the next line begins another: a quote that is never
    closed would otherwise swallow all rows that follow.
    """
    start = 0
    while start < len(lines):
        rows = csv.reader(
            itertools.islice(lines, start, start + _LINES_OF_A_ROW), skipinitialspace=True, strict=True
        )
        try:
            cells = next(rows)
            if start and _holds_a_row(lines[start + 1 : start + rows.line_num], len(cells)):
                raise csv.Error("a quote that is closed in another row")
        except csv.Error as error:
            if start == 0:
                raise
            listing.reject(
                f"{table} line {start + 1}",
                f"no csv: {error}; quote cells that hold quotes, and double these",
            )
            start += 1
            continue
        if cells:
            yield start + 1, cells
        start += rows.line_num


def _holds_a_row(lines: list[str], num_cells: int) -> bool:
    """Whether one of the further lines of a row looks like a row of its own, which names an image."""
    return any(
        len(cells) == num_cells
        and any(posixpath.splitext(cell.strip().strip('"'))[1].lower() in SUFFIXES for cell in cells)
        for cells in (line.rstrip("\r\n").split(",") for line in lines)
    )


def _header(cells: list[str], number: int) -> list[str]:
    header = [column.strip() for column in cells]
    if not _is_utf8(header):
        raise ValueError(f"line {number}, the header, is not UTF-8")
    if len(set(header)) < len(header):
        raise ValueError(f"line {number}, the header, names a column twice: {', '.join(header)}")
    for separator, name in _OTHER_SEPARATORS.items():
        if len(header) == 1 and separator in header[0]:
            raise ValueError(f"its columns are separated by {name}, expected commas: save it with commas")
    return header


def _is_utf8(cells: list[str]) -> bool:
    return not any(
        "\udc80" <= character <= "\udcff" for cell in cells if not cell.isascii() for character in cell
    )


def _json_rows(listing: Listing, lines: list[str], table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        place = f"{table} line {number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            listing.reject(place, f"not JSON: {error}")
            continue
        if not _is_utf8([line]):
            listing.reject(place, "not UTF-8")
        elif isinstance(row, dict):
            yield place, row
        else:
            listing.reject(place, "not a JSON object")
