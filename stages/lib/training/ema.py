"""Exponential moving average of weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from stages.lib.training.processes import spread_like


class MovingAverage:
    """average <- decay * average + (1 - decay) * weights, once an optimizer step.

    The decay warms up with the number n of updates that count, and never exceeds ``max_decay``:
    as (1 + n) / (10 + n), like TensorFlow's ExponentialMovingAverage, or, with ``power``, as
    1 - (1 + n)^-power. Both are those of diffusers' EMAModel.

    Args:
        parameters: the weights to average, those that are trained; their values are the first
            average.
        max_decay: upper bound of the decay, from 0 to 1.
        power: of the second warm-up, above 0; 1 averages all updates alike until ``max_decay``,
            2/3 reaches 0.999 after 31,600 updates, 3/4 after 10,000. None takes the first.
        update_after_step: updates for which the average is a plain copy of the weights.
    """

    def __init__(
        self,
        parameters: Iterable[torch.nn.Parameter],
        max_decay: float,
        power: float | None = None,
        update_after_step: int = 0,
    ) -> None:
        self.parameters = list(parameters)
        self.max_decay = max_decay
        self.power = power
        self.update_after_step = update_after_step
        self.num_updates = 0
        self.average = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        self.num_updates += 1
        decay = self._decay(self.num_updates - self.update_after_step)
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1.0 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The average in the place of the live weights, for validation and export."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def state_dict(self) -> dict[str, Any]:
        return {"num_updates": self.num_updates, "average": self.average}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.num_updates = state["num_updates"]
        for average, saved in zip(self.average, state["average"], strict=True):
            average.copy_(spread_like(saved, average))

    def _decay(self, num_updates: int) -> float:
        if num_updates <= 0:
            return 0.0
        if self.power is None:
            return min(self.max_decay, (1 + num_updates) / (10 + num_updates))
        return min(self.max_decay, 1.0 - (1 + num_updates) ** -self.power)

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self.parameters, self.average, strict=True):
            live = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(live)
