"""What the UNet is trained to do: schedule, noise, target, weights and loss of denoising diffusion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from stages.lib.errors import StageError

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def training_scheduler(
    config: Mapping[str, Any], prediction_type: str | None = None, rescale_betas_zero_snr: bool = False
) -> DDPMScheduler:
    """The noise schedule to train on: the base's betas, whatever its scheduler's class.

    Args:
        config: the base's scheduler_config.json.
        prediction_type: ``epsilon``, ``v_prediction`` or ``sample``; None keeps the base's.
        rescale_betas_zero_snr: end the schedule in pure noise (Lin et al. 2024, algorithm 1);
            false keeps the base's, which may be rescaled already.

    Raises:
        StageError: for an unknown prediction_type, and for ``epsilon`` on a schedule that ends in
            pure noise: there the noise is the whole input, and predicting it teaches nothing.
    """
    predicted: str = prediction_type or config.get("prediction_type", "epsilon")
    rescaled: bool = rescale_betas_zero_snr or config.get("rescale_betas_zero_snr", False)
    if predicted not in PREDICTION_TYPES:
        raise _unknown(predicted)
    if rescaled and predicted == "epsilon":
        raise StageError(
            "rescale_betas_zero_snr (params.yaml: train, or data/base/scheduler): expected prediction_type "
            "v_prediction or sample, got epsilon: at zero signal-to-noise the noise is the input itself and "
            "nothing is learned; set train.prediction_type to v_prediction"
        )
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    return DDPMScheduler.from_config(dict(config), prediction_type=predicted, rescale_betas_zero_snr=rescaled)


def sampling_config(config: Mapping[str, Any], scheduler: DDPMScheduler) -> dict[str, Any]:
    """The scheduler_config.json to sample with after training on ``scheduler``, made from the base's.

    The base's sampler stays where it can. PNDM and others know no ``sample`` prediction and ignore
    ``rescale_betas_zero_snr``, so these go to DDIM; a rescaled schedule is sampled from its last
    timestep on, which "leading" spacing would never visit (Lin et al. 2024, section 3.3).
    """
    predicted = scheduler.config.prediction_type
    rescaled = scheduler.config.rescale_betas_zero_snr and not config.get("rescale_betas_zero_snr", False)
    sampling = {**config, "prediction_type": predicted}
    if predicted == "sample" or rescaled:
        # DDIM's default clips every sample to [-1, 1], which is meant for pixels.
        sampling |= {"_class_name": "DDIMScheduler", "clip_sample": False}
    if rescaled:
        sampling |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return sampling


def draw_timesteps(
    timestep_sampling: str, batch_size: int, num_train_timesteps: int, generator: torch.Generator
) -> torch.Tensor:
    """(B,) int64 timesteps of one whole batch, each uniform over the schedule.

    Args:
        timestep_sampling: ``uniform``, independent (Ho et al. 2020, algorithm 1), or ``stratified``,
            spread evenly over the batch; see `stratified_timesteps`.
        batch_size: B, over all processes and accumulation steps.
        num_train_timesteps: length of the schedule.
        generator: of these draws alone.
    """
    if timestep_sampling == "uniform":
        return torch.randint(num_train_timesteps, (batch_size,), generator=generator)
    order = torch.randperm(batch_size, generator=generator)
    return stratified_timesteps(torch.rand(batch_size, generator=generator), order, num_train_timesteps)


def stratified_timesteps(
    uniforms: torch.Tensor, order: torch.Tensor, num_train_timesteps: int
) -> torch.Tensor:
    """One timestep from each of B equal parts of the schedule: (B,) int64.

    Each sample's timestep is still uniform, and the batch's mean loss varies less (stratified
    sampling; the random offsets make it unbiased where evenly spaced ones would not be).

    Args:
        uniforms: (B,) in [0, 1), the place within a part.
        order: (B,) int64, a random permutation: which sample gets which part. It mixes the parts
            over accumulation steps and processes, each of which takes a slice of the batch.
        num_train_timesteps: length of the schedule.
    """
    # In float32 the last part's upper end would round up to num_train_timesteps.
    fractions = (order + uniforms.double()) / len(order)
    return (fractions * num_train_timesteps).long()


def offset_noise(noise: torch.Tensor, channel_noise: torch.Tensor, noise_offset: float) -> torch.Tensor:
    """Noise with a random mean in each channel, (B, 4, h, w): what is added and what is predicted.

    Lets the network learn pictures that are darker or brighter than average (Guttenberg 2023,
    "Diffusion with offset noise").

    Args:
        noise: (B, 4, h, w), standard normal.
        channel_noise: (B, 4, 1, 1), standard normal.
        noise_offset: standard deviation of the mean, 0 or more, usually 0.05 to 0.1.
    """
    return noise + noise_offset * channel_noise


def perturbed_noise(
    noise: torch.Tensor, perturbation: torch.Tensor, input_perturbation: float
) -> torch.Tensor:
    """The noise of the noisy input, (B, 4, h, w); the target keeps ``noise``.

    Imitates at training time the errors that a sampler feeds back into the network (Ning et al.
    2023, algorithm 1).

    Args:
        noise: (B, 4, h, w), what the target is made of.
        perturbation: (B, 4, h, w), another standard normal draw.
        input_perturbation: its scale gamma, 0 or more, usually 0.1.
    """
    return noise + input_perturbation * perturbation


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
            raise _unknown(found)


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
            raise _unknown(found)


def sample_losses(model_pred: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each sample, (B,) float32, whatever the prediction's dtype."""
    return F.mse_loss(model_pred.float(), target.float(), reduction="none").flatten(1).mean(dim=1)


def _unknown(prediction_type: str) -> StageError:
    expected = " or ".join(PREDICTION_TYPES)
    return StageError(f"data/base/scheduler: expected prediction_type {expected}, got {prediction_type}")
