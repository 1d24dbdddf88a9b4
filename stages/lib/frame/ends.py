"""How a process of a stage ends: at once, without a traceback, and never later than what started it.

Whatever is written is whole or absent, so that nothing has to be tidied: an interrupted process ends as a
killed one does. A process that goes on alone would hold locks and write where another run is already writing.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SHELLS = ("ash", "bash", "dash", "fish", "ksh", "sh", "zsh")
_INTERRUPTED = 130
_TIDIES_QUIETLY = "ignore:resource_tracker"


def end_quietly() -> None:
    """What the package does first in a process of its own, a stage's or a worker's."""
    if "--multiprocessing-fork" in sys.orig_argv:  # `multiprocessing` itself knows its parent only later
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all: the parent ends, and this with it
        end_with_parent()
    elif sys.argv[0] == "-m" and started_by_another():
        end_with_parent()


def started_by_another() -> bool:
    """Whether DVC or a launcher started this process, and not a shell's user, who may want it to go on."""
    return any(name in os.environ for name in ("DVC_STAGE", "RANK"))


def end_with_parent() -> None:
    """Let the kernel kill this process when the one that started it ends, however it ends (on Linux).

    Where a shell stands between DVC and this process, it is DVC that is waited for.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = os.getppid()
    if _is_gone(parent):
        os._exit(1)
    if _command(parent) in _SHELLS and "DVC_STAGE" in os.environ:
        _watch(_parent_of(parent))


@contextmanager
def interruptible(name: str) -> Iterator[None]:
    """Within the block Ctrl-C ends the process with one line and status 130."""

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, f"\n{name}: interrupted; what is finished is kept\n".encode())
        os._exit(_INTERRUPTED)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def starting_workers() -> Iterator[None]:
    """Within the block no interrupt reaches this thread, nor ever a process that is started in it.

    The process that Python starts beside them to tidy up after a killed one does so without a word.
    """
    from multiprocessing import resource_tracker  # of use to those alone that start workers

    if _TIDIES_QUIETLY not in sys.warnoptions:
        sys.warnoptions.append(_TIDIES_QUIETLY)
    resource_tracker.ensure_running()  # lets interrupts through again, so it comes first
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _is_gone(parent: int) -> bool:
    """Whether the parent ended before this was asked, so that process 1 has taken its place."""
    return parent == 1 and not _command(1).startswith(("python", "accelerate", "torchrun", "dvc", *_SHELLS))


def _command(pid: int) -> str:
    """The name of a process's program; "" where that is not known."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def _parent_of(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 1


def _watch(pid: int) -> None:
    """End this process when ``pid`` ends."""
    if pid <= 1:
        return
    try:
        descriptor = os.pidfd_open(pid)
    except OSError:  # gone, or a kernel without it
        return

    def wait() -> None:
        select.select([descriptor], [], [])
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()
