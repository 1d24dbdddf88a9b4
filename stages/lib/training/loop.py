"""The training loop: what a step computes, and what is looked at and kept between two steps."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from tqdm import tqdm

from stages.lib.diffusion.loss import (
    denoising_target,
    mask_weights,
    min_snr_weights,
    sample_losses,
    signal_to_noise,
)
from stages.lib.diffusion.noise import sample_latents
from stages.lib.diffusion.validation import validation_losses
from stages.lib.frame.params import Params, Train
from stages.lib.frame.speed import Speed
from stages.lib.training.checkpoints import Checkpoints
from stages.lib.training.failures import (
    StepLosses,
    check_finite,
    check_loss_scale,
    checked,
    mean_losses,
    memory_advice,
)
from stages.lib.training.feed import Feed, Part, TrainingData
from stages.lib.training.history import History, PreviewLatents
from stages.lib.training.learner import Learner
from stages.lib.training.processes import full, of_first_process

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
        Of each part the losses, weighted by masks alone, and their weights, (B,) each, and the gradient norm
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
            model_pred = model(noisy_latents, part.timesteps, **part.conditions).sample

            pixel_weights = None if part.mask is None else mask_weights(part.mask, options.mask_floor)
            losses = sample_losses(model_pred, target, pixel_weights)  # (B,)
            snr = signal_to_noise(scheduler.alphas_cumprod, part.timesteps)
            weights = min_snr_weights(snr, options.snr_gamma, scheduler.config.prediction_type)
            accelerator.backward((losses * weights).mean())
            if accelerator.sync_gradients:
                grad_norm = full(accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm))
            optimizer.step()
            optimizer.zero_grad()
        all_losses.append((losses.detach(), weights))
    return all_losses, grad_norm


def train_steps(learner: Learner, feed: Feed, data: TrainingData, options: Train, watch: Watch) -> None:
    """Every step of ``feed``, unless ``watch`` ends the run before."""
    scaling = data.latents.scaling_factor, data.latents.shift_factor
    for global_step, parts in feed:
        with memory_advice(options, watch.checkpoints):
            losses, grad_norm = train_step(
                learner.accelerator, learner.model, learner.optimizer, learner.scheduler,
                parts, *scaling, options,
            )  # fmt: skip
        learning_rate = learner.lr_scheduler.get_last_lr()[0]
        learner.lr_scheduler.step()
        if learner.ema:
            learner.ema.update()
        if watch.after_step(global_step, parts, losses, grad_norm, float(learning_rate), feed.wait_seconds):
            break


def is_due(num_steps: int, max_train_steps: int, every: int | None) -> bool:
    """Whether something done every so many steps, and at the end, is due after ``num_steps``."""
    return every is not None and (num_steps % every == 0 or num_steps == max_train_steps)


@dataclass(kw_only=True)
class Watch:
    """What is looked at and kept between two steps: losses, curves, previews, checkpoints, the clock.

    It changes no weight: what a run learns does not depend on how often it is looked at. It may end a
    run whose held-out loss has stalled.

    Attributes:
        learner, data, params: of the run.
        sampling: scheduler_config.json that previews are sampled with.
        steps_left: to run.
        max_train_steps: of the whole run, at most.
        environments: that the run has passed through, with this one.
        measure: how the held-out losses are measured.
        measure_again: whether those before were measured in another way.
        yardstick: how and when; "" where that has changed on the way.
        num_steps: done so far, with those before this process.
    """

    learner: Learner
    data: TrainingData
    params: Params
    sampling: Mapping[str, Any]
    steps_left: range
    max_train_steps: int
    checkpoints: Checkpoints
    history: History
    previews: PreviewLatents
    environments: list[dict[str, str]]
    measure: str
    measure_again: bool
    yardstick: str
    progress: tqdm[Any]
    speed: Speed
    num_steps: int = 0
    _unchecked: list[StepLosses] = field(default_factory=list)

    def before_first_step(self) -> None:
        """Previews of what the run begins with, where there are none, and its held-out loss where it is lost.

        A run that goes on under another section ``validation`` has no held-out loss that compares. One
        without any step has that of the base alone.
        """
        if self.measure_again or self.max_train_steps == 0:
            self.history.log(self.num_steps, self._held_out_losses())
        if self.params.train.preview_every_steps is not None and not self.previews.latents_of:
            self._preview(self.num_steps)

    def after_step(
        self,
        global_step: int,
        parts: list[Part],
        losses: Iterable[tuple[torch.Tensor, torch.Tensor]],
        grad_norm: torch.Tensor,
        learning_rate: float,
        wait_seconds: float,
    ) -> bool:
        """Take a step's losses; look and keep where that is due. Returns whether the run ends here."""
        options = self.params.train
        for part, (raw, weights) in zip(parts, losses, strict=True):
            self._unchecked.append(StepLosses(global_step, part.batch, raw, weights, grad_norm))
        self.num_steps = global_step + 1
        self.progress.update(options.train_batch_size)
        self.speed.step(wait_seconds)
        due = functools.partial(is_due, self.num_steps, self.max_train_steps)
        validate, save = due(options.validation_every_steps), due(options.checkpoint_every_steps)
        preview, snapshot = due(options.preview_every_steps), due(options.snapshot_every_steps)
        if not (validate or save or preview or snapshot or due(options.log_every_steps)):
            return False
        with self.speed.paused(), memory_advice(options, self.checkpoints):
            self._log(grad_norm, learning_rate, validate)
            if self.history.best_step == self.num_steps:
                with self.learner.averaged(options.export_ema):
                    self.checkpoints.save_best(self.num_steps, self.learner.trained)
            if preview:
                self._preview(self.num_steps)
            if snapshot:
                with self.learner.averaged(options.export_ema):
                    self.checkpoints.save_snapshot(self.num_steps, self.exports_average, self.learner.trained)
            stalled = self.history.has_stalled(options.early_stopping_patience)
            if save or stalled:
                self._save()
        return stalled

    @property
    def exports_average(self) -> bool:
        """Whether what is exported are averaged weights."""
        return self.learner.ema is not None and self.params.train.export_ema

    def close(self) -> None:
        """Finish what is shown."""
        self.progress.close()
        self.history.close()

    def _log(self, grad_norm: torch.Tensor, learning_rate: float, validate: bool) -> None:
        options, learner = self.params.train, self.learner
        check_finite(self._unchecked, self.data.training_set.sample_ids, self.checkpoints, options)
        check_loss_scale(learner.accelerator.scaler, self.checkpoints)
        point = mean_losses(learner.accelerator, self._unchecked) | {"lr": learning_rate}
        if grad_norm.isfinite():
            point["grad_norm"] = float(grad_norm)
        self._unchecked.clear()
        if validate:
            point |= self._held_out_losses()
        self.history.log(self.num_steps, point)

    def _held_out_losses(self) -> dict[str, float]:
        learner, data = self.learner, self.data
        with learner.averaged(self.params.train.validate_ema):
            found = validation_losses(
                learner.forward, learner.scheduler, data.latents, data.conditioning, data.samples,
                self.params.validation, learner.accelerator.device,
            )  # fmt: skip
        return of_first_process(checked(found.summary(), self.num_steps, self.checkpoints))

    def _preview(self, num_steps: int) -> None:
        with self.learner.averaged(self.params.train.validate_ema and num_steps > 0):
            self.previews.add(
                self.learner.forward,
                self.sampling,
                self.data.conditioning,
                self.data.main_shape,
                self.data.latents.factor,
                self.learner.accelerator.device,
                num_steps,
            )

    def _save(self) -> None:
        watched = {
            "points": self.history.points,
            "previews": self.previews.latents_of,
            "preview_recipe": self.previews.recipe,
            "best_step": self.history.best_step,
            "environments": self.environments,
            "measure": self.measure,
            "yardstick": self.yardstick,
        }
        self.checkpoints.save(self.num_steps, {**watched, **self.learner.state.capture()})
