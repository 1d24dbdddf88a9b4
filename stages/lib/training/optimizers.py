"""Optimizers and learning rate schedules, from torch, transformers, bitsandbytes and diffusers.

A new optimizer is a function here, an entry in `OPTIMIZERS`, and its name in `train.optimizer`
(stages/lib/frame/sections/train.py). A new schedule is an entry in `LR_SCHEDULES` and its name in
`train.lr_scheduler`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from stages.lib.frame.errors import StageError


class OptimizerOptions(Protocol):
    """The keys of params.yaml's train section that an optimizer and its schedule take."""

    @property
    def optimizer(self) -> str: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def adam_beta1(self) -> float: ...
    @property
    def adam_beta2(self) -> float: ...
    @property
    def adam_weight_decay(self) -> float: ...
    @property
    def adam_epsilon(self) -> float: ...
    @property
    def lr_scheduler(self) -> str: ...
    @property
    def lr_warmup_steps(self) -> int: ...
    @property
    def lr_num_cycles(self) -> int: ...
    @property
    def lr_power(self) -> float: ...


Parameters = Iterable[torch.nn.Parameter]


@dataclass(frozen=True)
class OptimizerKind:
    """What an optimizer is made by, needs, and is good for.

    Attributes:
        build: makes it over the weights to train.
        packages: beside torch, that it is computed with: their versions move its bits.
        needs_gpu: whether it runs on a GPU alone.
        can_be_sharded: whether its state may lie in parts over processes (FSDP).
        floats_per_weight: that its state holds; AdamW's are its two moments.
    """

    build: Callable[[Parameters, OptimizerOptions], torch.optim.Optimizer]
    packages: tuple[str, ...] = ()
    needs_gpu: bool = False
    can_be_sharded: bool = False
    floats_per_weight: float = 2.0

    @property
    def saves_memory(self) -> bool:
        """Whether its state is smaller than AdamW's."""
        return self.floats_per_weight < 2.0


def _adamw(parameters: Parameters, options: OptimizerOptions) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019) as one fused kernel."""
    return torch.optim.AdamW(
        parameters,
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        weight_decay=options.adam_weight_decay,
        fused=True,
    )


def _adamw_8bit(parameters: Parameters, options: OptimizerOptions) -> torch.optim.Optimizer:
    """AdamW with its moments in 8 bits (Dettmers et al. 2022)."""
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(
        parameters,
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        weight_decay=options.adam_weight_decay,
    )


def _adafactor(parameters: Parameters, options: OptimizerOptions) -> torch.optim.Optimizer:
    """Second moment factored over rows and columns, no first moment (Shazeer and Stern 2018).

    Steps are scaled by the learning rate alone, as with AdamW, so that the schedule rules.
    """
    from transformers.optimization import Adafactor

    return Adafactor(
        parameters,
        lr=options.learning_rate,
        weight_decay=options.adam_weight_decay,
        scale_parameter=False,
        relative_step=False,
    )


OPTIMIZERS = {
    "adamw": OptimizerKind(_adamw, can_be_sharded=True),
    "adamw_8bit": OptimizerKind(
        _adamw_8bit, packages=("bitsandbytes",), needs_gpu=True, floats_per_weight=0.5
    ),
    "adafactor": OptimizerKind(_adafactor, packages=("transformers",), floats_per_weight=0.1),
}

# Names of params.yaml -> diffusers' names; its plain "constant" leaves the warm-up out.
LR_SCHEDULES = {
    "constant": "constant_with_warmup",
    "cosine": "cosine",
    "cosine_with_restarts": "cosine_with_restarts",
    "linear": "linear",
    "polynomial": "polynomial",
}


def build_optimizer(parameters: Parameters, options: OptimizerOptions) -> torch.optim.Optimizer:
    """The optimizer that ``options.optimizer`` names, over the weights to train.

    Raises:
        StageError: naming the GPU or the packages that it needs and that are missing.
    """
    kind = OPTIMIZERS[options.optimizer]
    missing = []
    if kind.needs_gpu and not torch.cuda.is_available():
        missing.append("a GPU (torch.cuda.is_available() is false)")
    for package in kind.packages:
        if importlib.util.find_spec(package) is None:
            missing.append(f"the package {package} (pip install {package})")
    if missing:
        raise StageError(
            f"params.yaml: train.optimizer {options.optimizer}: missing {' and '.join(missing)}; "
            "use adamw, or adafactor to save memory"
        )
    return kind.build(parameters, options)


def build_lr_schedule(
    optimizer: torch.optim.Optimizer, options: OptimizerOptions, num_training_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up from zero over ``lr_warmup_steps``, then ``lr_scheduler`` until ``num_training_steps``.

    ``constant``; ``linear``, a line to zero; ``cosine``, half a cosine to zero;
    ``cosine_with_restarts``, ``lr_num_cycles`` of these; ``polynomial``, to 1e-7 by
    ``lr_power``. All are diffusers' own.
    """
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        LR_SCHEDULES[options.lr_scheduler],
        optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=num_training_steps,
        num_cycles=options.lr_num_cycles,
        power=options.lr_power,
    )
