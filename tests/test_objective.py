"""The training objective against diffusers and float64 arithmetic."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import compute_snr

from stages.lib.latents import channel_statistics, sample_latents
from stages.lib.objective import denoising_target, min_snr_weights, sample_losses, signal_to_noise
from stages.lib.validation import evenly_spaced_timesteps

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_sampling_equals_the_distribution_of_diffusers_scaled_once():
    mean, logvar = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1) - 3
    reference = DiagonalGaussianDistribution(torch.cat([mean, logvar], dim=1))
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(7))
    expected = reference.sample(generator=torch.Generator().manual_seed(7)) * 0.18215
    torch.testing.assert_close(sample_latents(mean, logvar, noise, 0.18215), expected, rtol=0, atol=1e-7)


def test_sampling_clamps_the_log_variance_and_shifts_before_scaling():
    mean = torch.full((1, 1, 1, 2), 3.0)
    logvar = torch.tensor([-100.0, 100.0]).view(1, 1, 1, 2)
    drawn = sample_latents(mean, logvar, torch.ones_like(mean), 0.5, shift_factor=1.0)
    expected = [(3 + np.exp(-15) - 1) * 0.5, (3 + np.exp(10) - 1) * 0.5]
    np.testing.assert_allclose(drawn.flatten().double(), expected, rtol=1e-6)


def test_half_precision_moments_are_sampled_in_float32():
    drawn = sample_latents(
        torch.ones(1, 4, 2, 2).half(), torch.zeros(1, 4, 2, 2).half(), randn(1, 4, 2, 2), 1.0
    )
    assert drawn.dtype == torch.float32
    torch.testing.assert_close(drawn, 1 + randn(1, 4, 2, 2))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_target(prediction_type):
    scheduler = DDPMScheduler(**SD, prediction_type=prediction_type)
    latents, noise, timesteps = randn(3, 4, 8, 8), randn(3, 4, 8, 8, seed=1), torch.tensor([0, 500, 999])
    target = denoising_target(scheduler, latents, noise, timesteps).double()
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[[0, 500, 999], None, None, None]
    by_hand = np.sqrt(abar) * noise.double().numpy() - np.sqrt(1 - abar) * latents.double().numpy()
    expected = noise.double().numpy() if prediction_type == "epsilon" else by_hand
    np.testing.assert_allclose(target, expected, atol=2e-6)


def test_snr_equals_diffusers():
    scheduler, timesteps = DDPMScheduler(**SD), torch.arange(0, 1000, 37)
    snr = signal_to_noise(scheduler.alphas_cumprod, timesteps)
    torch.testing.assert_close(snr, compute_snr(scheduler, timesteps), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("prediction_type", "extra"), [("epsilon", 0.0), ("v_prediction", 1.0)])
def test_min_snr_weights(prediction_type, extra):
    snr = torch.tensor([0.01, 1.0, 5.0, 100.0])
    expected = np.minimum(snr.double(), 5.0) / (snr.double() + extra)
    np.testing.assert_allclose(min_snr_weights(snr, 5.0, prediction_type), expected, rtol=1e-6)
    assert min_snr_weights(snr, None, prediction_type).tolist() == [1.0] * 4


def test_sample_losses_are_float32_means_of_each_sample():
    prediction, target = randn(3, 4, 8, 8).bfloat16(), randn(3, 4, 8, 8, seed=1)
    losses = sample_losses(prediction, target)
    expected = (prediction.double() - target.double()).square().mean(dim=(1, 2, 3))
    assert losses.dtype == torch.float32
    np.testing.assert_allclose(losses.double(), expected, rtol=1e-6)


def test_evenly_spaced_timesteps_are_midpoints():
    assert evenly_spaced_timesteps(4, 1000) == [125, 375, 625, 875]
    assert evenly_spaced_timesteps(1, 1000) == [500]


def test_channel_statistics():
    mean = randn(5, 2, 4, 3, 3).half().numpy()
    found = channel_statistics(mean)
    for channel in range(4):
        values = mean[:, :, channel].astype(np.float64)
        assert found[f"latent_mean_{channel}"] == pytest.approx(values.mean(), abs=1e-12)
        assert found[f"latent_std_{channel}"] == pytest.approx(values.std(), abs=1e-12)
