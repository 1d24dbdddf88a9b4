"""Optimizers and learning rate schedules, from torch, transformers, bitsandbytes and diffusers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
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


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], options: OptimizerOptions
) -> torch.optim.Optimizer:
    """The optimizer that ``options.optimizer`` names, over the weights to train.

    ``adamw``: AdamW (Loshchilov and Hutter 2019) as one fused kernel. ``adamw_8bit``: the same with
    its moments in 8 bits (Dettmers et al. 2022). ``adafactor``: second moment factored over rows
    and columns, no first moment (Shazeer and Stern 2018); steps are scaled by the learning rate
    alone, as with AdamW, so that the schedule rules.

    Raises:
        StageError: for ``adamw_8bit`` without a GPU or without bitsandbytes.
    """
    learning_rate, weight_decay = options.learning_rate, options.adam_weight_decay
    if options.optimizer == "adafactor":
        from transformers.optimization import Adafactor

        return Adafactor(
            parameters,
            lr=learning_rate,
            weight_decay=weight_decay,
            scale_parameter=False,
            relative_step=False,
        )
    betas, eps = (options.adam_beta1, options.adam_beta2), options.adam_epsilon
    if options.optimizer == "adamw_8bit":
        _check_bitsandbytes()
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay)
    return torch.optim.AdamW(
        parameters, lr=learning_rate, betas=betas, eps=eps, weight_decay=weight_decay, fused=True
    )


def build_lr_schedule(
    optimizer: torch.optim.Optimizer, options: OptimizerOptions, num_training_steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    """Linear warm-up from zero over ``lr_warmup_steps``, then ``lr_scheduler`` until ``num_training_steps``.

    ``constant``; ``linear``, a line to zero; ``cosine``, half a cosine to zero;
    ``cosine_with_restarts``, ``lr_num_cycles`` of these; ``polynomial``, to 1e-7 by
    ``lr_power``. All are diffusers' own.
    """
    from diffusers.optimization import get_scheduler

    # diffusers' plain "constant" leaves the warm-up out.
    names = {"constant": "constant_with_warmup"}
    return get_scheduler(
        names.get(options.lr_scheduler, options.lr_scheduler),
        optimizer,
        num_warmup_steps=options.lr_warmup_steps,
        num_training_steps=num_training_steps,
        num_cycles=options.lr_num_cycles,
        power=options.lr_power,
    )


def _check_bitsandbytes() -> None:
    missing = []
    if not torch.cuda.is_available():
        missing.append("a GPU (torch.cuda.is_available() is false)")
    if importlib.util.find_spec("bitsandbytes") is None:
        missing.append("the package bitsandbytes (pip install bitsandbytes)")
    if missing:
        raise StageError(
            f"params.yaml: train.optimizer adamw_8bit: missing {' and '.join(missing)}; "
            "use adamw, or adafactor to save memory"
        )
