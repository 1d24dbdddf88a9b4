"""Fine-tune the UNet on latents drawn from stored moments. No VAE, no text encoder, no image is loaded.

Reads  data/base/unet, data/base/scheduler, data/latents.zarr, data/captions.zarr, data/pairs/captions.parquet
Writes data/unet (UNet2DConditionModel; the average's weights with use_ema), data/training (curves)
Params train, validation
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

from stages.lib.base_model import component_fingerprint, load_scheduler, load_unet, read_config
from stages.lib.batches import Batch, TrainingSet, draw_batch
from stages.lib.checkpoint import Checkpoints, TrainingState
from stages.lib.conditioning import Conditioning, read_conditioning
from stages.lib.ema import MovingAverage
from stages.lib.errors import StageError
from stages.lib.export import save_unet
from stages.lib.history import TRAINING, History
from stages.lib.latents import Latents, read_latents, sample_latents
from stages.lib.objective import denoising_target, min_snr_weights, sample_losses, signal_to_noise
from stages.lib.pairs import SampleCaptions, read_captions
from stages.lib.params import Params, Train
from stages.lib.progress import progress_bar
from stages.lib.stage_run import code_fingerprint, run_stage, work_root
from stages.lib.validation import validation_loss
from stages.lib.work import environment, fingerprint

BASE, UNET, CAPTIONS = Path("data/base"), Path("data/unet"), Path("data/pairs/captions.parquet")

Losses = tuple[int, Batch, torch.Tensor]  # global_step, its part of the batch, loss of each sample


def train_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: DDPMScheduler,
    latents: Latents,
    conditioning: Conditioning,
    parts: list[Batch],
    options: Train,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """One optimizer step over this process's parts of the batch.

    Returns:
        The unweighted loss of each sample of each part, (B,), and the gradient norm before clipping.
    """
    all_losses = []
    for part in parts:
        with accelerator.accumulate(model):
            mean, logvar = latents.moments(part.latent_rows, part.views, accelerator.device)  # (B, 4, h, w)
            encoder_hidden_states = conditioning.states(part.caption_rows, accelerator.device)  # (B, 77, D)
            posterior_noise, noise, timesteps = part.draws(accelerator.device)

            model_input = sample_latents(
                mean, logvar, posterior_noise, latents.scaling_factor, latents.shift_factor
            )
            noisy_latents = scheduler.add_noise(model_input, noise, timesteps)
            target = denoising_target(scheduler, model_input, noise, timesteps)
            model_pred = model(noisy_latents, timesteps, encoder_hidden_states).sample

            losses = sample_losses(model_pred, target)  # (B,)
            snr = signal_to_noise(scheduler.alphas_cumprod, timesteps)
            weights = min_snr_weights(snr, options.snr_gamma, scheduler.config.prediction_type)
            accelerator.backward((losses * weights).mean())
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        all_losses.append(losses.detach())
    return all_losses, grad_norm


def main(params: Params) -> None:
    options = params.train
    accelerator = start_accelerator(options)
    is_main = accelerator.is_main_process
    num_parts = check_batch_size(options, accelerator.num_processes)
    latents, conditioning = read_latents(), read_conditioning()
    samples = latents.encoded(read_captions(CAPTIONS))
    data = training_set(samples, latents, conditioning)
    scheduler, unet = load_scheduler(BASE), load_unet(BASE)
    check_shapes(unet, latents, conditioning)
    lineage = lineage_of(params, samples, latents, conditioning)
    run = fingerprint([lineage, machine(accelerator), code_fingerprint()])
    checkpoints = Checkpoints(work_root(), run)

    unet.train().to(accelerator.device, memory_format=memory_format(options))
    # prepare() makes forward run in mixed precision; losses that are compared are float32.
    forward = unet.forward
    optimizer = adamw(unet, options)
    lr_scheduler = learning_rate_schedule(optimizer, options)
    ema = MovingAverage(unet.parameters(), options.ema_decay) if options.use_ema else None
    exported = ema.applied if ema else contextlib.nullcontext
    state = TrainingState(unet, optimizer, lr_scheduler, ema, accelerator.scaler)
    model, optimizer = accelerator.prepare(unet, optimizer)
    first_step, points = state.restore(checkpoints.load_latest())
    history = History(TRAINING, points, enabled=is_main)

    unchecked: list[Losses] = []
    size = options.train_batch_size
    progress = progress_bar("train", "images", options.max_train_steps * size, first_step * size, is_main)
    for global_step in range(first_step, options.max_train_steps):
        batch = draw_batch(data, options, global_step, scheduler.config.num_train_timesteps)
        mine = range(accelerator.process_index, num_parts, accelerator.num_processes)
        parts = [batch.part(index, num_parts) for index in mine]
        losses, grad_norm = train_step(
            accelerator, model, optimizer, scheduler, latents, conditioning, parts, options
        )
        unchecked += [(global_step, part, loss) for part, loss in zip(parts, losses, strict=True)]
        learning_rate = lr_scheduler.get_last_lr()[0]
        lr_scheduler.step()
        if ema:
            ema.update()
        progress.update(size)

        num_steps = global_step + 1
        due = functools.partial(is_due, num_steps, options.max_train_steps)
        validate, save = due(options.validation_every_steps), due(options.checkpoint_every_steps)
        if validate or save or due(options.log_every_steps):
            check_finite(unchecked, float(grad_norm), data.sample_ids, checkpoints, options)
            point: dict[str, float] = {
                "train_loss": mean_loss(accelerator, unchecked),
                "lr": float(learning_rate),
            }
            if math.isfinite(norm := float(grad_norm)):
                point["grad_norm"] = norm
            unchecked.clear()
            if validate and is_main:
                with exported():
                    point |= validation_loss(
                        forward, scheduler, latents, conditioning, samples, params.validation, unet.device
                    )
            history.log(num_steps, point)
            if save and is_main:
                checkpoints.save(num_steps, {"points": history.points, **state.capture()})
    progress.close()
    history.close()
    if is_main:
        with exported():
            save_unet(unet, UNET, lineage)


def start_accelerator(options: Train) -> Accelerator:
    """Devices, processes and precision, as `accelerate` and the params configure them."""
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else accelerate takes each of several for the only one
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
    )
    if options.mixed_precision == "fp16" and accelerator.scaler is None:
        raise StageError(
            f"params.yaml: train.mixed_precision fp16 needs a GPU, this is {accelerator.device}; "
            'use bf16 or "no"'
        )
    return accelerator


def is_due(num_steps: int, max_train_steps: int, every: int) -> bool:
    """Whether something done every so many steps, and at the end, is due after ``num_steps``."""
    return num_steps % every == 0 or num_steps == max_train_steps


def mean_loss(accelerator: Accelerator, steps: list[Losses]) -> float:
    """Mean over the samples of all processes."""
    return accelerator.reduce(torch.cat([losses for _, _, losses in steps]).mean(), "mean").item()


def training_set(samples: list[SampleCaptions], latents: Latents, conditioning: Conditioning) -> TrainingSet:
    """The samples of the training split, joined to their latents and captions by name."""
    chosen = [sample for sample in samples if sample.split == "train"]
    if not chosen:
        raise StageError(f"{CAPTIONS}: expected samples to train on, got none; run `dvc repro prepare`")
    rows = latents.rows([sample.sample_id for sample in chosen])
    return TrainingSet(
        sample_ids=[sample.sample_id for sample in chosen],
        latent_rows=rows,
        caption_rows=[conditioning.rows(list(sample.captions)).tolist() for sample in chosen],
        empty_row=conditioning.empty_row,
        num_views=latents.num_views,
        buckets=latents.bucket_of(rows),
        latent_shapes=[bucket.mean.shape[2:] for bucket in latents.buckets],
    )


def check_batch_size(options: Train, num_processes: int) -> int:
    """The number of equal parts an optimizer step's batch is split into."""
    num_parts = num_processes * options.gradient_accumulation_steps
    if options.train_batch_size % num_parts:
        raise StageError(
            f"params.yaml: train.train_batch_size {options.train_batch_size} cannot be split over "
            f"{num_processes} processes x {options.gradient_accumulation_steps} accumulation steps; "
            f"use a multiple of {num_parts}"
        )
    return num_parts


