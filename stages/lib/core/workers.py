"""Functions run over many things in worker processes, in order and a few ahead."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from stages.lib.frame.ends import starting_workers
from stages.lib.frame.errors import StageError

T = TypeVar("T")
R = TypeVar("R")


def count_cores() -> int:
    """``SD_WORKERS``, or this process's share of the cores that it may use.

    Raises:
        StageError: if SD_WORKERS is not a whole number of 1 or more.
    """
    if configured := os.environ.get("SD_WORKERS", "").strip():
        if not configured.isdecimal() or int(configured) == 0:
            raise StageError(
                f"SD_WORKERS: expected the number of worker processes, 1 or more, got {configured!r}; "
                "unset it for one a core"
            )
        return int(configured)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def map_in_order(
    function: Callable[[T], R], things: Iterable[T], num_workers: int, ahead: int, in_processes: bool
) -> Iterator[tuple[T, R]]:
    """Each thing and ``function`` of it, in their order; ``things`` is read ``ahead`` of what is taken.

    Args:
        function: of a module's top level where processes are asked for, as things and results are pickled.
        things: read by the calling thread alone.
        num_workers: threads or processes.
        ahead: things in memory at a time, at most.
        in_processes: else threads.

    Raises:
        StageError: if a process is killed.
    """
    if in_processes:
        with starting_workers():
            pool: ProcessPoolExecutor | ThreadPoolExecutor = ProcessPoolExecutor(
                num_workers, multiprocessing.get_context("spawn")
            )
    else:
        pool = ThreadPoolExecutor(num_workers)
    running: deque[tuple[T, Future[R]]] = deque()
    try:
        for number, thing in enumerate(things):
            with starting_workers() if number < num_workers else contextlib.nullcontext():  # these start them
                running.append((thing, pool.submit(function, thing)))
            if len(running) >= ahead:
                done, future = running.popleft()
                yield done, future.result()
        while running:
            done, future = running.popleft()
            yield done, future.result()
    except BrokenProcessPool as error:
        raise StageError(
            f"a worker process was killed, probably for memory; {num_workers} ran at once: lower SD_WORKERS, "
            "and run again"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
