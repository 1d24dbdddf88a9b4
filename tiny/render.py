"""Draw the emoji sets the base is trained on.

Reads  tiny/node_modules/@iconify-json/{noto,twemoji,fluent-emoji-flat}
Writes tiny/data/emoji.npz: images, outlined (N, R, R, 3) uint8, names (N,), styles (N,)
Params tiny/params.yaml: render
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np

from stages.lib.data.emoji_art import render_svg_array, short_name
from tiny.recipe import read_params

STYLES = {"noto": "noto", "twemoji": "twemoji", "fluent-emoji-flat": "fluent"}
ARTWORK = Path("tiny/node_modules/@iconify-json")
OUTPUT = Path("tiny/data/emoji.npz")


# Inherited by every shape that sets none itself: the autoencoder has to learn black line art, and
# these sets hardly have any.
OUTLINE = 'stroke="#000" stroke-width="{width}" stroke-linejoin="round" stroke-linecap="round"'
OUTLINE_WIDTH = 2 / 72  # of the drawing's side


def drawings(package: Path) -> dict[str, tuple[str, str]]:
    """Short name -> SVG text of one icon set, as drawn and with black outlines."""
    icon_set = json.loads((package / "icons.json").read_text())
    codepoints = json.loads((package / "chars.json").read_text())
    width, height = icon_set["width"], icon_set["height"]
    svgs = {}
    for points, icon in sorted(codepoints.items()):
        name = short_name(points)
        if name is None or icon not in icon_set["icons"]:
            continue
        entry = icon_set["icons"][icon]
        wide, high = entry.get("width", width), entry.get("height", height)
        side = max(wide, high)
        left = entry.get("left", 0) - (side - wide) / 2
        top = entry.get("top", 0) - (side - high) / 2
        head = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {side} {side}">'
        )
        outline = OUTLINE.format(width=OUTLINE_WIDTH * side)
        body = entry["body"]
        svgs[name] = (f"{head}{body}</svg>", f"{head}<g {outline}>{body}</g></svg>")
    return svgs


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    resolution = read_params("render")["resolution"]
    images, outlined, names, styles = [], [], [], []
    for package, style in STYLES.items():
        for name, (svg, outlined_svg) in drawings(ARTWORK / package).items():
            images.append(render_svg_array(svg, resolution))
            outlined.append(render_svg_array(outlined_svg, resolution))
            names.append(name)
            styles.append(style)
        logging.info("%s: %d drawings", style, styles.count(style))
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        OUTPUT,
        images=np.stack(images),
        outlined=np.stack(outlined),
        names=np.array(names),
        styles=np.array(styles),
    )


if __name__ == "__main__":
    main()
