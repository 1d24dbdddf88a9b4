"""Files that are whole or absent, and directories that hold one run's output alone."""

from __future__ import annotations

import contextlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from stages.lib.frame.errors import StageError, is_printable
from stages.lib.frame.inputs import remove
from stages.lib.frame.locks import follow_group, lies_at, try_lock

_DAY = 24 * 60 * 60  # seconds


def fresh_directory(path: Path) -> Path:
    """Empty ``path`` for a stage's output; nothing of an earlier or killed run stays in it."""
    remove(path)
    path.mkdir(parents=True)
    return path


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a metrics file: sorted keys, one value a line, the same bytes for the same values."""
    write_text(path, json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def write_json_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSON object a line; what no terminal should get, or ends a line for some, is escaped."""
    write_text(path, "".join(_escaped(json.dumps(row, ensure_ascii=False)) + "\n" for row in rows))


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; another name of the file that was there keeps what it holds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.encode())


def _escaped(text: str) -> str:
    """JSON in which all that is not printable is escaped, halves of surrogate pairs too."""
    return "".join(each if is_printable(each) else json.dumps(each)[1:-1] for each in text)


def read_json(path: Path, remedy: str = "fetch or make it again") -> dict[str, Any]:
    """A JSON object.

    Args:
        path: of the file.
        remedy: the end of the error's text.

    Raises:
        StageError: if there is no such file, or it holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StageError(f"{path}: not found; {remedy}") from error
    except (ValueError, RecursionError) as error:
        raise StageError(f"{path}: not valid JSON: {error}; {remedy}") from error
    if not isinstance(values, dict):
        raise StageError(f"{path}: expected a JSON object, got {type(values).__name__}; {remedy}")
    return values


@contextlib.contextmanager
def open_atomically(path: Path) -> Iterator[IO[bytes]]:
    """A file to write, which is there as a whole and durable at the end, and after an error not at all.

    It is locked while it is written, so that nobody takes it for one that a killed process has left.
    """
    partial, handle = _new_partial(path)
    try:
        with handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
            partial.replace(path)  # before it is closed, and so unlocked
        _sync_directory(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # writing to a full disk does not name it
        raise


def _new_partial(path: Path) -> tuple[Path, IO[bytes]]:
    """A file of a name that nobody else takes, on whatever host and in whatever container, and its lock."""
    while True:
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        handle = open(partial, "xb")  # noqa: SIM115
        with contextlib.suppress(OSError):  # a file system without locks
            if not try_lock(handle):
                handle.close()
                continue
        if lies_at(handle, partial):
            follow_group(partial)
            return partial, handle
        handle.close()  # removed before it was locked


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is whole or absent, and durable when this returns."""
    with open_atomically(path) as handle:
        handle.write(content)


def remove_partials(directory: Path) -> None:
    """Remove what killed processes were writing: what nobody holds a lock on."""
    for partial in directory.glob("*.partial"):
        # Finished meanwhile, or another user's.
        with contextlib.suppress(FileNotFoundError, PermissionError), open(partial, "rb") as handle:
            if _is_abandoned(handle):
                partial.unlink()  # still locked: its name is nobody's to take


def _is_abandoned(handle: IO[bytes]) -> bool:
    try:
        return try_lock(handle)
    except OSError:  # a file system without locks
        return time.time() - os.fstat(handle.fileno()).st_mtime > _DAY


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
