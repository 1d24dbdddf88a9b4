"""Running a frozen encoder over what the work store lacks.

A row of a batch is bit-identical whatever its neighbours, but not across batch sizes or thread
counts. So every batch has the same shape, and on a CPU every worker process has one thread: the
bytes do not depend on the number of cores, and two such workers beat one process with two threads.

On a CPU each worker loads and encodes whole batches; a few batches are encoded in this process, in
threads that compute alone. On a GPU the workers load, and this process encodes. Either way a thread
of its own writes the blocks. Under `accelerate launch` each process encodes the rows whose keys fall
to it, and the first one assembles.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import functools
import hashlib
import itertools
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import torch
from accelerate import PartialState

from stages.lib.encoding.batches import Encoder, InProcess, compute_with_one_thread, is_finite
from stages.lib.frame.ends import starting_workers
from stages.lib.frame.errors import StageError
from stages.lib.frame.launch import check_one_checkout
from stages.lib.frame.progress import progress_bar
from stages.lib.frame.start_up import keep_freed_memory
from stages.lib.store.blocks import Row
from stages.lib.store.work_store import WorkStore

logger = logging.getLogger(__name__)
BLOCK_ROWS, GPU_BLOCK_ROWS = 64, 256
IN_PROCESS_ROWS = 32  # so few are encoded sooner than worker processes start
TO_CONNECT, TO_ENCODE = datetime.timedelta(minutes=10), datetime.timedelta(days=7)
MAX_LOADERS = 16  # more hold more memory, and a GPU encodes no faster


class Item(NamedTuple):
    """One row wanted.

    Attributes:
        key: of the row in the work store.
        name: of the sample, for errors.
        value: what `Encoder.load` takes; picklable.
        group: batches are made of one group: of inputs of one shape.
    """

    key: str
    name: str
    value: Any
    group: Hashable = None


def processes() -> PartialState:
    """This process among those of `accelerate launch`; the only one without it."""
    # On CPUs, accelerate takes each of several processes for the only one unless it is told.
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=TO_CONNECT)


@functools.cache
def _patient_group() -> Any:
    """All processes: one that has done its share may wait for days for another's."""
    return torch.distributed.new_group(timeout=TO_ENCODE, backend="gloo")


def _wait_for_everyone(state: PartialState) -> None:
    if state.num_processes > 1:
        torch.distributed.barrier(group=_patient_group())


def encode_missing(
    store: WorkStore,
    keys: Sequence[str],
    items_of: Callable[[set[str]], Iterable[Item]],
    encoder: Encoder,
    description: str,
    unit: str,
) -> None:
    """Encode what ``store`` lacks of ``keys``; afterwards it holds them all.

    Args:
        store: that gets the rows.
        keys: of all rows wanted; a key may come twice, for two samples with the same image.
        items_of: gives the items of the keys it is asked for, and may give others.
        description: shown at the progress bar.
        unit: what a row is, in the plural.

    Raises:
        StageError: naming every sample of a batch whose row holds a non-finite value, or if
            SD_WORKERS is no number of workers.
    """
    state = processes()
    check_one_checkout()
    if state.is_main_process:
        store.damaged(keys)
    _wait_for_everyone(state)
    store.refresh()
    missing = {key for key in keys if key not in store}
    mine = {key for key in missing if _falls_to(state, key)}
    reused = len(set(keys)) - len(missing)
    shown = state.is_local_main_process and bool(mine)
    with progress_bar(description, unit, reused + len(mine), reused, shown) as progress:
        progress.set_postfix(reused=reused, encoded=0, refresh=False)

        def done(count: int) -> None:
            progress.set_postfix(reused=reused, encoded=progress.n + count - reused, refresh=False)
            progress.update(count)

        _encode(store, _distinct(items_of(mine), mine), encoder, state.device.type, done)
    _wait_for_everyone(state)
    store.refresh()
    logger.info("%s: %d %s encoded, %d reused", description, len(missing), unit, reused)


def _falls_to(state: PartialState, key: str) -> bool:
    """Whether a row is this process's. The key alone decides: the processes need not agree on more."""
    number = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    return number % state.num_processes == state.process_index


def _distinct(items: Iterable[Item], wanted: set[str]) -> Iterator[Item]:
    left = set(wanted)
    for item in items:
        if item.key in left:
            left.remove(item.key)
            yield item


