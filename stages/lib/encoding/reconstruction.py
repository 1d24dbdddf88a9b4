"""What the VAE makes of an encoded picture, and how near it comes.

The source of this module is part of the key of every row that it makes: what does not change a
row's bytes belongs elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from stages.lib.encoding.autoencoder import place_vae
from stages.lib.encoding.pixels import scaled_pixels
from stages.lib.store.blocks import Row

# One picture a forward pass: after a small change few are new, and a fuller batch is no faster.
BATCH_SIZE = 1


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
