"""The frozen VAE as a function on pictures: pixels to moments, and what it gives back of them."""

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

# Of the reconstructor: after a small change few pictures are new, and a fuller batch is no faster.
RECONSTRUCTION_BATCH_SIZE = 1


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


def build_reconstructor(
    device: str, dtype: str
) -> Callable[[Sequence[tuple[np.ndarray, np.ndarray]]], list[Row]]:
    """Pictures and their mean (4, h, w) -> decode(mean) and how near it is.

    A row holds ``psnr`` in dB on the 8-bit range, ``ssim`` (Wang et al. 2004: Gaussian window of
    sigma 1.5, mean over channels), and ``decoded`` (height, width, 3) uint8.
    """
    vae = place_vae(device, dtype)

    @torch.inference_mode()
    def reconstruct(inputs: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[Row]:
        mean = torch.from_numpy(np.stack([mean for _, mean in inputs])).to(device, vae.dtype)  # (B, 4, h, w)
        decoded = vae.decode(mean).sample.float().cpu().clamp(-1, 1)  # (B, 3, height, width)
        pixels = scaled_pixels([picture for picture, _ in inputs])
        psnr = -10.0 * ((decoded - pixels) / 2).square().mean(dim=(1, 2, 3)).clamp(min=1e-10).log10()
        pictures = decoded.permute(0, 2, 3, 1)
        return [
            {
                "psnr": psnr[index].numpy(),
                "ssim": np.array(_ssim(pixels[index].permute(1, 2, 0).numpy(), pictures[index].numpy())),
                "decoded": ((pictures[index] + 1.0) * 127.5).round().to(torch.uint8).numpy(),
            }
            for index in range(len(inputs))
        ]

    return reconstruct


def _ssim(picture: np.ndarray, decoded: np.ndarray) -> float:
    from skimage.metrics import structural_similarity  # imports scipy, which the encoder does without

    return structural_similarity(
        picture,
        decoded,
        data_range=2.0,
        channel_axis=2,
        gaussian_weights=True,
        sigma=1.5,
        use_sample_covariance=False,
    )
