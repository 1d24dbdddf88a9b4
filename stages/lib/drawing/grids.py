"""Labelled picture tables."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from stages.lib.drawing.labels import Label, draw_labels, text_width, wrap

MARGIN = 6
LABEL_SIZE = 13
LINE = LABEL_SIZE + 4
PAPER, INK, MISSING = "#ffffff", "#1b1b1b", "#e6e6e6"


@dataclass(frozen=True)
class GridRow:
    """One line of a grid: its label and its pictures; None leaves a grey cell."""

    label: str
    pictures: Sequence[Image.Image | None]


def draw_grid(
    title: str, columns: Sequence[str], rows: Sequence[GridRow], label_width: int = 150
) -> Image.Image:
    """A table of pictures with a title, a heading over each column and a label beside each row.

    Pictures keep their proportions; small ones are enlarged to 128 pixels without smoothing, so
    that what a 64-pixel model makes is seen as it is, and large ones are reduced to 256.
    """
    side = _cell_side(rows)
    headings = [wrap(text, side, LABEL_SIZE) for text in columns]
    width = label_width + len(columns) * (side + MARGIN) + MARGIN
    titles = wrap(title, width - 2 * MARGIN, LABEL_SIZE + 1)
    under = MARGIN + LINE * len(titles)
    top = under + MARGIN + LINE * max(map(len, headings))
    grid = Image.new("RGB", (width, top + len(rows) * (side + MARGIN)), PAPER)
    labels = [
        Label(MARGIN, MARGIN + LINE * number, line, LABEL_SIZE + 1) for number, line in enumerate(titles)
    ]
    for column, lines in enumerate(headings):
        left = label_width + column * (side + MARGIN)
        labels += [_line(left, under, number, line) for number, line in enumerate(lines)]
    for index, row in enumerate(rows):
        upper = top + index * (side + MARGIN)
        lines = _shortened(row.label, label_width - 2 * MARGIN, side // LINE)
        labels += [_line(MARGIN, upper, number, line) for number, line in enumerate(lines)]
        for column, picture in enumerate(row.pictures):
            left = label_width + column * (side + MARGIN)
            grid.paste(_fit(picture, side), (left, upper))
    return draw_labels(grid, labels, INK)


def draw_message(text: str) -> Image.Image:
    """A line of text in the place of a picture that is left out."""
    size = (round(text_width(text, LABEL_SIZE)) + 2 * MARGIN, LINE + 2 * MARGIN)
    return draw_labels(Image.new("RGB", size, PAPER), [Label(MARGIN, MARGIN, text, LABEL_SIZE)], INK)


def stack(pictures: Sequence[Image.Image], beside: bool = False) -> Image.Image:
    """Pictures below one another, or beside one another, on white."""
    widths, heights = zip(*(picture.size for picture in pictures), strict=True)
    size = (sum(widths), max(heights)) if beside else (max(widths), sum(heights))
    sheet, left, top = Image.new("RGB", size, PAPER), 0, 0
    for picture in pictures:
        sheet.paste(picture, (left, top))
        left, top = (left + picture.width, top) if beside else (left, top + picture.height)
    return sheet


def _shortened(text: str, width: int, num_lines: int) -> list[str]:
    """``text`` in lines of ``width`` pixels, with an ellipsis where there are too many."""
    lines = wrap(text, width, LABEL_SIZE)
    if len(lines) <= num_lines:
        return lines
    room = width - math.ceil(text_width("…", LABEL_SIZE))
    return [*lines[: num_lines - 1], wrap(lines[num_lines - 1], room, LABEL_SIZE)[0] + "…"]


def _line(left: int, top: int, number: int, text: str) -> Label:
    return Label(left, top + LINE * number, text, LABEL_SIZE)


def _cell_side(rows: Sequence[GridRow]) -> int:
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
