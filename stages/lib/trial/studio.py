"""Base and fine-tuned UNet in memory, and pictures of both from one prompt, seed and setting."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from stages.lib.core.devices import use_same_kernels
from stages.lib.core.paths import BASE, BASE_UNET
from stages.lib.core.sums import check_sums
from stages.lib.encoding.conditioning import read_conditioning
from stages.lib.encoding.latents import read_latents
from stages.lib.evaluation.measuring.rendering import (
    Renderer,
    Request,
    Setting,
    load_renderer,
    own_sampler,
    render,
    with_texts,
)
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import Evaluate
from stages.lib.models.layout import check_base
from stages.lib.models.trained import load_trained_unet
from stages.lib.trial.weights import between, tried_weights, weights_of


@dataclass(frozen=True)
class Wish:
    """What is asked for: one picture a side.

    Attributes:
        weights: name of the weights on the fine-tuned side, of `Studio.choices`.
        strength: 0 is the base, 1 the weights as they were trained.
    """

    prompt: str
    negative_prompt: str
    seed: int
    num_inference_steps: int
    guidance_scale: float
    strength: float
    weights: str


@dataclass
class Studio:
    """Everything that is loaded once. One picture pair is made at a time.

    Attributes:
        renderer: with the base's pipeline, whose UNet is given the weights that are asked for.
        base: the base UNet's weights.
        choices: name -> directory of what was trained.
    """

    renderer: Renderer
    base: dict[str, torch.Tensor]
    choices: dict[str, Path]
    _loaded: tuple[str, dict[str, torch.Tensor]] = field(default=("", {}))

    def pictures(self, wish: Wish) -> tuple[Image.Image, Image.Image]:
        """The base's picture and the fine-tuned one's, of the same noise, each by its own scheduler.

        Raises:
            StageError: if the weights asked for are gone, or are damaged.
        """
        if wish.weights not in self.choices:
            raise StageError(f"expected weights of {', '.join(self.choices)}, got {wish.weights!r}")
        directory = self.choices[wish.weights]
        renderer = with_texts(self.renderer, [wish.prompt], wish.negative_prompt)
        setting = Setting("base", wish.guidance_scale, wish.num_inference_steps)
        request = Request(wish.prompt, wish.seed)
        made = []
        for path, strength in ((BASE_UNET, 0.0), (directory, wish.strength)):
            between(self.base, self._weights(wish.weights), strength, renderer.pipeline.unet)
            renderer.pipeline.scheduler = own_sampler(BASE, path)
            made += [found.picture for found in render(renderer, setting, [request], "pictures")]
        return made[0], made[1]

    def _weights(self, name: str) -> dict[str, torch.Tensor]:
        """Of one choice; the last one stays in memory."""
        if self._loaded[0] != name:
            self._loaded = ("", {})  # before the next are loaded, so that memory holds one
            check_sums(self.choices[name], "train")
            found = load_trained_unet(BASE, self.choices[name]).state_dict()
            device = self.renderer.pipeline.device
            self._loaded = (name, {key: value.to(device) for key, value in found.items()})
        return self._loaded[1]


def open_studio(options: Evaluate) -> Studio:
    """Load the base's pipeline, as captions and images were encoded, and list what was trained.

    Raises:
        StageError: if the base, the stores or trained weights are missing or damaged.
    """
    use_same_kernels()
    check_base(BASE)
    choices = tried_weights()
    conditioning, latents = read_conditioning(resident=False), read_latents(resident=False)
    one = options.model_copy(update={"batch_size": 1})
    renderer = load_renderer(
        BASE, BASE_UNET, one, [], latents.resolution, conditioning.clip_skip, conditioning.num_chunks
    )
    return Studio(renderer, weights_of(renderer.pipeline.unet), choices)
