"""Which font draws a letter."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import logging
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from PIL import ImageFont

logger = logging.getLogger(__name__)
PACKAGES = ("manimgx_fonts", "manimgx_fonts_cjk")
FIRST, EMOJI = "NotoSans[wght]", "NotoEmoji[wght]"  # emoji fonts have digits too


def runs_of_one_font(text: str) -> Iterator[tuple[Path, str]]:
    """``text`` in parts of one font; what modifies a letter or joins two goes with the one before."""
    plain = re.sub(r"[\x00-\x1f\x7f-\x9f\ufffe\uffff\ud800-\udfff]", " ", text)  # no XML may hold these
    chosen: list[Path] = []
    for letter in plain:
        follows = chosen and (is_attached(letter) or (letter == " " and chosen[-1].stem != EMOJI))
        chosen.append(chosen[-1] if follows else _font_of(letter))
    for file, group in itertools.groupby(zip(chosen, plain, strict=True), key=lambda pair: pair[0]):
        yield file, "".join(letter for _, letter in group)


def is_attached(letter: str) -> bool:
    return unicodedata.category(letter) in ("Mn", "Mc", "Me", "Cf", "Sk")


@functools.cache
def _font_files() -> tuple[Path, ...]:
    """Noto Sans first, then the other scripts by name, emoji last."""
    found = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        for folder in spec.submodule_search_locations or [] if spec else []:
            found += [path for path in Path(folder).iterdir() if path.suffix in (".ttf", ".ttc", ".otf")]
    upright = [path for path in found if "Italic" not in path.name]
    return tuple(sorted(upright, key=lambda path: (path.stem != FIRST, path.stem == EMOJI, path.name)))


@functools.cache
def _font_of(letter: str) -> Path:
    """The first font that has ``letter``, else the first of all."""
    return next((file for file in _font_files() if _has(file, letter)), _font_files()[0])


def _has(file: Path, letter: str) -> bool:
    """Whether the font draws something other than its sign for a letter that it lacks."""
    font = font_at(file, 16)
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask("\U0010ffff"))


@functools.cache
def font_at(file: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def report_missing(text: str) -> None:
    missing = sorted(
        {letter for letter in text if letter.isprintable() and not _has(_font_of(letter), letter)}
    )
    if missing:
        logger.warning(
            "labels: no installed font has %s, drawn as boxes; the package manimgx-fonts-cjk has Chinese, "
            "Japanese and Korean",
            " ".join(missing[:20]),
        )
