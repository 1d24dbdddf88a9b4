"""Labelled picture tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

MARGIN = 6
LABEL_SIZE = 13
LINE = LABEL_SIZE + 4
PAPER, INK, MISSING = "#ffffff", "#1b1b1b", "#e6e6e6"


@dataclass(frozen=True)
class Row:
    """One line of a grid: its label and its pictures; None leaves a grey cell."""

    label: str
    pictures: Sequence[Image.Image | None]


def draw_grid(title: str, columns: Sequence[str], rows: Sequence[Row], label_width: int = 150) -> Image.Image:
    """A table of pictures with a title, a heading over each column and a label beside each row.

    Pictures keep their proportions; small ones are enlarged to 128 pixels without smoothing, so
    that what a 64-pixel model makes is seen as it is, and large ones are reduced to 256.
    """
    font, side = ImageFont.load_default(LABEL_SIZE), _cell_side(rows)
    headings = [_wrap(text, side, font) for text in columns]
    top = MARGIN * 2 + LINE + LINE * max(map(len, headings))
    width = label_width + len(columns) * (side + MARGIN) + MARGIN
    grid = Image.new("RGB", (width, top + len(rows) * (side + MARGIN)), PAPER)
    draw = ImageDraw.Draw(grid)
    draw.text((MARGIN, MARGIN), title, INK, ImageFont.load_default(LABEL_SIZE + 1))
    for column, lines in enumerate(headings):
        left = label_width + column * (side + MARGIN)
        for index, line in enumerate(lines):
            draw.text((left, MARGIN + LINE * (index + 1)), line, INK, font)
    for index, row in enumerate(rows):
        upper = top + index * (side + MARGIN)
        for number, line in enumerate(_wrap(row.label, label_width - 2 * MARGIN, font)[: side // LINE]):
            draw.text((MARGIN, upper + LINE * number), line, INK, font)
        for column, picture in enumerate(row.pictures):
            left = label_width + column * (side + MARGIN)
            grid.paste(_fit(picture, side), (left, upper))
    return grid


def _cell_side(rows: Sequence[Row]) -> int:
    sides = [max(picture.size) for row in rows for picture in row.pictures if picture is not None]
    return min(256, max(128, *sides)) if sides else 128


def _fit(picture: Image.Image | None, side: int) -> Image.Image:
    if picture is None:
        return Image.new("RGB", (side, side), MISSING)
    scale = side / max(picture.size)
    if scale == 1:
        return picture
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    fitted = picture.resize(size, Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS)
    cell = Image.new("RGB", (side, side), PAPER)
    cell.paste(fitted, ((side - fitted.width) // 2, (side - fitted.height) // 2))
    return cell


def _wrap(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Break ``text`` between words, and within a word that is wider than ``width`` pixels."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines
