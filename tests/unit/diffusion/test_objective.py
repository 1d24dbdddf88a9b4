"""The training objective against diffusers and float64 arithmetic."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.training_utils import compute_snr

from stages.lib.core.draws import generator
from stages.lib.diffusion.loss import (
    denoising_target,
    mask_weights,
    min_snr_weights,
    sample_losses,
    signal_to_noise,
)
from stages.lib.diffusion.noise import (
    draw_timesteps,
    offset_noise,
    perturbed_noise,
    sample_latents,
    stratified_timesteps,
)
from stages.lib.diffusion.schedule import sampling_config, training_scheduler
from stages.lib.diffusion.validation import evenly_spaced_timesteps
from stages.lib.encoding.report import channel_statistics
from stages.lib.frame.errors import StageError

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# The scheduler_config.json of Stable Diffusion 1.5.
SD15 = {
    **SD,
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


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


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_target(prediction_type):
    scheduler = DDPMScheduler(**SD, prediction_type=prediction_type)
    latents, noise, timesteps = randn(3, 4, 8, 8), randn(3, 4, 8, 8, seed=1), torch.tensor([0, 500, 999])
    target = denoising_target(scheduler, latents, noise, timesteps).double()
    abar = ABAR[[0, 500, 999], None, None, None]
    expected = {
        "epsilon": noise.double().numpy(),
        "v_prediction": np.sqrt(abar) * noise.double().numpy() - np.sqrt(1 - abar) * latents.double().numpy(),
        "sample": latents.double().numpy(),
    }
    np.testing.assert_allclose(target, expected[prediction_type], atol=2e-6)


def test_an_unknown_prediction_type_is_refused():
    scheduler = DDPMScheduler(**SD, prediction_type="flow")
    with pytest.raises(StageError, match="epsilon or v_prediction or sample, got flow"):
        denoising_target(scheduler, randn(1, 4, 2, 2), randn(1, 4, 2, 2), torch.tensor([0]))
    with pytest.raises(StageError, match="got flow"):
        min_snr_weights(torch.ones(1), 5.0, "flow")
    with pytest.raises(StageError, match="got flow"):
        training_scheduler(SD15, "flow")


def test_snr_equals_diffusers():
    scheduler, timesteps = DDPMScheduler(**SD), torch.arange(0, 1000, 37)
    snr = signal_to_noise(scheduler.alphas_cumprod, timesteps)
    torch.testing.assert_close(snr, compute_snr(scheduler, timesteps), rtol=1e-4, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_on_the_schedule_of_stable_diffusion(prediction_type):
    """diffusers' compute_snr and the weights of its train_text_to_image.py, which never predicts samples."""
    scheduler, timesteps = DDPMScheduler(**SD), torch.arange(0, 1000, 37)
    reference = compute_snr(scheduler, timesteps).double()
    smaller = torch.stack([reference, torch.full_like(reference, 5.0)], dim=1).min(dim=1).values
    divisor = {"epsilon": reference, "v_prediction": reference + 1, "sample": 1.0}[prediction_type]
    weights = min_snr_weights(signal_to_noise(scheduler.alphas_cumprod, timesteps), 5.0, prediction_type)
    np.testing.assert_allclose(weights, smaller / divisor, rtol=1e-4)
    assert min_snr_weights(reference, None, prediction_type).tolist() == [1.0] * len(timesteps)


def test_min_snr_weighs_one_error_alike_however_it_is_predicted():
    """An error of the clean latents, written as noise and as v in float64, costs the same."""
    snr = torch.tensor([0.01, 1.0, 5.0, 100.0], dtype=torch.float64)
    abar = (snr / (1 + snr)).view(-1, 1, 1, 1)
    latents, error, noise = (randn(4, 4, 8, 8, seed=seed).double() for seed in range(3))
    noisy_latents = abar.sqrt() * latents + (1 - abar).sqrt() * noise
    losses = {}
    for name, clean in (("target", latents), ("prediction", latents + error)):
        epsilon = (noisy_latents - abar.sqrt() * clean) / (1 - abar).sqrt()
        velocity = abar.sqrt() * epsilon - (1 - abar).sqrt() * clean
        losses[name] = {"epsilon": epsilon, "v_prediction": velocity, "sample": clean}
    weighted = {
        kind: (losses["prediction"][kind] - losses["target"][kind]).square().mean(dim=(1, 2, 3))
        * min_snr_weights(snr, 5.0, kind)
        for kind in losses["target"]
    }
    torch.testing.assert_close(weighted["epsilon"], weighted["sample"], rtol=1e-9, atol=0)
    torch.testing.assert_close(weighted["v_prediction"], weighted["sample"], rtol=1e-9, atol=0)


def test_the_training_schedule_is_the_base_s(tmp_path):
    (tmp_path / "scheduler_config.json").write_text(json.dumps(SD15))
    expected, scheduler = DDPMScheduler.from_pretrained(tmp_path), training_scheduler(SD15)
    assert torch.equal(scheduler.alphas_cumprod, expected.alphas_cumprod)
    assert scheduler.config.prediction_type == "epsilon"
    assert training_scheduler({**SD15, "prediction_type": "sample"}).config.prediction_type == "sample"
    assert training_scheduler(SD15, "v_prediction").config.prediction_type == "v_prediction"


