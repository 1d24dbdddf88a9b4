"""The losses of training steps between two looks at them: their means, and what is not finite."""

from __future__ import annotations

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
    """

    global_step: int
    batch: Batch
    losses: torch.Tensor
    weights: torch.Tensor


def mean_losses(accelerator: Accelerator, steps: list[StepLosses]) -> dict[str, float]:
    """``train_loss``, unweighted, and ``weighted_loss``, what is minimised: means over all processes."""
    raw = torch.cat([step.losses for step in steps])
    weighted = torch.cat([step.losses * step.weights for step in steps])
    means = accelerator.reduce(torch.stack([raw.mean(), weighted.mean()]), "mean")
    return dict(zip(("train_loss", "weighted_loss"), means.tolist(), strict=True))


def check_finite(
    steps: list[StepLosses], grad_norm: float, sample_ids: list[str], checkpoints: Checkpoints, options: Train
) -> None:
    """Raise StageError naming the first step and samples whose loss or gradient is not finite.

    Args:
        steps: since the last look.
        grad_norm: of the last step, before clipping.
        sample_ids: of the training set.
        checkpoints: what is safe.
        options: what may be at fault.
    """
    remedy = f"{checkpoints.kept()}; lower train.learning_rate" + (
        "" if options.mixed_precision == "no" else ', or set train.mixed_precision to bf16 or "no"'
    )
    for step in steps:
        bad = (~step.losses.isfinite()).nonzero().flatten().tolist()
        if bad:
            timesteps = step.batch.timesteps.tolist()
            culprits = ", ".join(
                f"{sample_ids[step.batch.samples[i]]} (timestep {timesteps[i]})" for i in bad
            )
            raise StageError(f"non-finite loss at step {step.global_step}: {culprits}; {remedy}")
    # The loss scaler of fp16 finds its scale by overflowing now and then, and skips those steps.
    if not math.isfinite(grad_norm) and options.mixed_precision != "fp16":
        last = steps[-1]
        pairs = zip(last.batch.samples.tolist(), last.batch.timesteps.tolist(), strict=True)
        culprits = ", ".join(f"{sample_ids[sample]} (timestep {timestep})" for sample, timestep in pairs)
        raise StageError(f"non-finite gradient at step {last.global_step}: {culprits}; {remedy}")
