"""Running a frozen encoder over what the work store lacks.

A row of a batch is bit-identical whatever its neighbours, but not across batch sizes or thread
counts. So every batch has the same shape, and on a CPU every worker process has one thread: the
bytes do not depend on the number of cores, and two such workers beat one process with two threads.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import numpy as np
import torch

from stages.lib.errors import StageError
from stages.lib.progress import progress_bar
from stages.lib.stage_run import keep_freed_memory
from stages.lib.work import Row, WorkStore

logger = logging.getLogger(__name__)

Encode = Callable[[Sequence[Any]], list[Row]]
BLOCK_ROWS = 64

_encode: Encode


def encode_missing(
    store: WorkStore,
    items: Iterable[tuple[str, str, Any]],
    build_encoder: Callable[[str], Encode],
    batch_size: int,
    description: str,
) -> int:
    """Encode what ``store`` lacks.

    Args:
        store: that gets the rows, in blocks of 64.
        items: (key, name, input) of every row wanted; inputs of rows that the store has are not used.
        build_encoder: picklable; called with the torch device, in each worker; what it returns
            takes exactly ``batch_size`` inputs and gives as many rows.
        batch_size: rows a batch; the last one is padded with its last input.
        description: shown at the progress bar.

    Returns:
        The number of rows encoded.

    Raises:
        StageError: naming every sample of a block whose row holds a non-finite value.
    """
    missing = _new_keys(items, store)
    batches = iter(lambda: list(itertools.islice(missing, batch_size)), [])
    encoded = 0
    keys: list[str] = []
    rows: list[Row] = []
    with progress_bar(description, "rows") as progress:
        for batch, result in _map_batches(build_encoder, batches, batch_size):
            _check_finite(batch, result)
            keys += [key for key, _, _ in batch]
            rows += result
            if len(keys) >= BLOCK_ROWS:
                store.put(keys[:BLOCK_ROWS], rows[:BLOCK_ROWS])
                keys, rows = keys[BLOCK_ROWS:], rows[BLOCK_ROWS:]
            encoded += len(batch)
            progress.update(len(batch))
        if keys:
            store.put(keys, rows)
    logger.info("%s: %d rows encoded", description, encoded)
    return encoded


def _new_keys(items: Iterable[tuple[str, str, Any]], store: WorkStore) -> Iterator[tuple[str, str, Any]]:
    """What the store lacks, each key once: two samples may hold the same image."""
    seen: set[str] = set()
    for item in items:
        if item[0] not in store and item[0] not in seen:
            seen.add(item[0])
            yield item


def _check_finite(batch: list[tuple[str, str, Any]], rows: list[Row]) -> None:
    names = [
        name
        for (_, name, _), row in zip(batch, rows, strict=True)
        if not all(np.isfinite(value).all() for value in row.values())
    ]
    if names:
        raise StageError(
            f"non-finite values in the encoding of {', '.join(names)}; look at these inputs, "
            "and use dtype: float32"
        )


def _map_batches(
    build_encoder: Callable[[str], Encode], batches: Iterator[list[tuple[str, str, Any]]], batch_size: int
) -> Iterator[tuple[list[tuple[str, str, Any]], list[Row]]]:
    """Encode batches in order: on the GPU, in this process if there are few, else in worker processes."""
    max_workers = max(1, int(os.environ.get("SD_WORKERS", os.cpu_count() or 1)))
    first = list(itertools.islice(batches, max_workers))
    if not first:
        return
    batches = itertools.chain(first, batches)
    if torch.cuda.is_available():
        torch.backends.cudnn.allow_tf32 = False  # float32 is what the params say
        encode = build_encoder("cuda")
        for batch in batches:
            yield batch, _run_padded(encode, batch, batch_size)
    elif len(first) < 2:
        with _one_thread():
            encode = build_encoder("cpu")
            for batch in batches:
                yield batch, _run_padded(encode, batch, batch_size)
    else:
        yield from _map_in_workers(build_encoder, batches, batch_size, max_workers)


def _map_in_workers(
    build_encoder: Callable[[str], Encode],
    batches: Iterator[list[tuple[str, str, Any]]],
    batch_size: int,
    num_workers: int,
) -> Iterator[tuple[list[tuple[str, str, Any]], list[Row]]]:
    context = multiprocessing.get_context("spawn")
    ahead: collections.deque[tuple[list[tuple[str, str, Any]], Future]] = collections.deque()
    with ProcessPoolExecutor(num_workers, context, _start_worker, (build_encoder,)) as pool:
        try:
            for batch in batches:
                ahead.append((batch, pool.submit(_run_in_worker, batch, batch_size)))
                if len(ahead) > 2 * num_workers:
                    done, future = ahead.popleft()
                    yield done, future.result()
            while ahead:
                done, future = ahead.popleft()
                yield done, future.result()
        except BrokenProcessPool as error:
            raise StageError(
                f"an encoder process was killed, probably for memory; {num_workers} ran at once: "
                "lower SD_WORKERS or the stage's batch_size, and run again: what is encoded is kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _start_worker(build_encoder: Callable[[str], Encode]) -> None:
    global _encode
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    keep_freed_memory()
    torch.set_num_threads(1)
    _encode = build_encoder("cpu")


def _exit_with_parent() -> None:
    # A stage that is killed cannot stop its workers, which would hold their memory for ever.
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def _run_in_worker(batch: list[tuple[str, str, Any]], batch_size: int) -> list[Row]:
    return _run_padded(_encode, batch, batch_size)


def _run_padded(encode: Encode, batch: list[tuple[str, str, Any]], batch_size: int) -> list[Row]:
    inputs = [value for _, _, value in batch]
    inputs += [inputs[-1]] * (batch_size - len(inputs))
    return encode(inputs)[: len(batch)]
