"""Running out of memory, told as what to do about it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from accelerate import PartialState

from stages.lib.checkpoint import Checkpoints
from stages.lib.errors import StageError
from stages.lib.params import Train

# On the CPU, and from CUDA's own libraries, torch raises a plain RuntimeError.
_TEXTS = ("not enough memory", "can't allocate memory", "out of memory", "ALLOC_FAILED")


@contextlib.contextmanager
def memory_advice(options: Train, checkpoints: Checkpoints | None = None) -> Iterator[None]:
    """Turn out-of-memory errors of torch into a StageError with advice.

    Args:
        options: what is trained with.
        checkpoints: what of the run is safe, once it has begun.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise StageError(
            f"out of memory with train.train_batch_size {options.train_batch_size} in "
            f"{options.gradient_accumulation_steps} part(s): {str(error).strip().splitlines()[0]}; "
            + "; ".join([*_advice(options), *([checkpoints.kept()] if checkpoints else [])])
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    return (
        not isinstance(error, RuntimeError)
        or isinstance(error, torch.OutOfMemoryError)
        or (any(text in str(error) for text in _TEXTS))
    )


def _advice(options: Train) -> Iterator[str]:
    # As `parts_of_process` splits a batch.
    size = options.train_batch_size // PartialState().num_processes
    parts = options.gradient_accumulation_steps
    if size > parts:
        more = next(n for n in range(parts + 1, size + 1) if size % n == 0)
        yield f"set train.gradient_accumulation_steps to {more} (same result, smaller parts)"
        yield "or lower train.train_batch_size"
    if not options.gradient_checkpointing:
        yield "or set train.gradient_checkpointing to true (slower, same result)"
    if options.mixed_precision == "no":
        yield "or set train.mixed_precision to bf16"
    if options.optimizer == "adamw":
        yield "or train.optimizer to adamw_8bit or adafactor"
    if options.lora_rank is None:
        yield "or train adapters only with train.lora_rank"
