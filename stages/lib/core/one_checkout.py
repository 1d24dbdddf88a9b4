"""What the processes of a stage have to share: one checkout, in which outputs lie, and one work directory."""

from __future__ import annotations

import contextlib
import platform
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from stages.lib.core.paths import DATA
from stages.lib.frame.errors import StageError
from stages.lib.frame.launch import num_processes, process_index
from stages.lib.frame.locks import make_directory
from stages.lib.frame.work_directory import work_root

PATIENCE_SECONDS = 10.0  # a network file system shows another node's new file after some seconds


def check_one_checkout() -> None:
    """Let every process look for a file that the first one makes, before any of them works.

    To be called by all processes at once, when they are connected.

    Raises:
        StageError: in every process, naming those that see another checkout or work directory.
    """
    if num_processes() == 1:
        return
    from accelerate.utils import broadcast_object_list, gather_object

    name = f"shared-{broadcast_object_list([uuid.uuid4().hex])[0]}"
    with _put_by_the_first(name):
        gather_object([0])  # the first process has put them there
        missing = [what for what, directory in _places().items() if not _appears(directory / name)]
        report = [(process_index(), platform.node(), str(Path.cwd()), missing)] if missing else []
        found = gather_object(report)
    if found:
        those = "; ".join(
            f"process {index} on {host} in {directory} sees another {' and another '.join(missing)}"
            for index, host, directory, missing in sorted(found)
        )
        raise StageError(
            f"expected all {num_processes()} processes in one checkout and one work directory, got: {those}. "
            "Let every node mount the checkout, run there, and let SD_WORK name one directory that all see"
        )


def _places() -> dict[str, Path]:
    return {"checkout": DATA / ".locks", "work directory": work_root() / "locks"}


@contextlib.contextmanager
def _put_by_the_first(name: str) -> Iterator[None]:
    """Files of that name in every place, made and removed by the first process."""
    places = list(_places().values()) if process_index() == 0 else []
    for directory in places:
        make_directory(directory)
        (directory / name).touch()
    try:
        yield
    finally:
        for directory in places:
            (directory / name).unlink(missing_ok=True)


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
        with contextlib.suppress(OSError):  # listing a directory makes a network file system look again
            list(path.parent.iterdir())
    return True