@pytest.mark.parametrize("where", ["params", "base"])
def test_zero_terminal_snr(where):
    if where == "params":
        scheduler = training_scheduler(SD15, "v_prediction", rescale_betas_zero_snr=True)
    else:
        scheduler = training_scheduler({**SD15, "rescale_betas_zero_snr": True}, "v_prediction")
    first, last = np.sqrt(ABAR[0]), np.sqrt(ABAR[-1])
    expected = ((np.sqrt(ABAR) - last) * first / (first - last)) ** 2  # Lin et al. 2024, algorithm 1
    np.testing.assert_allclose(scheduler.alphas_cumprod.double(), expected, rtol=2e-4, atol=1e-12)
    assert scheduler.alphas_cumprod[-1] == 0

    latents, noise, timesteps = randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1), torch.tensor([999, 998])
    target = denoising_target(scheduler, latents, noise, timesteps)
    assert torch.equal(target[0], -latents[0])
    assert torch.equal(scheduler.add_noise(latents, noise, timesteps)[0], noise[0])
    snr = signal_to_noise(scheduler.alphas_cumprod, timesteps)
    assert snr[0] == 0 < snr[1]
    assert min_snr_weights(snr, 5.0, "v_prediction").isfinite().all()
    assert min_snr_weights(snr, 5.0, "sample").isfinite().all()


def test_zero_terminal_snr_is_refused_with_epsilon():
    with pytest.raises(StageError, match="v_prediction or sample, got epsilon"):
        training_scheduler(SD15, rescale_betas_zero_snr=True)
    with pytest.raises(StageError, match="v_prediction or sample, got epsilon"):
        training_scheduler({**SD15, "rescale_betas_zero_snr": True})


