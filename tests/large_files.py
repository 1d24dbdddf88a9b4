"""Names the files over 1 MiB among its arguments; a hook before each commit."""

from __future__ import annotations

import sys
from pathlib import Path

MAX_BYTES = 2**20


def too_large(paths: list[str]) -> list[str]:
    """A line for each file over the limit."""
    sizes = {path: Path(path).stat().st_size for path in paths if Path(path).is_file()}
    return [
        f"{path}: {size:,} bytes, expected at most {MAX_BYTES:,}"
        for path, size in sizes.items()
        if size > MAX_BYTES
    ]


if __name__ == "__main__":
    sys.exit("\n".join(too_large(sys.argv[1:])) or 0)
