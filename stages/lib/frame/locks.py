"""Locks that the kernel drops when their holder dies."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import logging
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold an advisory lock on ``path``; wait, naming the holder, while another process has it.

    Killing dvc leaves its stage running: the next run must not write beside it. The kernel
    drops the lock when its holder dies, however it dies.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            logger.warning(
                "waiting for its end: %s is being run by %s; lock %s", what, handle.read() or "?", path
            )
            fcntl.flock(handle, fcntl.LOCK_EX)
        since = datetime.datetime.now().isoformat(" ", timespec="seconds")
        handle.seek(0)
        handle.truncate()
        handle.write(f"process {os.getpid()} since {since} (`{shlex.join(sys.orig_argv)}`)")
        handle.flush()
        yield


def lies_at(handle: IO[bytes], path: Path) -> bool:
    """Whether an open file is still the one at ``path``: it may have been removed before it was locked."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False
