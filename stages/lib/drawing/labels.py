"""Text drawn onto pictures, in any script that an installed font has.

The fonts are those of the packages ``manimgx-fonts`` (Noto Sans for most scripts, Noto Emoji) and, where it
is installed, ``manimgx-fonts-cjk`` (Chinese, Japanese, Korean). No font of the machine is used, so that a
label has the same pixels everywhere. resvg shapes the text and orders what is written from right to left.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

import resvg_py
from PIL import Image

from stages.lib.drawing.fonts import font_at, is_attached, report_missing, runs_of_one_font


class Label(NamedTuple):
    """A line of text with its baseline at ``top + size``, all in pixels."""

    left: int
    top: int
    text: str
    size: int


def draw_labels(picture: Image.Image, labels: Sequence[Label], colour: str) -> Image.Image:
    """``picture`` with text over it, RGB; letters that no installed font has are boxes."""
    report_missing("".join(label.text for label in labels))
    parts, files = [], set()
    for label in labels:
        left: float = label.left
        for file, run in runs_of_one_font(label.text):
            parts.append(_svg_text(left, label.top + label.size, label.size, file, run))
            left += font_at(file, label.size).getlength(run)
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
    return sum(font_at(file, size).getlength(run) for file, run in runs_of_one_font(text))


def _svg_text(left: float, baseline: int, size: int, file: Path, run: str) -> str:
    """An element of one font: resvg's own search for a font fails where letters join."""
    family = escape(font_at(file, size).getname()[0] or "")
    return f'<text x="{left:g}" y="{baseline}" font-size="{size}" font-family="{family}">{escape(run)}</text>'


def _clusters(word: str) -> list[str]:
    """Where a word may be broken: not before an accent, nor beside a joiner."""
    clusters: list[str] = []
    for letter in word:
        if clusters and (is_attached(letter) or clusters[-1].endswith("\u200d")):
            clusters[-1] += letter
        else:
            clusters.append(letter)
    return clusters