def check_shapes(unet: UNet2DConditionModel, latents: Latents, conditioning: Conditioning) -> None:
    """Raise StageError if the stores were not made for this UNet."""
    channels, width = latents.num_channels, conditioning.encoder_hidden_states.shape[2]
    for store, got, expected in (
        ("data/latents.zarr: channels", channels, unet.config.in_channels),
        ("data/captions.zarr: width", width, unet.config.cross_attention_dim),
    ):
        if got != expected:
            raise StageError(f"{store} {got}, data/base/unet takes {expected}; run `dvc repro`")


def check_finite(
    unchecked: list[Losses], grad_norm: float, names: list[str], checkpoints: Checkpoints, options: Train
) -> None:
    """Raise StageError naming the first step and samples whose loss or gradient is not finite."""
    kept = checkpoints.paths()
    remedy = (
        f"last good checkpoint: {kept[-1] if kept else 'none yet'}; lower train.learning_rate, "
        'or set train.mixed_precision to bf16 or "no"'
    )
    for global_step, part, losses in unchecked:
        bad = (~losses.isfinite()).nonzero().flatten().tolist()
        if bad:
            culprits = ", ".join(f"{names[part.samples[i]]} (timestep {part.timesteps[i]})" for i in bad)
            raise StageError(f"non-finite loss at step {global_step}: {culprits}; {remedy}")
    # The loss scaler of fp16 finds its scale by overflowing now and then, and skips those steps.
    if not math.isfinite(grad_norm) and options.mixed_precision != "fp16":
        global_step, part, _ = unchecked[-1]
        culprits = ", ".join(names[index] for index in part.samples)
        raise StageError(f"non-finite gradient at step {global_step}, samples {culprits}; {remedy}")


