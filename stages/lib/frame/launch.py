"""The processes of a stage: one, or as many as a launcher such as `accelerate launch` starts."""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import shlex
import shutil
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

from stages.lib.frame.errors import StageError
from stages.lib.frame.locks import LOCKS, make_directory
from stages.lib.frame.work_directory import work_root

logger = logging.getLogger(__name__)
PATIENCE_SECONDS = 10.0  # a network file system shows another node's new file after some seconds


def process_index() -> int:
    """Which of the stage's processes this is; the first alone holds the stage's lock."""
    return int(os.environ.get("RANK", "0"))


def num_processes() -> int:
    """How many processes run this stage."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def describe_lost_process(error: BaseException) -> str | None:
    """What to tell the user if ``error`` comes of another process of the stage having ended, else None."""
    if num_processes() == 1:
        return None
    from torch.distributed import DistError  # slow to load, and loaded where there are several processes

    texts = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "gloo",
        "NCCL",
        "TCPStore",
    )
    if not isinstance(error, DistError | RuntimeError | OSError):
        return None
    if not isinstance(error, DistError) and not any(text in str(error) for text in texts):
        return None
    first_line = str(error).strip().split("\n")[0]
    return (
        f"another of the {num_processes()} processes has ended, or cannot be reached ({first_line}); its own "
        "message says why. Run again: what is finished is kept"
    )


def end_failed(message: str) -> NoReturn:
    """End this process with ``message`` and status 1.

    One of several processes ends at once: its connections have threads, and one that is still there when
    Python takes itself apart ends the process by a signal, with a message of the C++ library.
    """
    if num_processes() == 1:
        sys.exit(message)
    sys.stdout.flush()
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


def disconnect() -> None:
    """End this process's connections to the others, if it has any, and with them their threads."""
    distributed = sys.modules.get("torch.distributed")
    if num_processes() > 1 and distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


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
    return {"checkout": LOCKS, "work directory": work_root() / "locks"}


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


def launch_command() -> list[str] | None:
    """What ``SD_LAUNCH`` makes of this command; None if it is not set or has done its work.

    `accelerate launch` and `torchrun` both take ``-m module``, set RANK, WORLD_SIZE, LOCAL_RANK and
    LOCAL_WORLD_SIZE in every process, and end all of them, with an exit status of 1, when one fails.

    Raises:
        StageError: if ``SD_LAUNCH`` names no program.
    """
    launcher = os.environ.get("SD_LAUNCH", "").strip()
    if not launcher or "RANK" in os.environ or "WORLD_SIZE" in os.environ:
        return None
    try:
        words = shlex.split(launcher)
    except ValueError as error:
        raise StageError(f"SD_LAUNCH: {launcher!r} cannot be split into words: {error}") from error
    if not shutil.which(words[0]):
        raise StageError(
            f"SD_LAUNCH: expected a command such as `accelerate launch --num_processes 2`, but there is "
            f"no program {words[0]!r} on PATH; install it or correct SD_LAUNCH"
        )
    spec = sys.modules["__main__"].__spec__
    return [*words, *(["-m", spec.name] if spec else sys.argv[:1]), *sys.argv[1:]]


def launch(command: list[str]) -> None:
    """Replace this process by ``command``; it has the same process id, and does not return."""
    logger.info("starting `%s`", shlex.join(command))
    sys.stdout.flush()
    sys.stderr.flush()
    # A launcher that finds one device starts one process, without RANK: it must not launch again.
    environment = {name: value for name, value in os.environ.items() if name != "SD_LAUNCH"}
    # On CPUs, accelerate takes each of several processes for the only one unless it is told.
    if "ACCELERATE_USE_CPU" not in environment and not _has_accelerator():
        environment["ACCELERATE_USE_CPU"] = "true"
    os.execvpe(command[0], command, environment)


def _has_accelerator() -> bool:
    import torch  # slow to load, and the stages that launch have loaded it

    return torch.accelerator.is_available()
