"""Splits that a source itself makes: by the names of its folders and files, as `datasets` reads them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from stages.lib.data.sources.listing import SourceRow

TRAIN, VALIDATION, TEST = "train", "validation", "test"
_NAMES = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev"), VALIDATION),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), TEST),
}
_WORD = re.compile(r"[a-z]+")


def known_split(name: str) -> str | None:
    """ "train", "validation" or "test" by any of its usual names."""
    return _NAMES.get(name.lower())


def split_of_path(path: str) -> str | None:
    """ "train", "validation" or "test" as a folder or the file's name says; None where none does.

    The last part that holds such a word counts, ``data/train-00000-of-00002.parquet``.
    """
    for part in reversed(path.split("/")):
        words = [_NAMES[word] for word in _WORD.findall(part.lower()) if word in _NAMES]
        if words:
            return words[0]
    return None


def agreed_splits(rows: Sequence[SourceRow]) -> list[SourceRow]:
    """Rows with their splits where the source is split as a whole, into ``train`` and others; else without
    any.

    Rows that say nothing are those of the top folders' names.
    """
    named = [row if row.split else dataclasses.replace(row, split=_of_top(row.sample_id)) for row in rows]
    splits = {row.split for row in named}
    if TRAIN in splits and len(splits) > 1 and None not in splits:
        return named
    return [dataclasses.replace(row, split=None) if row.split else row for row in rows]


def _of_top(sample_id: str) -> str | None:
    return known_split(sample_id.split("/")[0]) if "/" in sample_id else None
