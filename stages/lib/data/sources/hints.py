"""What a folder holds that looks like captions or images and is not read: and what to do."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable

from stages.lib.data.sources.archives import COMPRESSED_TARS

_TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".xlsx", ".xls", ".ods", ".yaml", ".yml", ".toml")
_LISTS = ("metadata.json", "captions.json", "annotations.json", "dataset.json", "data.json")


def near_misses(names: Iterable[str]) -> str:
    """Names of such files with what to do about each, to be put at the end of an error; "" without any."""
    found = {remedy: name for name in sorted(names, reverse=True) if (remedy := _remedy(name))}
    return "".join(
        f"; seen: {name}, {remedy}" for remedy, name in sorted(found.items(), key=lambda item: item[1])
    )


def _remedy(name: str) -> str | None:
    base = posixpath.basename(name).lower()
    suffix = posixpath.splitext(base)[1]
    if base in _LISTS:
        return "write one JSON object a line into metadata.jsonl, with file_name and text"
    if suffix == ".tsv":
        return "save it with commas as metadata.csv, with the columns file_name and text"
    if suffix in _TABLES:
        return "name it metadata.csv or .jsonl, with file_name and text in each row"
    if base.endswith(".zip") or base.endswith(COMPRESSED_TARS):
        return "unpack it there, or let prepare.source name the archive itself"
    return None
