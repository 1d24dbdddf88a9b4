"""The losses of training steps between two looks at them: their means, and what is not finite."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from stages.lib.batches import Batch
from stages.lib.checkpoint import Checkpoints
from stages.lib.errors import StageError
from stages.lib.params import Train


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
