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


def sample_losses(model_pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample, (B,) float32, whatever the prediction's dtype."""
    return F.mse_loss(model_pred.float(), target.float(), reduction="none").flatten(1).mean(dim=1)