def _encode(
    store: WorkStore, items: Iterator[Item], encoder: Encoder, device: str, done: Callable[[int], object]
) -> None:
    """Encode and write.

    What a kill loses: on a CPU the rows in flight, two batches a worker, and those not yet written,
    together less than 64, or than 5/4 of those in flight if that is more. On a GPU rows in flight are
    only loaded, and a kill loses less than two blocks of 256 and a batch each.
    """
    num_workers = count_workers(device)
    ahead = 2 * num_workers
    in_flight = ahead * encoder.batch_size
    block_rows = max(BLOCK_ROWS - in_flight, in_flight // 4) if device == "cpu" else GPU_BLOCK_ROWS
    pending: dict[Hashable, list[tuple[Item, Row]]] = collections.defaultdict(list)
    with ThreadPoolExecutor(1) as writer:
        writing: Future[None] | None = None

        def write(group: Hashable) -> Future[None]:
            if writing is not None:
                writing.result()
            block = pending.pop(group)
            return writer.submit(store.put, [item.key for item, _ in block], [row for _, row in block])

        for batch, rows in _encoded(_batches(items, encoder.batch_size), encoder, device, num_workers, ahead):
            _check_finite(batch, rows, encoder.dtype)
            group = batch[0].group
            pending[group] += zip(batch, rows, strict=True)
            done(len(batch))
            if sum(map(len, pending.values())) >= block_rows:
                writing = write(max(pending, key=lambda name: len(pending[name])))
                if device == "cpu":
                    writing.result()  # the workers go on meanwhile
        for group in list(pending):
            writing = write(group)
        if writing is not None:
            writing.result()


def count_workers(device: str) -> int:
    """``SD_WORKERS``, or this process's share of the cores that it may use; on a GPU at most 16 of them.

    Raises:
        StageError: if SD_WORKERS is not a whole number of 1 or more.
    """
    if configured := os.environ.get("SD_WORKERS", "").strip():
        if not configured.isdecimal() or int(configured) == 0:
            raise StageError(
                f"SD_WORKERS: expected the number of encoder processes, 1 or more, got {configured!r}; "
                "unset it for one a core"
            )
        return int(configured)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return share if device == "cpu" else min(share, MAX_LOADERS)


def _batches(items: Iterator[Item], batch_size: int) -> Iterator[list[Item]]:
    """Batches of one group each, in the order in which they fill."""
    waiting: dict[Hashable, list[Item]] = collections.defaultdict(list)
    for item in items:
        waiting[item.group].append(item)
        if len(waiting[item.group]) == batch_size:
            yield waiting.pop(item.group)
    yield from waiting.values()


def _check_finite(batch: list[Item], rows: list[Row], dtype: str) -> None:
    names = [item.name for item, row in zip(batch, rows, strict=True) if not is_finite(row)]
    if names:
        tried = "" if dtype == "float32" else f" in {dtype} and again in float32"
        raise StageError(
            f"non-finite values in the encoding of {', '.join(names)}{tried}; look at these inputs"
            " and at the encoder's weights"
        )


def _encoded(
    batches: Iterator[list[Item]], encoder: Encoder, device: str, num_workers: int, ahead: int
) -> Iterator[tuple[list[Item], list[Row]]]:
    """Batches with their rows: on the GPU, in this process if there are few, else in worker processes.

    Without batches no encoder is built: its libraries are slow to load.
    """
    few = -(-IN_PROCESS_ROWS // encoder.batch_size)
    first = list(itertools.islice(batches, few + 1))
    if not first:
        return
    batches = itertools.chain(first, batches)
    if device != "cpu":
        in_process = InProcess(encoder, device)
        for batch, inputs in _map_in_workers(_load_in_worker, batches, encoder, num_workers, ahead):
            yield batch, in_process.rows(inputs)
    elif len(first) <= few:
        yield from _map_in_threads(first, encoder, num_workers)
    else:
        yield from _map_in_workers(_encode_in_worker, batches, encoder, num_workers, ahead)


def _map_in_threads(
    batches: list[list[Item]], encoder: Encoder, num_workers: int
) -> Iterator[tuple[list[Item], list[Row]]]:
    in_process = InProcess(encoder, "cpu")

    def encoded(batch: list[Item]) -> list[Row]:
        return in_process.rows([encoder.load(item.value) for item in batch])

    # Each of these threads computes alone, as a worker process does.
    with (
        _thread_count_kept(),
        ThreadPoolExecutor(num_workers, initializer=compute_with_one_thread) as pool,
    ):
        yield from zip(batches, pool.map(encoded, batches), strict=True)


_worker: Encoder
_worker_encoder: InProcess


def _map_in_workers(
    function: Callable[[list[Any]], Any],
    batches: Iterator[list[Item]],
    encoder: Encoder,
    num_workers: int,
    ahead: int,
) -> Iterator[tuple[list[Item], Any]]:
    context = multiprocessing.get_context("spawn")
    encodes = function is _encode_in_worker
    running: collections.deque[tuple[list[Item], Future[Any]]] = collections.deque()
    with starting_workers():
        workers = ProcessPoolExecutor(num_workers, context, _start_worker, (encoder, encodes))
    with workers as pool:
        try:
            for batch in batches:
                with starting_workers():  # the first one starts the workers
                    running.append((batch, pool.submit(function, [item.value for item in batch])))
                if len(running) >= ahead:
                    done, future = running.popleft()
                    yield done, future.result()
            while running:
                done, future = running.popleft()
                yield done, future.result()
        except BrokenProcessPool as error:
            raise StageError(
                f"an encoder process was killed, probably for memory; {num_workers} ran at once: "
                "lower SD_WORKERS or the stage's batch_size, and run again: what is encoded is kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _thread_count_kept() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _start_worker(encoder: Encoder, encodes: bool) -> None:
    global _worker, _worker_encoder
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    keep_freed_memory()
    compute_with_one_thread()
    _worker = encoder
    if encodes:
        _worker_encoder = InProcess(encoder, "cpu")


def _exit_with_parent() -> None:
    # A stage that is killed cannot stop its workers, which would hold their memory for ever.
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _encode_in_worker(values: list[Any]) -> list[Row]:
    return _worker_encoder.rows([_worker.load(value) for value in values])


def _load_in_worker(values: list[Any]) -> list[Any]:
    return [_worker.load(value) for value in values]
