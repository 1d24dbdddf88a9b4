"""Captions in one table: metadata.csv, .jsonl or .parquet, or data.csv."""

from __future__ import annotations

import csv
import json
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stages.lib.data.listing import Listing
from stages.lib.frame.errors import StageError

METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def read_table(listing: Listing, shown: Path, table: str, caption_column: str) -> None:
    """Rows of data.csv or of a metadata file; ``table`` is its path in the folder."""
    where = f"{shown}/{table}"
    listing.files.discard(table)
    if not listing.lies_inside(listing.folder / table):
        raise StageError(f"{where}: is a link to a file outside of the folder; put the file itself there")
    rows = list(_table_rows(listing, where, table, ("file_name", "image_path", "caption", caption_column)))
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


def _table_rows(
    listing: Listing, where: str, table: str, wanted: tuple[str, ...]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, column -> value) of each row; malformed rows are rejected by their place.

    Of Parquet only the columns ``wanted`` are read; what lies in others, even of types that Python has not,
    does not matter.
    """
    path = listing.folder / table
    try:
        if table.endswith(".parquet"):
            unread = dict.fromkeys(pq.read_schema(path).names)
            columns = [name for name in unread if name in wanted]
            read = pq.read_table(path, columns=columns, partitioning=None).to_pylist()
            for number, row in enumerate(read, 1):
                yield f"{table} row {number}", {**unread, **row}
        elif table.endswith(".jsonl"):
            yield from _json_rows(listing, path, table)
        else:
            yield from _csv_rows(listing, path, table)
    except (ValueError, ArithmeticError, TypeError, csv.Error, OSError, pa.ArrowException) as error:
        raise StageError(f"{where}: cannot be read ({error}); expected {path.suffix[1:]} in UTF-8") from error


def _csv_rows(listing: Listing, path: Path, table: str) -> Iterator[tuple[str, dict[str, Any]]]:
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


def _json_rows(listing: Listing, path: Path, table: str) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig") as handle:
        for number, line in enumerate(handle, 1):
            place = f"{table} line {number}"
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                listing.reject(place, f"not JSON: {error}")
                continue
            if isinstance(row, dict):
                yield place, row
            else:
                listing.reject(place, "not a JSON object")
