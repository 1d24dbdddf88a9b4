"""What a case is, and the good rows that lie beside what is bad."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

REFUSED, REJECTED, TAKEN = "refused", "rejected", "taken"
EITHER = (REFUSED, REJECTED, TAKEN)
SIZE = (16, 12)  # width, height of the good pictures


class Row(NamedTuple):
    """What is to be stored of an image.

    Attributes:
        captions: all of them; none where any will do.
        picture: what it shows; None where that is not known.
        tolerance: mean difference of 8-bit values, of a format that loses some.
        also: other sample_ids that it may have.
    """

    captions: tuple[str, ...]
    picture: Image.Image | None = None
    tolerance: float = 0.0
    also: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One input and how it has to end.

    Attributes:
        kind, name: the name is unique in its kind.
        make: writes the input into an empty folder and gives the path that prepare.source is to name.
        may: how it may end: "refused" (one error, no row taken), "rejected" (a row or more in rejected.jsonl, the
            others taken) or "taken" (nothing left out).
        good: sample_id -> row that is stored unless all is refused.
        bad: sample_id -> row of what may be rejected, stored where all is taken.
        odd: parts of the names of rejected rows, one each: there are no others. Not looked at where empty.
        says: words, in lower case, of which one stands in the error or in the reason of a rejected row.
        params: of the section prepare.
    """

    kind: str
    name: str
    make: Callable[[Path], Path]
    may: tuple[str, ...]
    good: Mapping[str, Row] = field(default_factory=dict)
    bad: Mapping[str, Row] = field(default_factory=dict)
    odd: tuple[str, ...] = ()
    says: tuple[str, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)


def picture(number: int, size: tuple[int, int] = SIZE) -> Image.Image:
    """A smooth picture of its own for each number."""
    width, height = size
    row, column = np.mgrid[0:height, 0:width]
    channels = [(37 * number + factor * row + (number + 7 - factor) * column) % 251 for factor in (1, 3, 5)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """An image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rows(count: int) -> dict[str, Row]:
    """``count`` good rows, ``000.png`` and so on."""
    return {f"{n:03d}.png": Row((f"caption {n}",), picture(n)) for n in range(count)}


def images_of(named: Mapping[str, Row]) -> dict[str, bytes]:
    """Path -> file of the images of rows."""
    return {name: encoded(row.picture) for name, row in named.items() if row.picture is not None}


def files_of(named: Mapping[str, Row]) -> dict[str, bytes]:
    """Path -> file of rows as images with caption files, each image before its captions."""
    found = {}
    for name, content in images_of(named).items():
        found[name] = content
        found[f"{name.rsplit('.', 1)[0]}.txt"] = named[name].captions[0].encode()
    return found


GOOD = rows(3)
GOOD_IMAGES = images_of(GOOD)
GOOD_FILES = files_of(GOOD)


def folder(
    files: Mapping[str | bytes, bytes], extra: Callable[[Path], None] | None = None
) -> Callable[[Path], Path]:
    """What makes a folder ``set`` of files and of what ``extra`` adds to it. Names may be bytes."""

    def make(root: Path) -> Path:
        target = root / "set"
        target.mkdir()
        for name, content in files.items():
            path = target / (name if isinstance(name, str) else _decoded(name))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        if extra is not None:
            extra(target)
        return target

    return make


def single(name: str, content: Callable[[], bytes] | bytes) -> Callable[[Path], Path]:
    """What makes one file that is the source."""

    def make(root: Path) -> Path:
        path = root / name
        path.write_bytes(content if isinstance(content, bytes) else content())
        return path

    return make


def flipped(content: bytes, place: int, bit: int = 0) -> bytes:
    """``content`` with one bit flipped in the byte at ``place``, which may count from the end."""
    damaged = bytearray(content)
    damaged[place] ^= 1 << bit
    return bytes(damaged)


def put(content: bytes, place: int, kind: str, *values: int | bytes) -> bytes:
    """``content`` with packed values in place of what stands there."""
    packed = struct.pack(kind, *values)
    return content[:place] + packed + content[place + len(packed) :]


def csv_of(named: Mapping[str, Row], header: str = "file_name,text") -> list[str]:
    """The lines of a table of rows, without their ends."""
    return [header, *(f"{name},{caption}" for name, row in named.items() for caption in row.captions)]


def at_each(lines: Sequence[str], added: str) -> Iterator[tuple[str, list[str]]]:
    """(where, lines) with a row added as the first, in the middle and as the last below the header."""
    for where, index in (("first", 1), ("middle", 2), ("last", len(lines))):
        yield where, [*lines[:index], added, *lines[index:]]


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
