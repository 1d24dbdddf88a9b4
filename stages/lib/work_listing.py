"""What the work directory holds: `python -m stages.lib.work_listing`.

No stage imports this module, so that another way to show it reruns nothing.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from stages.lib.errors import StageError
from stages.lib.work import Block
from stages.lib.work_directory import (
    RECIPE,
    Unit,
    format_bytes,
    max_work_bytes,
    recipe_directories,
    units,
    work_root,
)


def listing(root: Path) -> Iterator[str]:
    """The total and the bound; then two lines a directory: how much, how old, and made with what."""
    held = {directory: units(directory) for directory in recipe_directories(root)}
    bound = max_work_bytes()
    total = format_bytes(sum(unit.num_bytes for found in held.values() for unit in found))
    limit = "not bounded (SD_WORK_MAX_BYTES is not set)" if bound is None else f"of {format_bytes(bound)}"
    yield f"{root}: {total} {limit}"
    for directory, found in held.items():
        num_bytes = format_bytes(sum(unit.num_bytes for unit in found))
        last_used = max((unit.last_used for unit in found), default=None)
        yield (
            f"{directory.relative_to(root)}  {_count(found)}  {num_bytes}"
            f"  last used {_when(last_used) if last_used is not None else 'never'}"
        )
        if (directory / RECIPE).is_file():
            recipe = json.loads((directory / RECIPE).read_text(encoding="utf-8"))
            yield f"    {', '.join(f'{name} {_short(value)}' for name, value in recipe.items())}"


def _count(found: list[Unit]) -> str:
    paths = [path for unit in found for path in unit.paths]
    if any(path.suffix == ".pt" for path in paths):
        return f"checkpoints {', '.join(path.stem for path in paths)}"
    return f"{len({key for path in paths for key in _keys(path)})} rows"


def _keys(path: Path) -> list[str]:
    try:
        with Block(path) as block:
            return block.keys
    except (OSError, ValueError):  # gone or damaged; the stage that uses it says so
        return []


def _when(nanoseconds: int) -> str:
    return datetime.datetime.fromtimestamp(nanoseconds / 1e9).isoformat(" ", timespec="seconds")


def _short(value: object) -> str:
    """A value on one line; of a hash its beginning."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:8] if len(text) == 64 else text


if __name__ == "__main__":
    try:
        print("\n".join(listing(work_root())))
    except StageError as error:
        sys.exit(str(error))
