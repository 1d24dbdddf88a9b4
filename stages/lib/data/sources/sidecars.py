"""Captions in files beside the images, in folders and in tars: ``cat.png`` with ``cat.txt``.

kohya's folders ``10_name`` say how often their images are drawn an epoch, and what stands for a caption where
there is none.
"""

from __future__ import annotations

import contextlib
import json
import logging
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from stages.lib.data.pictures.formats import SUFFIXES
from stages.lib.data.sources.hints import near_misses
from stages.lib.data.sources.listing import Listing
from stages.lib.data.sources.names import AmbiguousNameError, Names, NoSuchNameError, as_text
from stages.lib.data.sources.tables import CAPTION
from stages.lib.frame.errors import StageError

TEXTS = (".txt", ".caption")
JSON = ".json"
_KOHYA_FOLDER = re.compile(r"([1-9]\d{0,2})_(.*\S.*)")
logger = logging.getLogger(__name__)


def read_sidecars(listing: Listing, caption_column: str) -> None:
    """Images with a caption file of the same stem.

    A .json is an object: its ``caption_column`` comes before a .txt, that before a .caption, that before
    the object's "caption".
    """
    files = listing.files
    masks = set(listing.masks.values())
    images = sorted(
        name for name in (*files.names, *files.odd) if _suffix(name) in SUFFIXES and name not in masks
    )
    if not images:
        raise StageError(
            f"{files.shown}: expected data.csv, metadata.csv, .jsonl or .parquet, Parquet or "
            "Arrow files with images in "
            "them, or images with .txt, .caption or .json files beside them, in folders or "
            "tars; found none of these "
            f"among {len(files.names)} files{near_misses(files.names)}"
        )
    sidecars = {suffix: _BySuffix(listing, suffix) for suffix in (*TEXTS, JSON)}
    tokens = _kohya_tokens(listing, images)
    for name in images:
        for each in sidecars.values():  # whichever is taken, none is without an image
            listing.listed.update(each.beside(name))
        try:
            caption = _caption_beside(listing, name, sidecars, caption_column)
        except _UnusableFileError as error:
            listing.listed.add(name)
            listing.reject(name, str(error))
            continue
        if caption is None:
            caption = tokens.get(name.split("/")[0])
        if caption is not None or listing.caption_prefix:
            listing.add_file(name, "" if caption is None else caption)
        else:
            listing.listed.add(name)
            listing.reject(
                name,
                "no caption, expected a .txt or .caption of the same name beside it, or a .json with "
                f"{caption_column!r} or {CAPTION!r}",
            )
    if not listing.captions_of and (seen := near_misses(files.names)):
        raise StageError(
            f"{files.shown}: expected captions in a metadata file or in files beside the images, "
            f"found none{seen}"
        )
    for suffix in TEXTS:
        for sidecar in sorted(sidecars[suffix].all - listing.listed):
            listing.listed.add(sidecar)
            listing.reject(
                sidecar, f"no image of that name beside it, known are {' '.join(sorted(SUFFIXES))}"
            )


class _UnusableFileError(Exception):
    """A caption file cannot be used; the message is the reason."""


class _BySuffix:
    """The caption files of one suffix by the names of the images that they may belong to."""

    def __init__(self, listing: Listing, suffix: str) -> None:
        entries = (*listing.files.names, *listing.files.odd)
        self._files_of: dict[str, list[str]] = defaultdict(list)
        for name in sorted(entries):
            if _suffix(name) == suffix:
                self._files_of[posixpath.splitext(name)[0]].append(name)
        self.all = {name for names in self._files_of.values() for name in names}
        self._stems = Names(self._files_of)

    def find(self, image: str) -> str | None:
        """The caption file of ``cat.png``: ``cat.txt``, or ``cat.png.txt``."""
        for stem in self._stems_of(image):
            try:
                names = self._files_of[self._stems.find(stem)]
                if len(names) > 1:
                    raise AmbiguousNameError(f"several that are alike: {', '.join(map(as_text, names))}")
                return names[0]
            except AmbiguousNameError as error:
                raise _UnusableFileError(f"caption file: {error}") from error
            except NoSuchNameError:
                continue
        return None

    def beside(self, image: str) -> Iterator[str]:
        """Every caption file that belongs to an image, be it found first or not."""
        for stem in self._stems_of(image):
            with contextlib.suppress(NoSuchNameError):
                yield from self._files_of[self._stems.find(stem)]

    def _stems_of(self, image: str) -> tuple[str, ...]:
        return (posixpath.splitext(image)[0], image) if self.all else ()


def _caption_beside(
    listing: Listing, image: str, sidecars: dict[str, _BySuffix], caption_column: str
) -> Any | None:
    """The caption of an image, None if no file holds one."""
    described: dict[str, Any] = {}
    if (sidecar := sidecars[JSON].find(image)) is not None:
        described = _json_of(listing, sidecar)
        if caption_column in described:
            return _said(described[caption_column])
    for suffix in TEXTS:
        if (sidecar := sidecars[suffix].find(image)) is not None:
            try:
                return _text_of(listing, sidecar).decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise _UnusableFileError(
                    f"caption file {as_text(sidecar)} cannot be read: not UTF-8"
                ) from error
    return _said(described[CAPTION]) if CAPTION in described else None


def _said(value: Any) -> Any:
    """A caption of a .json; null says that there is none, an empty one."""
    return "" if value is None else value


def _json_of(listing: Listing, sidecar: str) -> dict[str, Any]:
    try:
        described = json.loads(_text_of(listing, sidecar).decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else f"not JSON: {error}"
        raise _UnusableFileError(f"caption file {as_text(sidecar)} cannot be read: {reason}") from error
    return described if isinstance(described, dict) else {CAPTION: described}


def _text_of(listing: Listing, sidecar: str) -> bytes:
    listing.listed.add(sidecar)
    shown = as_text(sidecar)
    if odd := listing.files.odd.get(sidecar):
        raise _UnusableFileError(f"caption file {shown} is {odd}")
    if not listing.files.lies_inside(sidecar):
        raise _UnusableFileError(f"caption file {shown} is a link to a file outside of the folder")
    try:
        return listing.files.read(sidecar)
    except OSError as error:
        raise _UnusableFileError(f"caption file {shown} cannot be read: {error.strerror}") from error


def _kohya_tokens(listing: Listing, images: list[str]) -> dict[str, str]:
    """Folder -> what stands for a caption, where all folders are named ``10_name``; sets their repeats."""
    found = {folder: _KOHYA_FOLDER.fullmatch(folder) for folder in {name.split("/")[0] for name in images}}
    if not all(found.values()) or not all("/" in name for name in images):
        return {}
    tokens = {folder: match[2].replace("_", " ") for folder, match in found.items() if match}
    repeats = {folder: int(match[1]) for folder, match in found.items() if match}
    counts = Counter(name.split("/")[0] for name in images)
    for name in images:
        listing.repeats_of[as_text(name)] = repeats[name.split("/")[0]]
    for folder in sorted(repeats):
        logger.info(
            "%s/%s: %d images, each drawn %d times an epoch, as its name says",
            listing.files.shown, as_text(folder), counts[folder], repeats[folder],
        )  # fmt: skip
    return tokens


def _suffix(name: str) -> str:
    return posixpath.splitext(name)[1].lower()
