"""Text drawn onto pictures, in any script that an installed font has.

The fonts are those of the packages ``manimgx-fonts`` (Noto Sans for most scripts, Noto Emoji) and, where it
is installed, ``manimgx-fonts-cjk`` (Chinese, Japanese, Korean). No font of the machine is used, so that a
label has the same pixels everywhere. resvg shapes the text and orders what is written from right to left.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import itertools
import logging
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import resvg_py
from PIL import Image, ImageFont

logger = logging.getLogger(__name__)

PACKAGES = ("manimgx_fonts", "manimgx_fonts_cjk")
FIRST, EMOJI = "NotoSans[wght]", "NotoEmoji[wght]"  # emoji fonts have digits too


class Label(NamedTuple):
    """A line of text with its baseline at ``top + size``, all in pixels."""

    left: int
    top: int
    text: str
    size: int


def draw_labels(picture: Image.Image, labels: Sequence[Label], colour: str) -> Image.Image:
    """``picture`` with text over it, RGB; letters that no installed font has are boxes."""
    _report_missing("".join(label.text for label in labels))
    parts, files = [], set()
    for label in labels:
        left: float = label.left
        for file, run in _runs(label.text):
            parts.append(_svg_text(left, label.top + label.size, label.size, file, run))
            left += _font(file, label.size).getlength(run)
            files.add(str(file))
    if not parts:
        return picture
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{picture.width}" height="{picture.height}" '
        f'fill="{colour}" xml:space="preserve">{"".join(parts)}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True, font_files=sorted(files))
    overlay = Image.open(io.BytesIO(bytes(png)))
    return Image.alpha_composite(picture.convert("RGBA"), overlay).convert("RGB")


def wrap(text: str, width: int, size: int) -> list[str]:
    """Break ``text`` between words, and within a word that is wider than ``width`` pixels."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if text_width(joined, size) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in _clusters(word):
            if lines[-1] and text_width(lines[-1] + letter, size) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def text_width(text: str, size: int) -> float:
    """Pixels of ``text`` letter by letter: scripts that join letters come out a little narrower."""
    return sum(_font(file, size).getlength(run) for file, run in _runs(text))


def _svg_text(left: float, baseline: int, size: int, file: Path, run: str) -> str:
    """An element of one font: resvg's own search for a font fails where letters join."""
    family = escape(_font(file, size).getname()[0] or "")
    return f'<text x="{left:g}" y="{baseline}" font-size="{size}" font-family="{family}">{escape(run)}</text>'


def _runs(text: str) -> Iterator[tuple[Path, str]]:
    """``text`` in parts of one font; what modifies a letter or joins two goes with the one before."""
    plain = re.sub(r"[\x00-\x1f\x7f-\x9f\ufffe\uffff\ud800-\udfff]", " ", text)  # no XML may hold these
    chosen: list[Path] = []
    for letter in plain:
        follows = chosen and (_is_attached(letter) or (letter == " " and chosen[-1].stem != EMOJI))
        chosen.append(chosen[-1] if follows else _font_of(letter))
    for file, group in itertools.groupby(zip(chosen, plain, strict=True), key=lambda pair: pair[0]):
        yield file, "".join(letter for _, letter in group)


def _is_attached(letter: str) -> bool:
    return unicodedata.category(letter) in ("Mn", "Mc", "Me", "Cf", "Sk")


def _clusters(word: str) -> list[str]:
    """Where a word may be broken: not before an accent, nor beside a joiner."""
    clusters: list[str] = []
    for letter in word:
        if clusters and (_is_attached(letter) or clusters[-1].endswith("\u200d")):
            clusters[-1] += letter
        else:
            clusters.append(letter)
    return clusters


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
    font = _font(file, 16)
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask("\U0010ffff"))


@functools.cache
def _font(file: Path, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(file, size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def _report_missing(text: str) -> None:
    missing = sorted(
        {letter for letter in text if letter.isprintable() and not _has(_font_of(letter), letter)}
    )
    if missing:
        logger.warning(
            "labels: no installed font has %s, drawn as boxes; the package manimgx-fonts-cjk has Chinese, "
            "Japanese and Korean",
            " ".join(missing[:20]),
        )
