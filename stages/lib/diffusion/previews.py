"""Pictures on the way, as latents: evaluation decodes them, so that training needs no VAE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from stages.lib.core.draws import generator
from stages.lib.data.pairs import SampleCaptions
from stages.lib.encoding.conditioning import Conditioning
from stages.lib.frame.params import Train
from stages.lib.models.families.family import whole_picture

NUM_INFERENCE_STEPS = 25


def preview_captions(samples: list[SampleCaptions], num_previews: int) -> list[str]:
    """Captions of held-out samples, evenly spaced; of training samples where none is held out."""
    held_out = [sample for sample in samples if sample.split == "validation"] or samples
    distinct = list(dict.fromkeys(sample.captions[0] for sample in held_out))
    count = min(num_previews, len(distinct))
    return [distinct[index * len(distinct) // count] for index in range(count)]


@torch.no_grad()
def sample_previews(
    forward: Callable[..., Any],
    config: Mapping[str, Any],
    conditioning: Conditioning,
    captions: list[str],
    shape: tuple[int, ...],
    factor: int,
    options: Train,
    device: torch.device,
) -> torch.Tensor:
    """Scaled latents (P, 4, h, w) float32, on the CPU, by DDIM (Song et al. 2021, eq. 12, without noise).

    Each starts from noise that is a function of (``train.seed``, its index) alone.

    Args:
        forward: that of a UNet2DConditionModel on ``device``.
        config: the scheduler_config.json to sample with.
        conditioning: holds the captions and "".
        captions: P texts.
        shape: (4, h, w).
        factor: pixels a latent along each side, for bases that are told of sizes.
        options: seed and guidance.
        device: of the UNet.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    sampler = DDIMScheduler.from_config(dict(config), clip_sample=False)
    sampler.set_timesteps(NUM_INFERENCE_STEPS)
    rows = torch.cat(
        [torch.full((len(captions),), conditioning.empty_row), conditioning.rows(captions)]
    )  # without, with caption
    told = {
        name: torch.tensor([numbers] * len(rows), dtype=torch.float32, device=device)
        for name, numbers in conditioning.family.view_conditions(
            whole_picture(shape[1] * factor, shape[2] * factor)
        ).items()
    }
    conditions = conditioning.family.unet_inputs(
        {**conditioning.conditions(rows, device), **told}
    )  # (2 P, ...)
    noise = [
        torch.randn(shape, generator=generator(options.seed, "preview", index))
        for index in range(len(captions))
    ]
    latents = torch.stack(noise).to(device) * sampler.init_noise_sigma  # (P, 4, h, w)
    for timestep in sampler.timesteps:
        model_input = torch.cat([latents, latents])
        steps = torch.full((len(model_input),), int(timestep), device=device)
        without, with_caption = forward(model_input, steps, **conditions).sample.chunk(2)
        guided = without + options.preview_guidance_scale * (with_caption - without)
        latents = sampler.step(guided, timestep, latents).prev_sample
    return latents.cpu()
