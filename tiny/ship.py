"""Copy the assembled pipeline to where it ships, data/tiny, beside its model card.

Reads  tiny/data/base
Writes data/tiny (all but README.md)
"""

from __future__ import annotations

import shutil
from pathlib import Path

ASSEMBLED, SHIPPED = Path("tiny/data/base"), Path("data/tiny")
MAX_BYTES = 25_000_000


def main() -> None:
    size = sum(file.stat().st_size for file in ASSEMBLED.rglob("*") if file.is_file())
    if size > MAX_BYTES:
        raise SystemExit(f"{ASSEMBLED}: {size} bytes, at most {MAX_BYTES} may ship")
    for source in ASSEMBLED.iterdir():
        target = SHIPPED / source.name
        if target.is_dir():
            shutil.rmtree(target)
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            SHIPPED.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


if __name__ == "__main__":
    main()