def learning_rate_schedule(
    optimizer: torch.optim.Optimizer, options: Train
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up, then constant, or down to zero as half a cosine or a line."""
    # diffusers' plain "constant" leaves the warm-up out.
    names = {"constant": "constant_with_warmup"}
    return get_scheduler(
        names.get(options.lr_scheduler, options.lr_scheduler),
        optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=options.max_train_steps,
    )


def adamw(unet: torch.nn.Module, options: Train) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019) over all weights, as one fused kernel."""
    return torch.optim.AdamW(
        unet.parameters(),
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.adam_weight_decay,
        eps=options.adam_epsilon,
        fused=True,
    )


def memory_format(options: Train) -> torch.memory_format:
    return torch.channels_last if options.channels_last else torch.preserve_format


def lineage_of(
    params: Params, samples: list[SampleCaptions], latents: Latents, conditioning: Conditioning
) -> dict[str, str]:
    """What the trained weights were made from; it travels in their safetensors metadata."""
    scheduler = read_config(BASE / "scheduler" / "scheduler_config.json")
    sections = {"train": vars(params.train), "validation": vars(params.validation)}
    return {
        "base_unet": component_fingerprint(BASE / "unet"),
        "scheduler": fingerprint(scheduler),
        "prediction_type": scheduler.get("prediction_type", "epsilon"),
        "latents": latents.fingerprint,
        "captions": conditioning.fingerprint,
        "pairs": fingerprint([dataclasses.astuple(sample) for sample in samples]),
        "params": json.dumps(sections, sort_keys=True),
    }


def machine(accelerator: Accelerator) -> dict[str, str | int]:
    """What changes floating-point results, so that a checkpoint is resumed only where it was made."""
    return {
        **environment("diffusers", "accelerate"),
        "device": accelerator.device.type,
        "num_threads": torch.get_num_threads(),
        "num_processes": accelerator.num_processes,
    }


if __name__ == "__main__":
    run_stage("train", ("train", "validation"), main, distributed=True)
