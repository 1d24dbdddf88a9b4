"""Files that are whole or absent, and directories that hold one run's output alone."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from stages.lib.frame.errors import StageError

_DAY = 24 * 60 * 60  # seconds


def fresh_directory(path: Path) -> Path:
    """Empty ``path`` for a stage's output; nothing of an earlier or killed run stays in it."""
    if path.is_dir():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    return path


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write a metrics file: sorted keys, one value a line, the same bytes for the same values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


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
    """A file to write, which is there as a whole and durable at the end, and after an error not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}@{platform.node()}.partial")
    try:
        with open(partial, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)
        _sync_directory(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # writing to a full disk does not name it
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it is whole or absent, and durable when this returns."""
    with open_atomically(path) as handle:
        handle.write(content)


def remove_partials(directory: Path) -> None:
    """Remove what killed processes were writing, and what another host began more than a day ago."""
    for partial in directory.glob("*.partial"):
        writer, _, host = partial.name.removesuffix(".partial").rpartition("@")
        with contextlib.suppress(FileNotFoundError):  # finished meanwhile
            if host == platform.node():
                abandoned = not _is_alive(int(writer.rpartition(".")[2]))
            else:
                abandoned = time.time() - partial.stat().st_mtime > _DAY
            if abandoned:
                partial.unlink()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
