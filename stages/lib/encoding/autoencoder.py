"""The frozen VAE as a function on pictures: pixels to moments.

The source of this module is part of the key of every row that it makes: what does not change a
row's bytes belongs elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from stages.lib.core.devices import use_same_kernels
from stages.lib.core.paths import BASE
from stages.lib.encoding.pixels import scaled_pixels
from stages.lib.frame.start_up import left_out
from stages.lib.models.loaders import load_vae
from stages.lib.store.blocks import Row

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL


def place_vae(device: str, dtype: str) -> AutoencoderKL:
    """The base's VAE on ``device`` in ``dtype``, with kernels that give the same bytes each time."""
    use_same_kernels()
    with left_out("scipy"):  # diffusers would import its statistics, a second of a start
        vae = load_vae(BASE)
    vae = vae.to(device, memory_format=torch.channels_last)
    return vae if dtype == "float32" else vae.to(getattr(torch, dtype))


def build_image_encoder(device: str, dtype: str) -> Callable[[Sequence[np.ndarray]], list[Row]]:
    """Pictures (height, width, 3) uint8 of one shape -> mean and logvar, (4, h, w) float16, unscaled."""
    vae = place_vae(device, dtype)

    @torch.inference_mode()
    def encode(pictures: Sequence[np.ndarray]) -> list[Row]:
        pixels = scaled_pixels(pictures).to(device, vae.dtype, memory_format=torch.channels_last)
        posterior = vae.encode(pixels).latent_dist
        means, logvars = (m.float().cpu().half().numpy() for m in (posterior.mean, posterior.logvar))
        return [{"mean": mean, "logvar": logvar} for mean, logvar in zip(means, logvars, strict=True)]

    return encode
