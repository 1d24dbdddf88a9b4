"""Print what a store under data/ holds, and whether every file of it is as it was written.

`python -m stages.show_store data/latents.zarr`

Reads  one Zarr store
Writes nothing; exit status 1 if the store is not whole
Params none
"""

from __future__ import annotations

import argparse
import functools
import json
import textwrap
from pathlib import Path

import zarr

from stages.lib.frame.run import run_command
from stages.lib.store.shards import chunk_files, num_files
from stages.lib.store.zarr_store import arrays_of, open_store

MADE_BY = {
    "tokens.zarr": "tokenize",
    "captions.zarr": "encode_captions",
    "latents.zarr": "encode_images",
}


def describe(path: Path) -> str:
    """What a store holds, as text: attributes, and a line for each array."""
    group = zarr.open_group(path, mode="r")
    lines = [
        f"  {name}: {textwrap.shorten(json.dumps(value), 100)}"
        for name, value in group.attrs.items()
        if name != "files"
    ]
    for name, array in arrays_of(group):
        names = getattr(array.metadata, "dimension_names", None) or [""] * array.ndim
        sizes = ", ".join(f"{dim} {size}" for dim, size in zip(names, array.shape, strict=True))
        files = chunk_files(path, name)
        stored = f"chunks {array.chunks}" + (f" in shards {array.shards}" if array.shards else "")
        num_bytes = sum(file.stat().st_size for file in files)
        lines += [
            f"  {name}: {'text' if array.dtype.kind == 'T' else array.dtype}, {sizes}",
            f"    {stored}, {len(files)} of {num_files(array)} files, {num_bytes:,} bytes",
        ]
    return "\n".join([f"{path}", *lines])


def main(path: Path) -> None:
    """Print what a store holds.

    Raises:
        StageError: if it is not whole, or is none.
    """
    try:
        print(describe(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{path}: cannot be listed ({error})")
    open_store(path, MADE_BY.get(path.name, "<the stage that makes it>"))
    print("  complete, every file has the hash recorded when it was written")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m stages.show_store", description=__doc__.split("\n")[0])
    parser.add_argument("store", type=Path, help="e.g. data/latents.zarr")
    run_command("show_store", functools.partial(main, parser.parse_args().store))
