"""Pictures on the way, as latents: evaluation decodes them, so that training needs no VAE."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from stages.lib.conditioning import Conditioning
from stages.lib.draws import generator
from stages.lib.export import write_safetensors
from stages.lib.pairs import SampleCaptions
from stages.lib.params import Train
from stages.lib.stage_run import fresh_directory

NUM_INFERENCE_STEPS = 25


class PreviewLatents:
    """The previews so far: files of their directory, and plain data for the checkpoint.

    ``step-00000175.safetensors`` holds ``latents`` (P, 4, h, w) float32, scaled as the UNet sees
    them; its metadata, ``captions`` (a JSON list of P texts) and ``global_step``.

    Args:
        directory: emptied.
        samples: captions of held-out ones are previewed; of all where none is held out.
        options: number, seed and guidance.
        earlier: previews of this run by step, written again.
        enabled: False in all processes but the first, which alone writes.
    """

    def __init__(
        self,
        directory: Path,
        samples: list[SampleCaptions],
        options: Train,
        earlier: Mapping[int, torch.Tensor],
        enabled: bool,
    ) -> None:
        self.directory = fresh_directory(directory) if enabled else None
        self.captions = preview_captions(samples, options.num_previews)
        self.options = options
        self.latents_of: dict[int, torch.Tensor] = dict(earlier)
        for global_step in self.latents_of:
            self._write(global_step)

    def add(
        self,
        forward: Callable[..., Any],
        config: Mapping[str, Any],
        conditioning: Conditioning,
        shape: tuple[int, ...],
        device: torch.device,
        num_steps: int,
    ) -> None:
        """Sample, keep and write the latents after ``num_steps`` steps; see `sample_previews`."""
        if num_steps not in self.latents_of:
            self.latents_of[num_steps] = sample_previews(
                forward, config, conditioning, self.captions, shape, self.options, device
            )
            self._write(num_steps)

    def _write(self, global_step: int) -> None:
        if self.directory is not None:
            metadata = {
                "captions": json.dumps(self.captions, ensure_ascii=False),
                "global_step": str(global_step),
            }
            path = self.directory / f"step-{global_step:08d}.safetensors"
            write_safetensors(path, {"latents": self.latents_of[global_step]}, metadata)


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
        options: seed and guidance.
        device: of the UNet.
    """
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    sampler = DDIMScheduler.from_config(dict(config), clip_sample=False)
    sampler.set_timesteps(NUM_INFERENCE_STEPS)
    rows = torch.cat(
        [torch.full((len(captions),), conditioning.empty_row), conditioning.rows(captions)]
    )  # without, with caption
    encoder_hidden_states = conditioning.states(rows, device)  # (2 P, num_chunks * 77, D)
    noise = [
        torch.randn(shape, generator=generator(options.seed, "preview", index))
        for index in range(len(captions))
    ]
    latents = torch.stack(noise).to(device) * sampler.init_noise_sigma  # (P, 4, h, w)
    for timestep in sampler.timesteps:
        model_input = torch.cat([latents, latents])
        steps = torch.full((len(model_input),), int(timestep), device=device)
        without, with_caption = forward(model_input, steps, encoder_hidden_states).sample.chunk(2)
        guided = without + options.preview_guidance_scale * (with_caption - without)
        latents = sampler.step(guided, timestep, latents).prev_sample
    return latents.cpu()
