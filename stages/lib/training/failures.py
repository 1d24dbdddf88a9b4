"""What can go wrong in a run: losses that are not finite, memory that runs out; and what to do then."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator, PartialState

from stages.lib.frame.errors import StageError
from stages.lib.frame.params import Train
from stages.lib.training.batches import Batch
from stages.lib.training.checkpoints import Checkpoints
from stages.lib.training.optimizers import OPTIMIZERS

# On the CPU, and from CUDA's own libraries, torch raises a plain RuntimeError.
_TEXTS = ("not enough memory", "can't allocate memory", "out of memory", "ALLOC_FAILED")


@dataclass(frozen=True)
class StepLosses:
    """Losses of one forward pass.

    Attributes:
        global_step: of the optimizer.
        batch: this forward pass's part of the step's batch.
        losses: (B,) float32, unweighted.
        weights: (B,) float32.
        grad_norm: of the whole step, before clipping, a scalar.
    """

    global_step: int
    batch: Batch
    losses: torch.Tensor
    weights: torch.Tensor
    grad_norm: torch.Tensor


def mean_losses(accelerator: Accelerator, steps: list[StepLosses]) -> dict[str, float]:
    """``train_loss``, unweighted, and ``weighted_loss``, what is minimised: means over all processes."""
    raw = torch.cat([step.losses for step in steps])
    weighted = torch.cat([step.losses * step.weights for step in steps])
    means = accelerator.reduce(torch.stack([raw.mean(), weighted.mean()]), "mean")
    return dict(zip(("train_loss", "weighted_loss"), means.tolist(), strict=True))


def check_finite(
    steps: list[StepLosses], sample_ids: list[str], checkpoints: Checkpoints, options: Train
) -> None:
    """Raise StageError naming the first step and samples whose loss or gradient is not finite.

    Args:
        steps: since the last look, in order.
        sample_ids: of the training set.
        checkpoints: what is safe.
        options: what may be at fault.
    """
    remedy = f"{checkpoints.kept()}; lower train.learning_rate" + (
        "" if options.mixed_precision == "no" else ', or set train.mixed_precision to bf16 or "no"'
    )
    for global_step, parts in itertools.groupby(steps, key=lambda step: step.global_step):
        this = list(parts)
        bad = [pair for step in this for pair in _pairs(step, ~step.losses.isfinite())]
        what = "loss"
        # The loss scaler of fp16 finds its scale by overflowing now and then, and skips those steps.
        if not bad and options.mixed_precision != "fp16" and not this[0].grad_norm.isfinite():
            bad = [pair for step in this for pair in _pairs(step, torch.ones_like(step.losses).bool())]
            what = "gradient"
        if bad:
            culprits = ", ".join(f"{sample_ids[sample]} (timestep {timestep})" for sample, timestep in bad)
            raise StageError(f"non-finite {what} at step {global_step + 1}: {culprits}; {remedy}")


def check_loss_scale(scaler: torch.amp.GradScaler | None, checkpoints: Checkpoints) -> None:
    """Raise StageError if the loss scale of fp16 has sunk below 1: then no step's gradient is finite."""
    if scaler is not None and scaler.get_scale() < 1.0:
        raise StageError(
            f"the loss scale of fp16 has sunk to {scaler.get_scale():g}: gradients overflow whatever it is; "
            f"{checkpoints.kept()}; set train.mixed_precision to bf16, or lower train.learning_rate"
        )


def checked(summary: dict[str, float], num_steps: int, checkpoints: Checkpoints) -> dict[str, float]:
    """``summary`` of validation losses; raises StageError if one is not finite."""
    bad = [name for name, value in summary.items() if not math.isfinite(value)]
    if bad:
        raise StageError(
            f"non-finite {', '.join(bad)} after {num_steps} steps; {checkpoints.kept()}; "
            "lower train.learning_rate"
        )
    return summary


def _pairs(step: StepLosses, chosen: torch.Tensor) -> list[tuple[int, int]]:
    """Sample and timestep of the chosen (B,) of a forward pass."""
    chosen = chosen.cpu()
    samples, timesteps = step.batch.samples[chosen].tolist(), step.batch.timesteps[chosen].tolist()
    return list(zip(samples, timesteps, strict=True))


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
    if not OPTIMIZERS[options.optimizer].saves_memory:
        smaller = " or ".join(name for name, kind in OPTIMIZERS.items() if kind.saves_memory)
        yield f"or train.optimizer to {smaller}"
    if options.lora_rank is None:
        yield "or train adapters only with train.lora_rank"
