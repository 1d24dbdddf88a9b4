"""Captions in a .txt beside each image."""

from __future__ import annotations

import posixpath
from pathlib import Path

from stages.lib.data.images import SUFFIXES
from stages.lib.data.listing import Listing
from stages.lib.frame.errors import StageError


def read_sidecars(listing: Listing, shown: Path, files: list[str]) -> None:
    """Images with a .txt of the same stem; the whole text is one caption."""
    images = [name for name in files if posixpath.splitext(name)[1].lower() in SUFFIXES]
    if not images:
        raise StageError(
            f"{shown}: expected data.csv, metadata.csv, .jsonl or .parquet, or images with .txt files "
            f"beside them, found none of these among {len(files)} files"
        )
    captions = {posixpath.splitext(name)[0]: name for name in files if name.endswith(".txt")}
    for name in images:
        sidecar = captions.get(posixpath.splitext(name)[0])
        if sidecar is None:
            listing.listed.add(name)
            listing.reject(name, "no caption file, expected a .txt of the same name beside it")
            continue
        listing.listed.add(sidecar)
        if not listing.lies_inside(listing.folder / sidecar):
            listing.listed.add(name)
            listing.reject(name, f"caption file {sidecar} is a link to a file outside of the folder")
            continue
        try:
            text = (listing.folder / sidecar).read_text(encoding="utf-8-sig")
        except (UnicodeDecodeError, OSError) as error:
            listing.listed.add(name)
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            listing.reject(name, f"caption file {sidecar} cannot be read: {reason}")
        else:
            listing.add(name, name, text)
    for sidecar in sorted(set(captions.values()) - listing.listed):
        listing.listed.add(sidecar)
        listing.reject(sidecar, f"no image of that name beside it, known are {' '.join(sorted(SUFFIXES))}")
