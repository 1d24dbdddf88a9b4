"""The held-out loss that makes runs comparable: fixed samples, timesteps and noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from stages.lib.core.draws import generator
from stages.lib.data.pairs import VALIDATION, SampleCaptions
from stages.lib.diffusion.held_out import HeldOutLosses
from stages.lib.diffusion.loss import denoising_target, sample_losses
from stages.lib.diffusion.noise import sample_latents
from stages.lib.encoding.conditioning import Conditioning
from stages.lib.encoding.latents import Latents
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import Train, Validation

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler


def evenly_spaced_timesteps(num_timesteps: int, num_train_timesteps: int) -> list[int]:
    """Midpoints of ``num_timesteps`` equal parts of the noise schedule."""
    return [int((part + 0.5) * num_train_timesteps / num_timesteps) for part in range(num_timesteps)]


def check_held_out(samples: Sequence[SampleCaptions], options: Train) -> None:
    """Raise StageError if nothing is held out to tell the best step or a stalled run by."""
    wishes = {
        "export": options.export == "best",
        "early_stopping_patience": options.early_stopping_patience is not None,
    }
    wished = [f"train.{name}" for name, wish in wishes.items() if wish]
    if wished and not any(sample.split == VALIDATION for sample in samples):
        raise StageError(
            f"params.yaml: {' and '.join(wished)} need held-out samples, there are none; set "
            "prepare.validation_fraction above 0, or train.export to last and early_stopping_patience to null"
        )


@torch.no_grad()
def validation_losses(
    forward: Callable[..., Any],
    scheduler: DDPMScheduler,
    latents: Latents,
    conditioning: Conditioning,
    samples: list[SampleCaptions],
    options: Validation,
    device: torch.device,
) -> HeldOutLosses:
    """The loss of every held-out sample at every timestep.

    Latents are the posterior's mode and the first caption is used; the noise is a function of
    (seed, sample_id, timestep), so two runs, or two sets of parameters, see the same problems.

    Args:
        forward: that of a UNet2DConditionModel on ``device``.
        scheduler: the noise schedule and what is predicted.
        samples: of both splits; the first ``options.max_samples`` held-out ones are used.
    """
    held_out = [sample for sample in samples if sample.split == "validation"][: options.max_samples]
    num_train_timesteps = scheduler.config.num_train_timesteps
    timesteps = evenly_spaced_timesteps(options.num_timesteps, num_train_timesteps)
    row_of = {sample.sample_id: row for row, sample in enumerate(held_out)}
    losses = torch.zeros(len(held_out), len(timesteps), dtype=torch.float64)
    for batch in _batches_of_one_shape(held_out, latents, options.batch_size):
        rows = latents.rows([sample.sample_id for sample in batch])
        mean, logvar = latents.moments(rows, 0, device)  # (B, 4, h, w)
        mode = sample_latents(
            mean, logvar, torch.zeros(mean.shape, device=device), latents.scaling_factor, latents.shift_factor
        )
        caption_rows = conditioning.rows([sample.captions[0] for sample in batch])
        conditions = conditioning.family.unet_inputs(
            {**conditioning.conditions(caption_rows, device), **latents.conditions(rows, 0, device)}
        )
        for column, timestep in enumerate(timesteps):
            noise = torch.stack(
                [
                    torch.randn(
                        mode.shape[1:],
                        generator=generator(options.seed, "validation", sample.sample_id, timestep),
                    )
                    for sample in batch
                ]
            )
            noise = noise.to(device)  # (B, 4, h, w)
            steps = torch.full((len(batch),), timestep, device=device)
            noisy_latents = scheduler.add_noise(mode, noise, steps)
            target = denoising_target(scheduler, mode, noise, steps)
            model_pred = forward(noisy_latents, steps, **conditions).sample
            found = sample_losses(model_pred, target).cpu().double()
            losses[[row_of[sample.sample_id] for sample in batch], column] = found
    return HeldOutLosses(list(row_of), timesteps, losses, num_train_timesteps)


def _batches_of_one_shape(
    samples: list[SampleCaptions], latents: Latents, batch_size: int
) -> Iterator[list[SampleCaptions]]:
    buckets = latents.bucket_of(latents.rows([sample.sample_id for sample in samples])).tolist()
    for number in sorted(set(buckets)):
        members = [sample for sample, bucket in zip(samples, buckets, strict=True) if bucket == number]
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]
