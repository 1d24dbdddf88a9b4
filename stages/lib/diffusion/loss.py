"""What the UNet is trained to do: schedule, noise, target, weights and loss of denoising diffusion."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from stages.lib.diffusion.schedule import unknown_prediction_type

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler


def denoising_target(
    scheduler: DDPMScheduler, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the network predicts, (B, 4, h, w).

    ``epsilon``: the noise (Ho et al. 2020, eq. 14). ``v_prediction``:
    sqrt(abar) * noise - sqrt(1 - abar) * latents (Salimans and Ho 2022, appendix D).
    ``sample``: the clean latents.
    """
    match scheduler.config.prediction_type:
        case "epsilon":
            return noise
        case "v_prediction":
            return scheduler.get_velocity(latents, noise, timesteps)
        case "sample":
            return latents
        case found:
            raise unknown_prediction_type(found)


def signal_to_noise(alphas_cumprod: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """snr = abar / (1 - abar) at (B,) timesteps, float32 (Kingma et al. 2021, eq. 2)."""
    alphas = alphas_cumprod.to(timesteps.device)[timesteps].float()
    return alphas / (1.0 - alphas)


def min_snr_weights(snr: torch.Tensor, snr_gamma: float | None, prediction_type: str) -> torch.Tensor:
    """Weight of each sample's loss, (B,); ones without ``snr_gamma``.

    Hang et al. 2023, section 3.4: min(snr, gamma) for sample prediction, which is
    min(snr, gamma) / snr for noise prediction and min(snr, gamma) / (snr + 1) for v prediction.
    The last timestep of a schedule that ends in pure noise has snr 0, and so weight 0.
    """
    if snr_gamma is None:
        return torch.ones_like(snr)
    weights = snr.clamp(max=snr_gamma)
    match prediction_type:
        case "epsilon":
            return weights / snr
        case "v_prediction":
            return weights / (snr + 1.0)
        case "sample":
            return weights
        case found:
            raise unknown_prediction_type(found)


def mask_weights(mask: torch.Tensor, mask_floor: float) -> torch.Tensor:
    """Weight of each latent pixel's error, (B, 1, h, w) float32, with mean 1 in every sample.

    ``weight = mask_floor + (1 - mask_floor) * mask``, divided by its mean: else a small object would be
    learned at a lower rate than a large one, and one rate would not suit both. A sample that weighs
    nothing at all gets zeros.

    Args:
        mask: (B, 1, h, w) in [0, 1], any float dtype.
        mask_floor: 0 to 1; with 1 all weights are 1.
    """
    weights = mask_floor + (1.0 - mask_floor) * mask.float()
    # A sum and a division, for a device's mean of ones need not be 1 exactly.
    mean = weights.sum(dim=(1, 2, 3), keepdim=True) / weights[0].numel()
    return weights / mean.clamp(min=torch.finfo(torch.float32).tiny)


def sample_losses(
    model_pred: torch.Tensor, target: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Mean squared error of each sample, (B,) float32, whatever the prediction's dtype.

    Args:
        model_pred, target: (B, 4, h, w).
        weights: (B, 1, h, w), of each latent pixel's error; None weighs all alike.
    """
    errors = F.mse_loss(model_pred.float(), target.float(), reduction="none")  # (B, 4, h, w)
    return (errors if weights is None else errors * weights).flatten(1).mean(dim=1)
