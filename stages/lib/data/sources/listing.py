"""Rows of a source as they are read: taken or rejected, each by name."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from stages.lib.data.caption_text import usable_captions
from stages.lib.data.pictures.formats import SUFFIXES
from stages.lib.data.sources.files import Files
from stages.lib.data.sources.names import Names, NoSuchNameError, as_text, leaves_folder, tidied_path


@dataclass(frozen=True)
class SourceRow:
    """One image by name and its captions, one or more.

    Attributes:
        sample_id: the source's own name of the row, a relative path.
        captions: as they are written.
        split: "train", "validation" or "test" where the source says so.
        repeats: how often it is drawn an epoch.
        has_mask: whether a mask lies beside it.
    """

    sample_id: str
    captions: tuple[str, ...]
    split: str | None = None
    repeats: int = 1
    has_mask: bool = False


@dataclass(frozen=True, order=True)
class RejectedRow:
    """A row left out, and why."""

    name: str
    reason: str


ReadImages = Callable[[Sequence[str]], Iterator[bytes | OSError]]
MASKS = (".mask", "-masklabel")  # ends of the stem of a mask file, cat.mask.png of cat.jpg


def no_masks(sample_ids: Sequence[str]) -> Iterator[bytes | OSError]:
    """What a source without masks has of them."""
    return iter(())


@dataclass(frozen=True)
class PairSource:
    """What a source holds.

    Attributes:
        rows, rejected: each sorted by name.
        num_unlisted_files: files that no row names.
        images: from sample_ids, sorted, to the bytes of their image files, in that order; one that
            cannot be read is the error.
        masks: the same of their mask files, of rows that have one.
    """

    rows: list[SourceRow]
    rejected: list[RejectedRow]
    num_unlisted_files: int
    images: ReadImages
    masks: ReadImages = no_masks

    def read(self, sample_id: str) -> bytes:
        """The image file of one row."""
        (content,) = self.images([sample_id])
        if isinstance(content, OSError):
            raise content
        return content


@dataclass
class Listing:
    """Rows of a set of files as they are read.

    Attributes:
        files: that are listed.
        caption_prefix: text in front of every caption.
        file_of: sample_id -> the image's file.
        captions_of: sample_id -> captions.
        repeats_of: sample_id -> how often it is drawn an epoch, where that is not once.
        listed: files that some row names.
        mask_of: sample_id -> its mask's file, once all rows are taken.
    """

    files: Files
    caption_prefix: str = ""
    file_of: dict[str, str] = field(default_factory=dict)
    captions_of: dict[str, list[str]] = field(default_factory=dict)
    repeats_of: dict[str, int] = field(default_factory=dict)
    rejected: list[RejectedRow] = field(default_factory=list)
    listed: set[str] = field(default_factory=set)
    mask_of: dict[str, str] = field(default_factory=dict)

    def add(self, wanted: str, place: str, captions: Any) -> None:
        """Take a row, or reject it.

        Args:
            wanted: the image's name as a table writes it, relative to the source.
            place: of the row, names it where ``wanted`` is empty.
            captions: a text or a list of texts; may be anything.
        """
        if not wanted.strip():
            self.reject(place, "no file name")
            return
        if leaves_folder(wanted):
            self.reject(tidied_path(wanted), "points outside the folder")
            return
        try:
            name = self._names.find(wanted)
        except NoSuchNameError as error:
            self.reject(tidied_path(wanted), str(error))
            return
        self.add_file(name, captions)

    def add_file(self, name: str, captions: Any) -> None:
        """As `add`, of a file that is there; it keeps the name that it has."""
        sample_id = as_text(name)
        self.listed.add(name)
        if odd := self.files.odd.get(name):
            self.reject(sample_id, f"expected a file, found {odd}")
            return
        usable, reasons = usable_captions(captions, self.caption_prefix)
        for reason in reasons:
            self.reject(sample_id, reason)
        if usable:
            self.file_of[sample_id] = name
            self.captions_of.setdefault(sample_id, []).extend(usable)

    def reject(self, name: str, reason: str) -> None:
        self.rejected.append(RejectedRow(as_text(name), reason))

    def source(self) -> PairSource:
        self.mask_of = {
            sample_id: mask
            for sample_id in self.captions_of
            if (mask := self.masks.get(posixpath.splitext(self.file_of[sample_id])[0])) is not None
        }
        rows = [
            SourceRow(
                sample_id,
                tuple(dict.fromkeys(captions)),
                repeats=self.repeats_of.get(sample_id, 1),
                has_mask=sample_id in self.mask_of,
            )
            for sample_id, captions in sorted(self.captions_of.items())
        ]
        num_unlisted = len(set(self.files.names) - self.listed - set(self.mask_of.values()))
        return PairSource(rows, sorted(self.rejected), num_unlisted, self._images, self._masks)

    @cached_property
    def masks(self) -> dict[str, str]:
        """Stem of an image -> its mask file."""
        images = [name for name in self.files.names if posixpath.splitext(name)[1].lower() in SUFFIXES]
        stems = {posixpath.splitext(name)[0]: name for name in images}
        return {
            stem.removesuffix(end): name
            for stem, name in stems.items()
            for end in MASKS
            if stem.endswith(end) and stem.removesuffix(end) in stems
        }

    def _images(self, sample_ids: Sequence[str]) -> Iterator[bytes | OSError]:
        return self._read([self.file_of[sample_id] for sample_id in sample_ids])

    def _masks(self, sample_ids: Sequence[str]) -> Iterator[bytes | OSError]:
        return self._read([self.mask_of[sample_id] for sample_id in sample_ids])

    def _read(self, names: Sequence[str]) -> Iterator[bytes | OSError]:
        for name in names:
            try:
                yield self.files.read(name)
            except OSError as error:
                yield error

    @cached_property
    def _names(self) -> Names:
        return self.files.lookup()
