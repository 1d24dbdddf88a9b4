"""The held-out loss that makes runs comparable: fixed samples, timesteps and noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.lib.conditioning import Conditioning
from stages.lib.draws import generator
from stages.lib.latents import Latents, sample_latents
from stages.lib.objective import denoising_target, sample_losses
from stages.lib.pairs import SampleCaptions
from stages.lib.params import Validation


def evenly_spaced_timesteps(num_timesteps: int, num_train_timesteps: int) -> list[int]:
    """Midpoints of ``num_timesteps`` equal parts of the noise schedule."""
    return [int((part + 0.5) * num_train_timesteps / num_timesteps) for part in range(num_timesteps)]


@torch.no_grad()
def validation_loss(
    forward: Callable[..., Any],
    scheduler: DDPMScheduler,
    latents: Latents,
    conditioning: Conditioning,
    samples: list[SampleCaptions],
    options: Validation,
    device: torch.device,
) -> dict[str, float]:
    """Unweighted denoising loss on held-out samples, mean over samples and timesteps.

    ``forward`` is that of a UNet2DConditionModel on ``device``.

    Latents are the posterior's mode and the first caption is used; the noise is a function of
    (seed, sample_id, timestep), so two runs, or two sets of parameters, see the same problems.

    Returns:
        ``{"validation_loss": loss}``, or nothing if no sample is held out.
    """
    held_out = [sample for sample in samples if sample.split == "validation"][: options.max_samples]
    timesteps = evenly_spaced_timesteps(options.num_timesteps, scheduler.config.num_train_timesteps)
    losses: list[float] = []
    for batch in _batches_of_one_shape(held_out, latents, options.batch_size):
        rows = latents.rows([sample.sample_id for sample in batch])
        mean, logvar = latents.moments(rows, 0, device)  # (B, 4, h, w)
        mode = sample_latents(
            mean, logvar, torch.zeros(mean.shape, device=device), latents.scaling_factor, latents.shift_factor
        )
        caption_rows = conditioning.rows([sample.captions[0] for sample in batch])
        encoder_hidden_states = conditioning.states(caption_rows, device)  # (B, 77, D)
        for timestep in timesteps:
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
            model_pred = forward(noisy_latents, steps, encoder_hidden_states).sample
            losses += sample_losses(model_pred, target).tolist()
    return {"validation_loss": math.fsum(losses) / len(losses)} if losses else {}


def _batches_of_one_shape(
    samples: list[SampleCaptions], latents: Latents, batch_size: int
) -> Iterator[list[SampleCaptions]]:
    buckets = latents.bucket_of(latents.rows([sample.sample_id for sample in samples])).tolist()
    for number in sorted(set(buckets)):
        members = [sample for sample, bucket in zip(samples, buckets, strict=True) if bucket == number]
        for start in range(0, len(members), batch_size):
            yield members[start : start + batch_size]
