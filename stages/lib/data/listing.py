"""Rows of a folder as they are read: taken or rejected, each by name."""

from __future__ import annotations

import posixpath
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class SourceRow:
    """One image by name and its captions, one or more."""

    sample_id: str
    captions: tuple[str, ...]


@dataclass(frozen=True, order=True)
class RejectedRow:
    """A row left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class PairSource:
    """Rows and rejected rows, each sorted by name; `read` gives the bytes of a row's image file."""

    rows: list[SourceRow]
    rejected: list[RejectedRow]
    num_unlisted_files: int
    read: Callable[[str], bytes]


@dataclass
class Listing:
    """Rows of a folder as they are read."""

    folder: Path
    files: set[str]
    captions_of: dict[str, list[str]] = field(default_factory=dict)
    rejected: list[RejectedRow] = field(default_factory=list)
    listed: set[str] = field(default_factory=set)

    def add(self, name: str, place: str, captions: Any) -> None:
        """Take a row, or reject it.

        Args:
            name: of the image, relative to the folder, as written.
            place: of the row, names it where ``name`` is empty.
            captions: a text or a list of texts; may be anything.
        """
        if not name.strip():
            self.reject(place, "no file name")
            return
        if not _is_text(name):
            self.listed.add(name)
            self.reject(name, "file name is not UTF-8")
            return
        sample_id = posixpath.normpath(name.strip().replace("\\", "/"))
        if posixpath.isabs(sample_id) or sample_id.split("/")[0] == "..":
            self.reject(sample_id, "points outside the folder")
            return
        self.listed.add(sample_id)
        if not _is_file(self.folder / sample_id):
            self.reject(sample_id, "no such file")
            return
        for caption in captions if isinstance(captions, list) else [captions]:
            if caption is not None and not _is_text(caption):
                self.reject(sample_id, f"caption is not text: {caption!r}")
            elif not (words := (caption or "").split()):
                self.reject(sample_id, "empty caption")
            else:
                self.captions_of.setdefault(sample_id, []).append(" ".join(words))
        if captions == []:
            self.reject(sample_id, "empty caption")

    def lies_inside(self, path: Path) -> bool:
        """Whether a text, links resolved, lies in the folder: none of elsewhere becomes a caption."""
        try:
            return path.resolve().is_relative_to(self.folder.resolve())
        except (OSError, RuntimeError):  # a loop of links
            return False

    def reject(self, name: str, reason: str) -> None:
        self.rejected.append(RejectedRow(name, reason))

    def source(self) -> PairSource:
        rows = [
            SourceRow(sample_id, tuple(dict.fromkeys(captions)))
            for sample_id, captions in sorted(self.captions_of.items())
        ]
        num_unlisted = len(self.files - self.listed)
        return PairSource(
            rows, sorted(self.rejected), num_unlisted, lambda name: (self.folder / name).read_bytes()
        )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a caption in the wrong column is longer than any file name
        return False


def _is_text(value: Any) -> bool:
    """Whether it is a string that UTF-8 can hold."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
