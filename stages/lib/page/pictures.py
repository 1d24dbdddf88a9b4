"""Pictures of a page: small ones and thumbnails inside it, all others as WebP files in a folder beside it."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from stages.lib.core.files import fresh_directory
from stages.lib.core.workers import count_cores, map_in_order
from stages.lib.frame.errors import StageError
from stages.lib.frame.inputs import remove

ENLARGED_UP_TO = 128  # pixels; such small pictures lie inside the page, and are enlarged without smoothing
THUMBNAIL = 96  # pixels, longer side: twice what a button shows
MAX_WEBP_SIDE = 16383  # of the format
OURS = re.compile(r"[0-9a-f]{16}\.(webp|png)")


class Picture(NamedTuple):
    """A picture as a page shows it; equal for equal bytes of its PNG.

    Attributes:
        name: the same for the same bytes.
        width, height: pixels.
        source: address of the whole picture, a file beside the page or a data URI; its pixels are the PNG's.
        thumbnail: data URI.
    """

    name: str
    width: int
    height: int
    source: str
    thumbnail: str

    @property
    def is_small(self) -> bool:
        return self.width <= ENLARGED_UP_TO


class PictureFiles:
    """The folder of a page's pictures, ``<page>_files``; in place when `finish` is called.

    Args:
        page: file of the page.

    Raises:
        StageError: if a folder of that name holds what no page put there.
    """

    def __init__(self, page: Path) -> None:
        self.directory = page.with_name(f"{page.stem}_files")
        if foreign := [path for path in _listed(self.directory) if not OURS.fullmatch(path.name)]:
            raise StageError(
                f"{self.directory}: expected pictures of an earlier page or nothing, got {foreign[0].name}; "
                "move that away, or give the page another name"
            )
        self._partial = fresh_directory(page.with_name(f"{page.stem}_files.partial"))

    def add(self, contents: Iterable[tuple[str, bytes]]) -> Iterator[Picture]:
        """A picture for each PNG, in their order; one after the other is read, a few are in memory.

        Args:
            contents: path, for errors, and bytes of each.

        Raises:
            StageError: naming what is no picture.
        """
        cores = count_cores()
        for _, picture in map_in_order(self._written, contents, cores, 2 * cores, in_processes=False):
            yield picture

    def finish(self) -> None:
        """Put the pictures in place of those of an earlier page."""
        remove(self.directory)
        os.replace(self._partial, self.directory)

    def _written(self, item: tuple[str, bytes]) -> Picture:
        path, content = item
        name = hashlib.sha256(content).hexdigest()[:16]
        try:
            with Image.open(io.BytesIO(content)) as opened:
                image = opened.convert("RGBA" if opened.has_transparency_data else "RGB")
        except (OSError, SyntaxError, ValueError) as error:
            raise StageError(f"{path}: expected a picture, got none ({error}); run `dvc repro`") from error
        if max(image.size) > MAX_WEBP_SIDE:
            suffix, whole = "png", content
        else:
            suffix, whole = "webp", _webp(image, lossless=True, quality=0, exact=True)
        if image.width <= ENLARGED_UP_TO:
            uri = _data_uri(whole, suffix)
            return Picture(name, *image.size, uri, uri)
        file = self._partial / f"{name}.{suffix}"
        file.write_bytes(whole)
        small = image.copy()
        small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        return Picture(
            name,
            *image.size,
            f"{self.directory.name}/{file.name}",
            _data_uri(_webp(small, quality=75), "webp"),
        )


def _listed(directory: Path) -> list[Path]:
    return sorted(directory.iterdir()) if directory.is_dir() else []


def _webp(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", method=0, **options)
    return buffer.getvalue()


def _data_uri(content: bytes, suffix: str) -> str:
    return f"data:image/{suffix};base64," + base64.b64encode(content).decode()
