"""Splits that a source itself makes: by the names of its folders and files, as `datasets` reads them."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from stages.lib.data.sources.listing import SourceRow
from stages.lib.data.split_patterns import splits_by_names

TRAIN, VALIDATION, TEST = "train", "validation", "test"
_NAMES = {
    **dict.fromkeys(("train", "training"), TRAIN),
    **dict.fromkeys(("validation", "valid", "val", "dev"), VALIDATION),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), TEST),
}
_BETWEEN = re.compile("[-._ 0-9]+")
_TABLES_AND_TARS = (".parquet", ".arrow", ".tfrecord", ".tar")
logger = logging.getLogger(__name__)


def known_split(name: str) -> str | None:
    """ "train", "validation" or "test" by any of its usual names."""
    return _NAMES.get(name.lower())


def split_named(name: str) -> str:
    """ "train", "validation" or "test" where a word of a split's name says so, else that name."""
    return next((_NAMES[word] for word in _BETWEEN.split(name.lower()) if word in _NAMES), name)


def agreed_splits(rows: Sequence[SourceRow]) -> list[SourceRow]:
    """Rows with their splits where the source is split as a whole, into ``train`` and others; else without
    any.

    Rows without one are in the split that the names of their folders or files say.
    """
    split_of_file = _splits_of(_file_of(row.sample_id) for row in rows if not row.split)
    splits = [row.split or split_of_file.get(_file_of(row.sample_id)) for row in rows]
    counts = Counter(splits)
    if TRAIN in counts and len(counts.keys() - {None}) > 1:
        if None not in counts:
            return [dataclasses.replace(row, split=split) for row, split in zip(rows, splits, strict=True)]
        logger.warning(
            "names of folders or files say %s, but for %d of %d rows nothing: all of them are split by "
            "prepare.validation_fraction",
            ", ".join(f"{split} for {count}" for split, count in sorted(counts.items(), key=str) if split),
            counts[None], len(rows),
        )  # fmt: skip
    return [dataclasses.replace(row, split=None) if row.split else row for row in rows]


def _file_of(sample_id: str) -> str:
    """The file in which a row lies: a table or a tar, or the image itself."""
    parts = sample_id.split("/")
    for number, part in enumerate(parts[:-1], 1):
        if part.lower().endswith(_TABLES_AND_TARS):
            return "/".join(parts[:number])
    return sample_id


def _splits_of(files: Iterable[str]) -> dict[str, str]:
    """file -> split, of the files whose names say one; upper and lower case are alike."""
    alike: dict[str, set[str]] = {}
    for file in files:
        alike.setdefault(file.lower(), set()).add(file)
    found: dict[str, str] = {}
    for split, names in sorted(splits_by_names(alike).items(), key=lambda item: item[0] != TRAIN):
        for name in names:
            for file in alike[name]:
                found.setdefault(file, known_split(split) or split)
    return found
