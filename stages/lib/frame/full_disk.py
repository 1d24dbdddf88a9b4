"""A full disk, found behind whatever error a library made of it."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from stages.lib.frame.work_directory import work_root


def describe_full_disk(error: BaseException) -> str | None:
    """What to tell the user if a full disk is behind ``error``, else None."""
    causes = [cause for cause in _causes(error) if _says_disk_full(cause)]
    if not causes:
        return None
    named = [cause.filename for cause in causes if isinstance(cause, OSError) and cause.filename]
    # Where the error names no file, it is the fullest of those that stages write to.
    places = [Path(named[0])] if named else [Path("data"), work_root(), Path(tempfile.gettempdir())]
    if no_names := [place for place in map(_existing, places) if _free_inodes(place) == 0]:
        place = no_names[0]
        return (
            f"no inode is left on the disk of {named[0] if named else place} (file system "
            f"{_mount_point(place)}, {_free_bytes(place):,} bytes free, but no room for another file): "
            f"{causes[0]}. What is finished is kept. Remove files there, or move the work directory with "
            "SD_WORK, and run again"
        )
    place = min(map(_existing, places), key=_free_bytes)
    return (
        f"no space is left on the disk of {named[0] if named else place} (file system "
        f"{_mount_point(place)}, {_free_bytes(place):,} bytes free): {causes[0]}. What is finished is kept. "
        "Free space there, or bound the work directory with SD_WORK_MAX_BYTES or move it with SD_WORK, "
        "and run again"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """``error`` and what it was raised from or while handling."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        cause = waiting.pop()
        if cause is not None and id(cause) not in seen:
            seen.add(id(cause))
            yield cause
            waiting += [cause.__context__, cause.__cause__, *getattr(cause, "exceptions", ())]


def _says_disk_full(error: BaseException) -> bool:
    codes = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, OSError) and error.errno in codes:
        return True
    return any(os.strerror(code) in str(error) for code in codes)  # safetensors and others lose the number


def _existing(path: Path) -> Path:
    path = path.resolve()
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _mount_point(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if os.path.ismount(parent))


def _free_inodes(path: Path) -> int | None:
    """None where a file system does not count them."""
    found = os.statvfs(path)
    return found.f_favail if found.f_files else None


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(path).free
