"""What is drawn: latents, timesteps, and the two usual changes to the noise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    pass


def sample_latents(
    mean: torch.Tensor,
    logvar: torch.Tensor,
    posterior_noise: torch.Tensor,
    scaling_factor: float,
    shift_factor: float = 0.0,
) -> torch.Tensor:
    """Draw from the VAE's posterior and scale (Kingma and Welling 2014, eq. 10).

    Args:
        mean, logvar: (B, 4, h, w) unscaled moments, any float dtype.
        posterior_noise: (B, 4, h, w) float32, standard normal; zeros give the mode.

    Returns:
        latents (B, 4, h, w) float32: ``(mean + exp(logvar / 2) * noise - shift) * scale``.
    """
    std = torch.exp(0.5 * logvar.float().clamp(-30.0, 20.0))
    return (mean.float() + std * posterior_noise - shift_factor) * scaling_factor


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
