"""Pictures from a UNet, through diffusers' own StableDiffusionPipeline."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from PIL import Image

from stages.lib.base_model import load_unet
from stages.lib.captions import token_windows
from stages.lib.params import Evaluate
from stages.lib.text_encoder import encode_text


@dataclass(frozen=True)
class Setting:
    """One way to sample."""

    guidance_scale: float
    num_inference_steps: int

    @property
    def name(self) -> str:
        """Part of file names, e.g. ``guidance5_steps25``."""
        return f"guidance{self.guidance_scale:g}_steps{self.num_inference_steps}"


def settings(options: Evaluate) -> list[Setting]:
    """Every combination of guidance_scale and num_inference_steps."""
    return [Setting(*pair) for pair in itertools.product(options.guidance_scale, options.num_inference_steps)]


def load_pipeline(base: Path, unet: Path) -> StableDiffusionPipeline:
    """The base's pipeline in float32 with the UNet of ``unet``, on the GPU where there is one."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        base,
        unet=load_unet(unet.parent),
        safety_checker=None,
        requires_safety_checker=False,
        use_safetensors=True,
        local_files_only=True,
        torch_dtype=torch.float32,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.enable_slicing()
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


@torch.inference_mode()
def render(
    pipeline: StableDiffusionPipeline,
    options: Evaluate,
    setting: Setting,
    clip_skip: int | None,
    height: int,
    num_chunks: int,
) -> Iterator[tuple[int, int, Image.Image]]:
    """Every prompt with every seed, in batches of one fixed shape.

    A picture starts from ``torch.Generator().manual_seed(seed)`` alone, as a stock pipeline called
    with that prompt and generator does.

    Yields:
        Index of the prompt, seed, and the picture.
    """
    prompt_embeds = _embed(pipeline, [*options.prompts, options.negative_prompt], clip_skip, num_chunks)
    jobs = list(itertools.product(range(len(options.prompts)), options.seeds))
    for start in range(0, len(jobs), options.batch_size):
        batch = jobs[start : start + options.batch_size]
        padded = batch + [batch[-1]] * (options.batch_size - len(batch))
        pictures = pipeline(
            prompt_embeds=prompt_embeds[[index for index, _ in padded]],
            negative_prompt_embeds=prompt_embeds[[-1] * len(padded)],
            generator=[torch.Generator().manual_seed(seed) for _, seed in padded],
            guidance_scale=setting.guidance_scale,
            num_inference_steps=setting.num_inference_steps,
            height=height,
            width=height,
        ).images
        for (index, seed), picture in zip(batch, pictures, strict=False):
            yield index, seed, picture


def _embed(
    pipeline: StableDiffusionPipeline, texts: list[str], clip_skip: int | None, num_chunks: int
) -> torch.Tensor:
    """Texts as training captions were embedded, each window alone: a row does not depend on the others.

    Returns:
        encoder_hidden_states (P, num_chunks * 77, D) float32.
    """
    windows, _ = token_windows(pipeline.tokenizer, texts, num_chunks)  # (P, C, 77)
    input_ids = torch.from_numpy(windows).long().flatten(0, 1).to(pipeline.device)  # (P * C, 77)
    states = [encode_text(pipeline.text_encoder, ids[None], clip_skip) for ids in input_ids]
    return torch.cat(states).unflatten(0, (len(texts), num_chunks)).flatten(1, 2)
