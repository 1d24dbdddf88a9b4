"""Fine-tune the UNet on latents drawn from stored moments. No VAE, no text encoder, no image is loaded.

Reads  data/base/unet, data/base/scheduler, data/latents.zarr, data/captions.zarr, data/pairs/captions.parquet
Writes data/unet (UNet2DConditionModel, scheduler_config.json to sample with, adapters with lora_rank),
       data/training (curves, previews), data/training_speed.json (this machine's; no output of DVC's)
Params train, validation
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator

from stages.lib.core.files import write_json
from stages.lib.core.fingerprints import code_identity
from stages.lib.core.paths import (
    BASE,
    ENCODED_CAPTIONS,
    LATENTS,
    PAIR_CAPTIONS,
    PREVIEWS,
    TRAINED_UNET,
    TRAINING,
    TRAINING_SPEED,
)
from stages.lib.data.pairs import read_captions
from stages.lib.diffusion.loss import denoising_target, min_snr_weights, sample_losses, signal_to_noise
from stages.lib.diffusion.noise import sample_latents
from stages.lib.diffusion.schedule import sampling_config, training_scheduler
from stages.lib.diffusion.validation import check_held_out, validation_losses
from stages.lib.encoding.conditioning import read_conditioning
from stages.lib.encoding.latents import read_latents
from stages.lib.frame.params import Params, Train
from stages.lib.frame.progress import progress_bar
from stages.lib.frame.run import run_stage, work_root
from stages.lib.frame.speed import Speed
from stages.lib.frame.start_up import leave_out
from stages.lib.models.layout import read_config
from stages.lib.store.zarr_store import store_bytes
from stages.lib.training.batches import draw_batch, num_train_steps, parts_of_process, training_set
from stages.lib.training.checkpoints import Checkpoints, TrainingState, load_weights
from stages.lib.training.ema import MovingAverage
from stages.lib.training.failures import (
    StepLosses,
    check_finite,
    check_loss_scale,
    checked,
    mean_losses,
    memory_advice,
)
from stages.lib.training.feed import Feed, Part, load_part
from stages.lib.training.history import History, PreviewLatents
from stages.lib.training.lineage import lineage_of, run_fingerprint
from stages.lib.training.optimizers import build_lr_schedule, build_optimizer
from stages.lib.training.processes import check_same_step, of_first_process, start_accelerator
from stages.lib.training.sharding import full, plain_forward, unsharded
from stages.lib.training.unet import build_unet, check_shapes, export_unet, trained

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler


def train_step(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: DDPMScheduler,
    parts: list[Part],
    scaling_factor: float,
    shift_factor: float,
    options: Train,
) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], torch.Tensor]:
    """One optimizer step over this process's parts of the batch.

    Returns:
        Of each part the unweighted losses and their weights, (B,) each, and the gradient norm
        before clipping.
    """
    all_losses = []
    for part in parts:
        with accelerator.accumulate(model):
            latents = sample_latents(
                part.mean, part.logvar, part.posterior_noise, scaling_factor, shift_factor
            )  # (B, 4, h, w)
            noisy_latents = scheduler.add_noise(latents, part.input_noise, part.timesteps)
            target = denoising_target(scheduler, latents, part.noise, part.timesteps)
            model_pred = model(noisy_latents, part.timesteps, part.encoder_hidden_states).sample

            losses = sample_losses(model_pred, target)  # (B,)
            snr = signal_to_noise(scheduler.alphas_cumprod, part.timesteps)
            weights = min_snr_weights(snr, options.snr_gamma, scheduler.config.prediction_type)
            accelerator.backward((losses * weights).mean())
            if accelerator.sync_gradients:
                grad_norm = full(accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad()
        all_losses.append((losses.detach(), weights))
    return all_losses, grad_norm


def main(params: Params) -> None:
    options = params.train
    accelerator = start_accelerator(options)
    is_main, device = accelerator.is_main_process, accelerator.device
    resident = store_bytes(LATENTS) + store_bytes(ENCODED_CAPTIONS) <= options.max_resident_bytes
    latents, conditioning = read_latents(LATENTS, resident), read_conditioning(ENCODED_CAPTIONS, resident)
    samples = latents.encoded(read_captions(PAIR_CAPTIONS))
    check_held_out(samples, options)
    data = training_set(samples, latents, conditioning)
    my_parts, num_parts = parts_of_process(options, accelerator.process_index, accelerator.num_processes)
    max_train_steps = num_train_steps(options, data)
    base_config = read_config(BASE / "scheduler" / "scheduler_config.json")
    scheduler = training_scheduler(base_config, options.prediction_type, options.rescale_betas_zero_snr)
    sampling = sampling_config(base_config, scheduler)
    unet = build_unet(BASE, options)
    check_shapes(unet, latents, conditioning)
    lineage = lineage_of(params, BASE, scheduler.config.prediction_type, samples, latents, conditioning)
    checkpoints = Checkpoints(
        work_root(), run_fingerprint(lineage, accelerator, code_identity(main)), is_main
    )

    unet.to(device, memory_format=torch.channels_last if options.channels_last else torch.preserve_format)
    forward = unet.forward  # prepare() gives the model mixed precision; validation stays in float32
    if options.torch_compile:
        unet.compile()
    optimizer = build_optimizer(trained(unet), options)
    lr_scheduler = build_lr_schedule(optimizer, options, max_train_steps)
    model, optimizer = accelerator.prepare(unet, optimizer)
    forward = plain_forward(model, forward)
    ema = moving_average(unet, options)
    state = TrainingState(trained(unet), optimizer, lr_scheduler, ema, accelerator.scaler)
    resumed = state.restore(checkpoints.load_latest())
    check_same_step(resumed.global_step)
    history = History(TRAINING, resumed.points, is_main)
    previews = PreviewLatents(PREVIEWS, samples, options, resumed.previews, is_main)
    preview = functools.partial(previews.add, forward, sampling, conditioning, data.main_shape, device)

    def parts_of(global_step: int) -> list[Part]:
        batch = draw_batch(data, options, global_step, scheduler.config.num_train_timesteps)
        return [load_part(batch.part(index, num_parts), latents, conditioning, device) for index in my_parts]

    unchecked: list[StepLosses] = []
    stop = history.has_stalled(options.early_stopping_patience)
    feed = Feed(
        parts_of, range(resumed.global_step, resumed.global_step if stop else max_train_steps), device
    )
    size, speed = options.train_batch_size, Speed(options.train_batch_size, device)
    progress = progress_bar("train", "images", max_train_steps * size, resumed.global_step * size, is_main)
    if options.preview_every_steps is not None:
        preview(0)
    for global_step, parts in feed:
        with memory_advice(options, checkpoints):
            losses, grad_norm = train_step(
                accelerator, model, optimizer, scheduler, parts, latents.scaling_factor, latents.shift_factor,
                options,
            )  # fmt: skip
        for part, (raw, weights) in zip(parts, losses, strict=True):
            unchecked.append(StepLosses(global_step, part.batch, raw, weights, grad_norm))
        learning_rate = lr_scheduler.get_last_lr()[0]
        lr_scheduler.step()
        if ema:
            ema.update()
        progress.update(size)
        speed.step(feed.wait_seconds)

        num_steps = global_step + 1
        due = functools.partial(is_due, num_steps, max_train_steps)
        validate, save = due(options.validation_every_steps), due(options.checkpoint_every_steps)
        if not (validate or save or due(options.log_every_steps) or due(options.preview_every_steps)):
            continue
        with speed.paused(), memory_advice(options, checkpoints):
            check_finite(unchecked, data.sample_ids, checkpoints, options)
            check_loss_scale(accelerator.scaler, checkpoints)
            point = mean_losses(accelerator, unchecked) | {"lr": float(learning_rate)}
            if grad_norm.isfinite():
                point["grad_norm"] = float(grad_norm)
            unchecked.clear()
            if validate:
                with averaged(ema, options.validate_ema):
                    found = validation_losses(
                        forward, scheduler, latents, conditioning, samples, params.validation, device
                    )
                point |= of_first_process(checked(found.summary(), num_steps, checkpoints))
            history.log(num_steps, point)
            if history.best_step == num_steps:
                with averaged(ema, options.export_ema):
                    checkpoints.save_best(num_steps, trained(unet))
            if due(options.preview_every_steps):
                with averaged(ema, options.validate_ema):
                    preview(num_steps)
            stop = history.has_stalled(options.early_stopping_patience)
            if save or stop:
                outputs = {
                    "points": history.points,
                    "previews": previews.latents_of,
                    "best_step": history.best_step,
                }
                checkpoints.save(num_steps, {**outputs, **state.capture()})
        if stop:
            break
    progress.close()
    history.close()
    if is_main:
        summary = speed.report()
        if summary:
            write_json(TRAINING_SPEED, summary)
    accelerator.wait_for_everyone()  # the first process may still write the best weights
    with averaged(ema, options.export_ema):
        if options.export == "best":
            load_weights(trained(unet), checkpoints.load_best(history.best_step))
        whole = unsharded(unet, BASE)
        if is_main:
            export_unet(whole, TRAINED_UNET, sampling, lineage)


def moving_average(unet: torch.nn.Module, options: Train) -> MovingAverage | None:
    if not options.use_ema:
        return None
    return MovingAverage(trained(unet), options.ema_decay, options.ema_power, options.ema_update_after_step)


def averaged(ema: MovingAverage | None, wanted: bool) -> contextlib.AbstractContextManager[None]:
    """The average in the place of the live weights, where there is one and it is wanted."""
    return ema.applied() if ema and wanted else contextlib.nullcontext()


def is_due(num_steps: int, max_train_steps: int, every: int | None) -> bool:
    """Whether something done every so many steps, and at the end, is due after ``num_steps``."""
    return every is not None and (num_steps % every == 0 or num_steps == max_train_steps)


def lean_main(params: Params) -> None:
    """``main`` in a process of its own; plain AdamW needs nothing that libraries import if they find it."""
    if params.train.lora_rank is None and params.train.optimizer == "adamw":
        leave_out("pandas", "peft", "scipy", "transformers")
    with memory_advice(params.train):
        main(params)


if __name__ == "__main__":
    run_stage("train", ("train", "validation"), lean_main, distributed=True)
