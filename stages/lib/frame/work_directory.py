"""The work directory: where it is, who uses what in it, and how much it may hold.

Rows lie in ``<root>/<stage>/<recipe>/<hash>.safetensors``, checkpoints in
``<root>/train/<run>/{step,best}-<n>.safetensors``, unpacked archives in ``<root>/extracted/<name>``.
A process holds a shared lock on each such directory while it uses it; the kernel drops the lock when
the process dies, however it dies. ``SD_WORK_MAX_BYTES`` bounds the sum of all rows and checkpoints:
the least recently used are dropped first, and never from a directory in use.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import logging
import math
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from stages.lib.frame.errors import StageError
from stages.lib.frame.locks import lies_at, make_directory, open_lock, try_lock

logger = logging.getLogger(__name__)
USE_LOCK, OWNER = "lock", "owner"
EXTRACTED = "extracted"
RECIPE = "recipe.json"
_HASH = "[0-9a-f]" * 20
_BLOCKS = f"{'?' * 32}.safetensors"
# With those of earlier versions, and what was found damaged.
_CHECKPOINTS = ("*-????????.safetensors", "*-????????.pt", "*.damaged")
_MINUTE, _DAY = 60 * 10**9, 24 * 60 * 60  # nanoseconds, seconds
_last_mark = 0


def work_root() -> Path:
    """The directory of caches and checkpoints: ``SD_WORK``, or ``.work`` of the main checkout.

    `dvc exp run --temp` and queued runs work in ``.dvc/tmp/exps/<name>``; they share the main
    checkout's directory, so that what is encoded once is encoded once.
    """
    if configured := os.environ.get("SD_WORK"):
        return Path(configured).resolve()
    here = Path.cwd().resolve()
    for parent in here.parents:
        if parent.parts[-3:] == (".dvc", "tmp", "exps"):
            return parent.parents[2] / ".work"
    return here / ".work"


def check_work_directory() -> None:
    """Raise StageError where this user cannot work in it: another's, a read-only one, no directory."""
    root = work_root()
    try:
        make_directory(root)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StageError(
            f"{root}: expected a work directory that this user may write to, got: "
            f"{error.strerror or error}; let SD_WORK name another directory, or change its owner or modes"
        ) from error


def max_work_bytes() -> int | None:
    """``SD_WORK_MAX_BYTES``: bytes, or with K, M, G or T powers of 1024; None if it is not set.

    Raises:
        StageError: if it is anything else.
    """
    configured = os.environ.get("SD_WORK_MAX_BYTES", "").strip()
    if not configured:
        return None
    found = re.fullmatch(r"([0-9]+)([KMGT]?)", configured.upper())
    if not found:
        raise StageError(
            f"SD_WORK_MAX_BYTES: expected a whole number of bytes, or one with K, M, G or T (powers of "
            f"1024) such as 20G, found {configured!r}"
        )
    return int(found[1]) * 1024 ** " KMGT".index(found[2] or " ")


def use(directory: Path) -> IO[bytes]:
    """Make ``directory`` and keep it from being trimmed until the returned file is closed."""
    while True:
        try:
            handle = open_lock(directory / USE_LOCK)
        except FileNotFoundError:  # trimmed since it was made
            continue
        fcntl.flock(handle, fcntl.LOCK_SH)
        if lies_at(handle, directory / USE_LOCK):
            return handle
        handle.close()


@contextlib.contextmanager
def extraction() -> Iterator[Path]:
    """An empty directory of the work directory to unpack an archive in, removed at the end.

    What a killed process has left of its own is removed by the next one.
    """
    remove_abandoned_extractions(work_root())
    directory = work_root() / EXTRACTED / uuid.uuid4().hex
    with use(directory):
        (directory / "files").mkdir()
        try:
            yield directory / "files"
        finally:
            shutil.rmtree(directory, ignore_errors=True)


def extractions(root: Path) -> list[Path]:
    """Directories in which archives are, or were, unpacked."""
    return sorted(path for path in root.glob(f"{EXTRACTED}/*") if path.is_dir())


def remove_abandoned_extractions(root: Path) -> None:
    """Remove what was unpacked by processes that are gone."""
    for directory in extractions(root):
        try:
            with open(directory / USE_LOCK, "rb") as handle:
                if try_lock(handle):
                    shutil.rmtree(directory, ignore_errors=True)
        except FileNotFoundError:  # just made, or of an earlier version
            with contextlib.suppress(FileNotFoundError):
                if time.time() - directory.stat().st_mtime > _DAY:
                    shutil.rmtree(directory, ignore_errors=True)
        except OSError:  # another user's
            continue


def mark_used(path: Path) -> None:
    """Set the time of a file's last use, its modification time, to now: later than any mark before."""
    global _last_mark
    _last_mark = max(time.time_ns(), _last_mark + 1)
    with contextlib.suppress(PermissionError, FileNotFoundError):  # another user's, or removed by another run
        os.utime(path, ns=(_last_mark, _last_mark))


@dataclass(frozen=True)
class Unit:
    """What is dropped as a whole: a block of rows, or the checkpoints of a run."""

    directory: Path
    paths: tuple[Path, ...]
    num_bytes: int
    last_used: int  # nanoseconds since 1970


def recipe_directories(root: Path) -> list[Path]:
    """The directories of rows and of checkpoints below the work directory."""
    return sorted(path for path in root.glob(f"*/{_HASH}") if path.is_dir())


