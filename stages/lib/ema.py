"""Exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch


class MovingAverage:
    """average <- decay * average + (1 - decay) * weights, once an optimizer step.

    The decay warms up as (1 + n) / (10 + n), as in diffusers' EMAModel and TensorFlow's
    ExponentialMovingAverage, and never exceeds ``max_decay``.

    Args:
        parameters: the live weights; their values are the first average, in float32.
        max_decay: upper bound of the decay, from 0 to 1.
    """

    def __init__(self, parameters: Iterable[torch.nn.Parameter], max_decay: float) -> None:
        self.parameters = list(parameters)
        self.max_decay = max_decay
        self.num_updates = 0
        self.average = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.num_updates += 1
        decay = min(self.max_decay, (1 + self.num_updates) / (10 + self.num_updates))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The average in the place of the live weights, for validation and export."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict:
        return {"num_updates": self.num_updates, "average": self.average}

    def load_state_dict(self, state: dict) -> None:
        self.num_updates = state["num_updates"]
        for average, saved in zip(self.average, state["average"], strict=True):
            average.copy_(saved)

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self.parameters, self.average, strict=True):
            live = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(live)
