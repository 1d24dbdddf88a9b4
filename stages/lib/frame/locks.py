"""Files that processes and users share: locks that end with their holder, and modes that let a group in."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import logging
import os
import shlex
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)
LOCKS = Path("data", ".locks")  # beside what a stage writes: whoever sees the one sees the other
_OF_THE_GROUP = stat.S_IRGRP | stat.S_IWGRP


@contextlib.contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold an advisory lock on ``path``; wait, naming the holder, while another process has it.

    The next run must not write beside a stage that still runs. The kernel drops the lock when its
    holder dies, however it dies.
    """
    with open_lock(path) as handle:
        if not try_lock(handle):
            logger.warning("waiting for its end: %s is being run by %s; lock %s", what, holder(path), path)
            fcntl.flock(handle, fcntl.LOCK_EX)
        sign(handle)
        yield


def open_lock(path: Path) -> IO[bytes]:
    """The file of a lock, made where there is none; another user's is only read, and locks as well."""
    make_directory(path.parent)
    try:
        handle = open(path, "ab", buffering=0)  # noqa: SIM115
    except PermissionError:
        return open(path, "rb", buffering=0)
    follow_group(path)
    return handle


def try_lock(handle: IO[bytes], kind: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file at once; False while another process, or another open file of this one, has it."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sign(handle: IO[bytes]) -> None:
    """Write who holds a lock into its file, for those that wait."""
    since = datetime.datetime.now().isoformat(" ", timespec="seconds")
    text = f"process {os.getpid()} since {since} (`{shlex.join(sys.orig_argv)}`)"
    with contextlib.suppress(OSError):  # another user's file, or a full disk: only a courtesy
        handle.truncate(0)
        handle.write(text.encode())


def holder(path: Path) -> str:
    """Who says to hold a lock."""
    try:
        return path.read_text(encoding="utf-8", errors="replace") or "?"
    except OSError:
        return "?"


def lies_at(handle: IO[bytes], path: Path) -> bool:
    """Whether an open file is still the one at ``path``: it may have been removed before it was locked."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def make_directory(path: Path) -> None:
    """A directory with its parents, each with the modes that its own parent gives its group."""
    if path.is_dir():
        return
    make_directory(path.parent)
    try:
        path.mkdir()
    except FileExistsError:
        if not path.is_dir():
            raise NotADirectoryError(20, os.strerror(20), str(path)) from None
        return
    follow_group(path)


def follow_group(path: Path) -> None:
    """Let the group write to a new file or directory where it may write to the directory around it."""
    around = path.parent.stat().st_mode
    if not around & stat.S_IWGRP:
        return
    mode = path.stat().st_mode
    wanted = mode | _OF_THE_GROUP
    if stat.S_ISDIR(mode):
        wanted |= stat.S_IXGRP | (around & stat.S_ISGID)
    if wanted != mode:
        with contextlib.suppress(PermissionError):  # another user's, who has set what it should be
            path.chmod(stat.S_IMODE(wanted))