def directory_bytes(directory: Path) -> int:
    """Bytes of all files below a directory."""
    found = 0
    for path in directory.rglob("*"):
        with contextlib.suppress(OSError):  # removed meanwhile
            found += path.lstat().st_size if path.is_file() else 0
    return found


def units(directory: Path) -> list[Unit]:
    """What a directory of rows or checkpoints holds."""
    blocks = [(path,) for path in sorted(directory.glob(_BLOCKS))]
    checkpoints = tuple(sorted(path for pattern in _CHECKPOINTS for path in directory.glob(pattern)))
    found = []
    for paths in [*blocks, checkpoints] if checkpoints else blocks:
        with contextlib.suppress(FileNotFoundError):  # removed by its owner meanwhile
            stats = [path.stat() for path in paths]
            num_bytes = sum(stat.st_size for stat in stats)
            found.append(Unit(directory, paths, num_bytes, max(stat.st_mtime_ns for stat in stats)))
    return found


def trim(root: Path, num_bytes: int = 0, used_since: float = math.inf) -> int:
    """Drop what was least recently used until ``num_bytes`` more fit into the bound.

    A sixty-fourth of the bound is freed beyond that, so that a full directory is not looked through
    at every write. Directories in use, by this process or another, are left alone even if that
    leaves more than the bound. Directories that hold nothing are removed.

    Args:
        root: the work directory.
        num_bytes: about to be written.
        used_since: nanoseconds since 1970; what was used then or later is kept.

    Returns:
        The bytes that rows and checkpoints now hold.
    """
    bound = max_work_bytes()
    remove_abandoned_extractions(root)
    with contextlib.ExitStack() as locks:
        turn = locks.enter_context(open_lock(root / "locks" / "trim"))
        fcntl.flock(turn, fcntl.LOCK_EX)
        unused = _Unused(locks)
        directories = recipe_directories(root)
        kept = sorted(
            (_dated(unit) for directory in directories for unit in units(directory)),
            key=lambda unit: (unit.last_used, unit.paths),
        )
        held = sum(unit.num_bytes for unit in kept)
        if bound is not None and held + num_bytes > bound:
            excess = held + num_bytes - (bound - bound // 64)
            held -= _drop([unit for unit in kept if unit.last_used < used_since], excess, unused)
        for directory in directories:
            if _is_empty(directory) and unused.take(directory):
                _remove(directory)
    return held


class Room:
    """Room for one writer in the work directory.

    Each look through the directory grants a sixty-fourth of the bound, so that writing many small
    blocks does not list all blocks each time, and several writers overshoot by no more than that each.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._granted = 0

    def make(self, num_bytes: int) -> None:
        """Drop what was least recently used if ``num_bytes`` more would exceed the bound."""
        bound = max_work_bytes()
        if bound is None:
            return
        if num_bytes > self._granted:
            held = trim(self._root, num_bytes)
            beyond = min(bound - held - num_bytes, bound // 64)
            self._granted = num_bytes + (beyond if beyond >= 0 else held // 64)
        self._granted -= num_bytes


def format_bytes(num_bytes: float) -> str:
    """In the largest unit of 1024 that leaves at least one."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.1f} {unit}" if unit != "bytes" else f"{num_bytes:.0f} bytes"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def _dated(unit: Unit) -> Unit:
    """A unit as it counts: a time that is still to come tells nothing, so it goes first."""
    is_past = unit.last_used <= time.time_ns() + _MINUTE
    return unit if is_past else dataclasses.replace(unit, last_used=0)


class _Unused:
    """Directories that no process uses, locked until the end of ``locks``."""

    def __init__(self, locks: contextlib.ExitStack) -> None:
        self._locks = locks
        self._taken: dict[Path, bool] = {}

    def take(self, directory: Path) -> bool:
        """Lock ``directory``; False, at once, if a process uses it."""
        if directory not in self._taken:
            self._taken[directory] = self._lock(directory)
        return self._taken[directory]

    def _lock(self, directory: Path) -> bool:
        path = directory / USE_LOCK
        try:
            handle = self._locks.enter_context(open_lock(path))
            return try_lock(handle) and lies_at(handle, path)
        except OSError:
            return False


def _drop(oldest_first: list[Unit], num_bytes: int, unused: _Unused) -> int:
    dropped = count = 0
    for unit in oldest_first:
        if dropped >= num_bytes:
            break
        if unused.take(unit.directory):
            try:
                for path in unit.paths:
                    path.unlink(missing_ok=True)
            except PermissionError:  # another user's
                continue
            dropped, count = dropped + unit.num_bytes, count + 1
    if count:
        logger.info("work directory: %d blocks or runs dropped, %s", count, format_bytes(dropped))
    return dropped


def _is_empty(directory: Path) -> bool:
    return not any(True for pattern in (_BLOCKS, *_CHECKPOINTS) for _ in directory.glob(pattern))


def _remove(directory: Path) -> None:
    # Another user's, or someone began to use it, or keeps files of their own there.
    with contextlib.suppress(OSError):
        for path in [
            directory / RECIPE,
            *directory.glob("*.partial"),
            directory / OWNER,
            directory / USE_LOCK,
        ]:
            path.unlink(missing_ok=True)
        directory.rmdir()
