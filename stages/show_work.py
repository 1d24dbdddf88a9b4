"""Print what the work directory holds: encoded rows and checkpoints, how old, and what they were made with.

`python -m stages.show_work`

Reads  the work directory, .work or SD_WORK
Writes nothing
Params none
"""

from __future__ import annotations

import argparse
import datetime
import json
from collections.abc import Iterator
from pathlib import Path

from stages.lib.core.files import read_json
from stages.lib.frame.run import run_command
from stages.lib.frame.work_directory import (
    RECIPE,
    Unit,
    directory_bytes,
    extractions,
    format_bytes,
    max_work_bytes,
    recipe_directories,
    units,
    work_root,
)
from stages.lib.store.blocks import Block


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
            recipe = read_json(directory / RECIPE, f"remove {directory}")
            yield f"    {', '.join(f'{name} {_short(value)}' for name, value in recipe.items())}"
    for directory in extractions(root):
        num_bytes = format_bytes(directory_bytes(directory))
        yield f"{directory.relative_to(root)}  an unpacked archive  {num_bytes}"


def _count(found: list[Unit]) -> str:
    paths = [path for unit in found for path in unit.paths]
    if any(path.stem[-9:-8] == "-" or path.suffix != ".safetensors" for path in paths):
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


def main() -> None:
    """Print the listing; StageError if SD_WORK_MAX_BYTES is no number of bytes."""
    print("\n".join(listing(work_root())))


if __name__ == "__main__":
    argparse.ArgumentParser(
        prog="python -m stages.show_work", description=__doc__.split("\n")[0]
    ).parse_args()
    run_command("show_work", main)
