"""The training stage: its loss against diffusers, exact resume, clear stops, lean imports."""

import json
import logging
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from safetensors.torch import load_file, save_file

from stages import encode_images
from stages.lib.data.pairs import read_captions
from stages.lib.diffusion.schedule import training_scheduler
from stages.lib.encoding.conditioning import read_conditioning
from stages.lib.encoding.latents import read_latents
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import read_params
from stages.lib.models.layout import read_config
from stages.lib.models.loaders import load_unet
from stages.lib.training import loop
from stages.lib.training.batches import draw_batch, parts_of_process, training_set
from stages.lib.training.checkpoints import Checkpoints
from stages.lib.training.feed import load_part
from stages.lib.training.optimizers import build_lr_schedule, build_optimizer
from tests.conftest import (
    REPOSITORY,
    changed,
    content_fingerprint,
    read_lineage,
    reseal,
    run_train,
    write_params,
)

CURVES = ("train_loss", "weighted_loss", "validation_loss", "lr", "grad_norm")
CPU = torch.device("cpu")


def outputs() -> str:
    return content_fingerprint(Path("data/unet")) + content_fingerprint(Path("data/training"))


@pytest.mark.parametrize(
    ("prediction_type", "snr_gamma", "horizontal_flip"),
    [
        ("epsilon", None, False),
        ("epsilon", 5.0, True),
        ("v_prediction", None, False),
        ("v_prediction", 5.0, False),
        ("sample", None, False),  # diffusers' script has no Min-SNR for it; tests/test_objective.py has
    ],
)
def test_one_step_equals_the_step_of_diffusers_script(encoded, prediction_type, snr_gamma, horizontal_flip):
    """The formulas of diffusers' train_text_to_image.py on the same latents, noise and timesteps."""
    params = write_params(
        encode_images={"horizontal_flip": horizontal_flip},
        train={
            "prediction_type": prediction_type,
            "snr_gamma": snr_gamma,
            "noise_offset": 0.1,
            "input_perturbation": 0.2,
        },
    )
    options = params.train
    if horizontal_flip:
        encode_images.main(params)
    latents, conditioning = read_latents(), read_conditioning()
    data = training_set(read_captions(Path("data/pairs/captions.parquet")), latents, conditioning)
    batch = draw_batch(data, options, 0, 1000)
    unet = load_unet(Path("data/base"))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=options.learning_rate)
    config = read_config(Path("data/base/scheduler/scheduler_config.json"))
    ((losses, weights),), grad_norm = loop.train_step(
        Accelerator(cpu=True), unet, optimizer, training_scheduler(config, prediction_type),
        [load_part(batch, latents, conditioning, CPU)], latents.scaling_factor, latents.shift_factor, options,
    )  # fmt: skip

    reference = UNet2DConditionModel.from_pretrained("data/base/unet")
    scheduler = DDPMScheduler.from_pretrained("data/base/scheduler", prediction_type=prediction_type)
    (bucket,) = latents.buckets
    assert set(batch.views.tolist()) == ({0, 1} if horizontal_flip else {0})
    chosen = batch.latent_rows, batch.views
    mean, logvar = bucket.mean[chosen].float(), bucket.logvar[chosen].float()
    scaled = (mean + torch.exp(0.5 * logvar) * batch.posterior_noise) * 0.5
    noisy = scheduler.add_noise(scaled, batch.input_noise, batch.timesteps)
    hidden = conditioning.encoder_hidden_states[batch.caption_rows].float()
    prediction = reference(noisy, batch.timesteps, hidden).sample
    target = batch.noise
    if prediction_type == "v_prediction":
        target = scheduler.get_velocity(scaled, batch.noise, batch.timesteps)
    if prediction_type == "sample":
        target = scaled
    if snr_gamma is None:
        loss = F.mse_loss(prediction.float(), target.float(), reduction="mean")
    else:
        snr = compute_snr(scheduler, batch.timesteps)
        expected = torch.stack([snr, snr_gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
        expected = expected / (snr + 1 if prediction_type == "v_prediction" else snr)
        each = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
        loss = (each * expected).mean()
    loss.backward()
    expected_norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)

    assert not torch.equal(batch.input_noise, batch.noise)
    torch.testing.assert_close(losses.mean(), F.mse_loss(prediction, target), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close((losses * weights).mean(), loss.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad_norm, expected_norm, rtol=1e-5, atol=1e-6)


def test_accumulation_changes_the_weights_by_rounding_alone(encoded):
    write_params()
    run_train()
    whole = load_file("data/unet/diffusion_pytorch_model.safetensors")
    shutil.rmtree(".work/train")  # a run goes on under another number of parts
    run_train(gradient_accumulation_steps=4)
    parts = load_file("data/unet/diffusion_pytorch_model.safetensors")
    base = load_file("data/base/unet/diffusion_pytorch_model.safetensors")
    moved = max((whole[name] - base[name]).abs().max() for name in whole)
    apart = max((whole[name] - parts[name]).abs().max() for name in whole)
    assert apart < 0.02 * moved


def test_outputs_and_curves(encoded):
    run_train()
    unet = UNet2DConditionModel.from_pretrained("data/unet")
    assert {parameter.dtype for parameter in unet.parameters()} == {torch.float32}
    lineage = read_lineage(Path("data/unet"))
    assert lineage["prediction_type"] == "epsilon"
    assert lineage["latents"] == read_latents().fingerprint
    metrics = json.loads(Path("data/training/metrics.json").read_text())
    assert metrics["step"] == 6
    assert set(CURVES) <= set(metrics)
    lr = Path("data/training/plots/metrics/lr.tsv").read_text().splitlines()
    assert lr[0].split() == ["step", "lr"]
    steps, rates = zip(*(map(float, line.split()) for line in lr[1:]), strict=True)
    assert steps == (1, 2, 3, 4, 5, 6)
    cosine = [3e-4 * (1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)]
    assert rates == pytest.approx([0, 1.5e-4, *cosine], rel=1e-9)  # two steps of warm-up, then to zero
    assert len(Path("data/training/plots/metrics/validation_loss.tsv").read_text().splitlines()) == 3


def test_the_average_is_exported_or_the_live_weights(encoded):
    run_train(use_ema=True)
    average = load_file("data/unet/diffusion_pytorch_model.safetensors")
    run_train(use_ema=False)
    live = load_file("data/unet/diffusion_pytorch_model.safetensors")
    assert any(not torch.equal(average[name], live[name]) for name in live)


class StopError(Exception):
    pass


@pytest.mark.parametrize("kill_at", [1, 3, 5])
def test_a_killed_run_resumes_bit_for_bit(encoded, monkeypatch, kill_at):
    run_train()
    undisturbed = outputs()
    shutil.rmtree(".work/train")
    step, calls = loop.train_step, []

    def stop(*arguments):
        if len(calls) == kill_at:
            calls.append(None)
            raise StopError
        calls.append(None)
        return step(*arguments)

    monkeypatch.setattr(loop, "train_step", stop)
    with pytest.raises(StopError):
        run_train()
    shutil.rmtree("data/training", ignore_errors=True)  # DVC removes outputs when a stage starts
    run_train()
    assert outputs() == undisturbed
    resumed_at = kill_at // 2 * 2  # continued from the last checkpoint, not from zero
    assert len(calls) == kill_at + 1 + 6 - resumed_at


def test_a_finished_run_is_exported_again_without_training(encoded, monkeypatch):
    run_train()
    first = outputs()
    monkeypatch.setattr(loop, "train_step", None)
    run_train()
    assert outputs() == first


@pytest.mark.parametrize("change", [{"learning_rate": 1e-4}, {"seed": 1}, {"caption_dropout": 0.5}])
def test_a_changed_value_starts_anew(encoded, change):
    run_train()
    first = outputs()
    run_train(**change)
    assert outputs() != first
    assert len(list(Path(".work/train").iterdir())) == 2


@pytest.mark.parametrize("damage", ["bit in a tensor", "bit in the header", "cut short", "emptied"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(encoded, caplog, damage):
    caplog.set_level(logging.INFO)
    run_train()
    first = outputs()
    (directory,) = Path(".work/train").iterdir()
    newest = sorted(directory.glob("step-*.safetensors"))[-1]
    content = bytearray(newest.read_bytes())
    if damage.startswith("bit"):
        content[200 if "header" in damage else len(content) // 2] ^= 1
    newest.write_bytes(content[: {"cut short": 1000, "emptied": 0}.get(damage)])
    run_train()
    assert outputs() == first
    assert f"{newest}: damaged" in caplog.text and f"set aside as {newest.name}.damaged" in caplog.text
    assert "resuming at step 4 from" in caplog.text


def test_checkpoints_keep_the_last_two(tmp_path):
    checkpoints = Checkpoints(tmp_path, "f" * 64)
    for step in (2, 4, 6):
        checkpoints.save(step, {"value": torch.tensor(step)})
    assert [path.name for path in checkpoints.paths()] == [
        "step-00000004.safetensors",
        "step-00000006.safetensors",
    ]
    assert checkpoints.load_latest()["value"] == 6


def test_a_non_finite_loss_names_step_samples_and_checkpoint(encoded):
    path = Path("data/base/unet/diffusion_pytorch_model.safetensors")
    weights = load_file(path)
    weights["conv_out.bias"][0] = float("nan")
    save_file(weights, path, {"format": "pt"})
    reseal()
    with pytest.raises(StageError, match=r"non-finite loss at step 1: \d\d\.png \(timestep \d+\).*none yet"):
        run_train()


def test_a_non_finite_gradient_stops_before_a_checkpoint(encoded, monkeypatch):
    step = loop.train_step

    def spoilt(*arguments):
        losses, _ = step(*arguments)
        return losses, torch.tensor(math.nan)

    monkeypatch.setattr(loop, "train_step", spoilt)
    with pytest.raises(StageError, match=r"non-finite gradient at step 1: \d\d\.png \(timestep \d+\)"):
        run_train()
    assert not list(Path(".work/train").rglob("step-*.safetensors"))


@pytest.mark.parametrize(
    ("name", "middle", "end"), [("constant", 1.0, 1.0), ("cosine", 0.5, 0.0), ("linear", 0.5, 0.0)]
)
def test_schedules_warm_up_and_end(name, middle, end):
    options = changed(
        read_params(REPOSITORY / "params.yaml").train,
        lr_scheduler=name,
        lr_warmup_steps=10,
        max_train_steps=110,
    )
    optimizer = build_optimizer(torch.nn.Linear(1, 1).parameters(), options)
    schedule = build_lr_schedule(optimizer, options, 110)
    rates = []
    for _ in range(111):
        rates.append(schedule.get_last_lr()[0] / options.learning_rate)
        optimizer.step()
        schedule.step()
    assert [rates[step] for step in (0, 5, 10, 60, 110)] == pytest.approx([0, 0.5, 1, middle, end], abs=1e-6)


def test_adamw_has_the_hyper_parameters_of_the_params():
    options = read_params(REPOSITORY / "params.yaml").train
    (group,) = build_optimizer(torch.nn.Linear(1, 1).parameters(), options).param_groups
    assert (group["betas"], group["weight_decay"], group["eps"]) == ((0.9, 0.999), 1e-2, 1e-8)


def test_fp16_without_a_gpu_is_refused(encoded):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(StageError, match="fp16 needs a GPU"):
        run_train(mixed_precision="fp16")


def test_bf16_trains_close_to_float32_and_validates_in_float32(encoded, monkeypatch):
    run_train(max_train_steps=2)
    whole = json.loads(Path("data/training/metrics.json").read_text())
    forward, seen = UNet2DConditionModel.forward, set()

    def watched(self, *inputs, **options):
        seen.add((torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")))
        return forward(self, *inputs, **options)

    monkeypatch.setattr(UNet2DConditionModel, "forward", watched)
    run_train(max_train_steps=2, mixed_precision="bf16")
    assert seen == {(True, True), (False, False)}  # steps; validation and previews
    half = json.loads(Path("data/training/metrics.json").read_text())
    assert half["train_loss"] != whole["train_loss"]
    assert half["train_loss"] == pytest.approx(whole["train_loss"], rel=0.02)
    assert half["validation_loss"] == pytest.approx(whole["validation_loss"], rel=1e-3)


def test_stores_of_another_model_are_refused(encoded):
    config = UNet2DConditionModel.load_config("data/base/unet")
    UNet2DConditionModel.from_config(config, cross_attention_dim=16).save_pretrained("data/base/unet")
    reseal()
    with pytest.raises(StageError, match=r"captions\.zarr: width 32, data/base/unet takes 16"):
        run_train()


def test_a_batch_that_cannot_be_split_is_refused(encoded):
    with pytest.raises(StageError, match="cannot be split over 3 processes x 1"):
        parts_of_process(read_params().train, 0, 3)


def modules_of_a_run(**options: object) -> set[str]:
    """What is loaded at the end of one training step in a process of its own."""
    write_params(train={"max_train_steps": 1, "lr_warmup_steps": 0, **options})
    script = """
import runpy, sys
runpy.run_module("stages.train", run_name="__main__")
print(*(name for name, module in sys.modules.items() if module))
"""
    environment = {"PYTHONPATH": str(REPOSITORY), "SD_WORK": ".work", "PATH": "/usr/bin:/bin"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "diffusers.models.unets.unet_2d_condition" in loaded
    # diffusers.utils imports PIL.Image, whoever uses it; every codec of PIL needs PIL.ImageFile.
    unwanted = (
        "diffusers.models.autoencoders", "diffusers.pipelines", "transformers.models.clip", "torchvision",
        "PIL.ImageFile",
    )  # fmt: skip
    assert not [name for name in loaded if name.startswith(unwanted)]
    return loaded


def test_the_process_loads_no_vae_no_text_model_and_no_image_codec(encoded):
    assert modules_of_a_run().isdisjoint({"pandas", "peft", "scipy", "transformers"})


def test_adapters_and_adafactor_load_their_libraries_but_no_model_beside_the_unet(encoded):
    loaded = modules_of_a_run(lora_rank=2, optimizer="adafactor")
    assert {"peft", "transformers.optimization"} <= loaded
    # The one text model's class among them is Bloom's, which peft imports for methods that are not LoRA.
    models = {name.split(".")[2] for name in loaded if re.match(r"transformers\.models\..*\.modeling_", name)}
    assert models <= {"auto", "bloom"}
    assert Path("data/unet/pytorch_lora_weights.safetensors").exists()