def test_the_sampler_follows_the_schedule_that_was_trained_on():
    unchanged = sampling_config(SD15, training_scheduler(SD15))
    assert unchanged == {**SD15, "prediction_type": "epsilon"}
    velocity = sampling_config(SD15, training_scheduler(SD15, "v_prediction"))
    assert velocity == {**SD15, "prediction_type": "v_prediction"}
    rescaled = {**SD15, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    assert sampling_config(rescaled, training_scheduler(rescaled)) == rescaled


@pytest.mark.parametrize(
    ("prediction_type", "zero_snr"), [("v_prediction", True), ("sample", True), ("sample", False)]
)
def test_a_perfect_network_is_sampled_to_its_data(prediction_type, zero_snr):
    """All data is one point, far outside [-1, 1]; the best prediction is then known in closed form."""
    trained = training_scheduler(SD15, prediction_type, zero_snr)
    config = sampling_config({**SD15, "set_alpha_to_one": True}, trained)
    assert config["_class_name"] == "DDIMScheduler"
    sampler = DDIMScheduler.from_config(config)
    sampler.set_timesteps(10)
    assert (int(sampler.timesteps[0]) == 999) == zero_snr
    latents = 5 * randn(1, 4, 8, 8)
    sample = randn(1, 4, 8, 8, seed=1)
    for timestep in sampler.timesteps:
        abar = trained.alphas_cumprod[timestep]
        noise = (sample - abar.sqrt() * latents) / (1 - abar).sqrt()
        prediction = denoising_target(trained, latents, noise, timestep.view(1))
        sample = sampler.step(prediction, timestep, sample).prev_sample
    torch.testing.assert_close(sample, latents, rtol=0, atol=1e-3)


def test_uniform_timesteps_are_one_call_of_torch():
    drawn = draw_timesteps("uniform", 16, 1000, generator(0, "timestep", 3))
    expected = torch.randint(1000, (16,), generator=generator(0, "timestep", 3))
    assert torch.equal(drawn, expected)


@pytest.mark.parametrize("batch_size", [1, 4, 6, 25])
def test_stratified_timesteps_are_each_equally_likely(batch_size):
    """Every place of a fine, even grid of uniforms, in every part: each timestep comes up equally often."""
    num_train_timesteps, places = 10, 600
    counts = np.zeros(num_train_timesteps)
    for place in range(places):
        uniforms = torch.full((batch_size,), (place + 0.5) / places, dtype=torch.float64)
        drawn = stratified_timesteps(uniforms, torch.arange(batch_size), num_train_timesteps)
        counts += np.bincount(drawn, minlength=num_train_timesteps)
    assert counts.tolist() == [places * batch_size / num_train_timesteps] * num_train_timesteps


def test_each_part_of_the_schedule_is_drawn_once_and_mixed_over_the_batch():
    firsts = set()
    for step in range(40):
        drawn = draw_timesteps("stratified", 8, 1000, generator(0, "timestep", step))
        assert drawn.dtype == torch.int64
        assert sorted((drawn // 125).tolist()) == list(range(8))
        firsts.add(int(drawn[0] // 125))
    assert firsts == set(range(8))
    again = draw_timesteps("stratified", 8, 1000, generator(0, "timestep", 39))
    assert torch.equal(drawn, again)


def test_stratified_timesteps_stay_on_the_schedule():
    highest = torch.full((4096,), 1 - 2**-24)
    order = torch.arange(4096)
    assert stratified_timesteps(highest, order, 1000).max() == 999
    assert stratified_timesteps(torch.zeros(4096), order, 1000).min() == 0


def test_offset_noise_moves_the_mean_of_each_channel():
    noise, channel_noise = randn(2, 4, 8, 8), randn(2, 4, 1, 1, seed=1)
    moved = offset_noise(noise, channel_noise, 0.1).double()
    expected = noise.double() + 0.1 * channel_noise.double()
    np.testing.assert_allclose(moved, expected, atol=1e-6)
    assert torch.equal(offset_noise(noise, channel_noise, 0.0), noise)


def test_input_perturbation_leaves_the_target_alone():
    """Ning et al. 2023, algorithm 1, in float64."""
    scheduler = DDPMScheduler(**SD)
    latents, noise, other = (randn(3, 4, 8, 8, seed=seed) for seed in range(3))
    timesteps = torch.tensor([0, 500, 999])
    noisy_latents = scheduler.add_noise(latents, perturbed_noise(noise, other, 0.1), timesteps)
    abar = ABAR[timesteps, None, None, None]
    disturbed = noise.double().numpy() + 0.1 * other.double().numpy()
    expected = np.sqrt(abar) * latents.double().numpy() + np.sqrt(1 - abar) * disturbed
    np.testing.assert_allclose(noisy_latents.double(), expected, atol=2e-6)
    assert torch.equal(denoising_target(scheduler, latents, noise, timesteps), noise)


def test_sample_losses_are_float32_means_of_each_sample():
    prediction, target = randn(3, 4, 8, 8).bfloat16(), randn(3, 4, 8, 8, seed=1)
    losses = sample_losses(prediction, target)
    expected = (prediction.double() - target.double()).square().mean(dim=(1, 2, 3))
    assert losses.dtype == torch.float32
    np.testing.assert_allclose(losses.double(), expected, rtol=1e-6)


@pytest.mark.parametrize("mask_floor", [0.0, 0.1, 0.7, 1.0])
def test_masked_losses_are_weighted_means_in_float64(mask_floor):
    mask = randn(3, 1, 8, 8, seed=2).sigmoid().half()
    mask[1, :, :6] = 0
    prediction, target = randn(3, 4, 8, 8).bfloat16(), randn(3, 4, 8, 8, seed=1)
    losses = sample_losses(prediction, target, mask_weights(mask, mask_floor))
    weights = (mask_floor + (1 - mask_floor) * mask.double()).expand(3, 4, 8, 8)
    errors = (prediction.double() - target.double()).square()
    expected = (weights * errors).sum(dim=(1, 2, 3)) / weights.sum(dim=(1, 2, 3))
    assert losses.dtype == torch.float32
    np.testing.assert_allclose(losses.double(), expected, rtol=1e-6)


@pytest.mark.parametrize("side", [7, 8, 33])
@pytest.mark.parametrize(
    ("value", "mask_floor"), [(1.0, 0.0), (1.0, 0.1), (1.0, 0.3), (0.2, 1.0), (0.0, 1.0)]
)
def test_masks_of_ones_and_a_floor_of_one_change_no_bit_of_loss_and_gradient(side, value, mask_floor):
    target = randn(3, 4, side, side, seed=1)
    weights = mask_weights(torch.full((3, 1, side, side), value).half(), mask_floor)
    losses, gradients = [], []
    for each in (None, weights):
        prediction = randn(3, 4, side, side).requires_grad_()
        losses.append(sample_losses(prediction, target, each))
        losses[-1].mean().backward()
        gradients.append(prediction.grad)
    assert torch.equal(*losses)
    assert torch.equal(*gradients)


def test_a_view_without_anything_that_weighs_teaches_nothing():
    mask = torch.ones(2, 1, 8, 8)
    mask[0] = 0
    prediction = randn(2, 4, 8, 8).requires_grad_()
    losses = sample_losses(prediction, randn(2, 4, 8, 8, seed=1), mask_weights(mask, 0.0))
    losses.sum().backward()
    assert losses[0] == 0 < losses[1]
    assert (prediction.grad[0] == 0).all()
    assert (prediction.grad[1] != 0).all()


def test_evenly_spaced_timesteps_are_midpoints():
    assert evenly_spaced_timesteps(4, 1000) == [125, 375, 625, 875]
    assert evenly_spaced_timesteps(1, 1000) == [500]


def test_channel_statistics():
    mean = randn(5, 2, 4, 3, 3).half().numpy()
    found = channel_statistics([mean[:2], mean[2:]])
    for channel in range(4):
        values = mean[:, :, channel].astype(np.float64)
        assert found[f"latent_mean_{channel}"] == pytest.approx(values.mean(), abs=1e-12)
        assert found[f"latent_std_{channel}"] == pytest.approx(values.std(), abs=1e-12)
