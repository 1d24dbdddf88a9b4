"""What learns: the UNet on its device, with its optimizer, schedules and average."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator

from stages.lib.frame.params import Train
from stages.lib.training.checkpoints import TrainingState
from stages.lib.training.ema import MovingAverage
from stages.lib.training.optimizers import OPTIMIZERS, build_lr_schedule, build_optimizer
from stages.lib.training.processes import plain_forward
from stages.lib.training.unet import trained_parameters

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler


@dataclass(frozen=True)
class Learner:
    """A UNet and all that changes it.

    Attributes:
        accelerator: device, processes and precision.
        scheduler: the noise schedule that is trained on.
        unet: whose weights are trained.
        model: ``unet`` as accelerate prepared it; steps go through it.
        forward: in float32, for validation and previews.
        optimizer, lr_scheduler: of the weights that are trained.
        ema: their average, or None.
    """

    accelerator: Accelerator
    scheduler: DDPMScheduler
    unet: UNet2DConditionModel
    model: torch.nn.Module
    forward: Callable[..., Any]
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: MovingAverage | None

    @property
    def trained(self) -> list[torch.nn.Parameter]:
        """The weights that are trained."""
        return trained_parameters(self.unet)

    @property
    def state(self) -> TrainingState:
        """What goes from one step to the next."""
        return TrainingState(
            self.trained, self.optimizer, self.lr_scheduler, self.ema, self.accelerator.scaler
        )

    def state_bytes(self, options: Train) -> tuple[int, int]:
        """About how much disk a training state takes, and the trained weights alone."""
        weights = sum(4 * parameter.numel() for parameter in self.trained)
        floats = 1 + OPTIMIZERS[options.optimizer].floats_per_weight + bool(self.ema)
        return int(floats * weights), weights

    def averaged(self, wanted: bool) -> contextlib.AbstractContextManager[None]:
        """The average in the place of the live weights, where there is one and it is wanted."""
        return self.ema.applied() if self.ema and wanted else contextlib.nullcontext()


def prepare(
    accelerator: Accelerator,
    unet: UNet2DConditionModel,
    scheduler: DDPMScheduler,
    options: Train,
    max_train_steps: int,
) -> Learner:
    """Bring a UNet to its device and give it all that it learns with.

    Args:
        accelerator: as `start_accelerator` gives it.
        unet: on the CPU, in training mode.
        scheduler: the noise schedule.
        options: how it is trained.
        max_train_steps: that the learning rate's schedule ends with.
    """
    memory_format = torch.channels_last if options.channels_last else torch.preserve_format
    unet.to(accelerator.device, memory_format=memory_format)
    forward = unet.forward  # prepare() gives the model mixed precision; validation stays in float32
    if options.torch_compile:
        unet.compile()
    optimizer = build_optimizer(trained_parameters(unet), options)
    lr_scheduler = build_lr_schedule(optimizer, options, max_train_steps)
    model, optimizer = accelerator.prepare(unet, optimizer)
    ema = None
    if options.use_ema:
        ema = MovingAverage(
            trained_parameters(unet), options.ema_decay, options.ema_power, options.ema_update_after_step
        )
    return Learner(
        accelerator, scheduler, unet, model, plain_forward(model, forward), optimizer, lr_scheduler, ema
    )
