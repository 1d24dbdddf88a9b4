"""How fast training ran: numbers of the machine, so no output of a stage holds them."""

from __future__ import annotations

import contextlib
import logging
import resource
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class Speed:
    """The clock of a training run; the first steps, which warm up, and pauses do not count.

    Args:
        images_per_step: the effective batch size.
        device: that trains.
    """

    WARM_UP_STEPS = 5

    def __init__(self, images_per_step: int, device: torch.device) -> None:
        self.images_per_step = images_per_step
        self.device = device
        self.num_steps = 0
        self.seconds = 0.0
        self._waited = 0.0
        self._warm_up_waited = 0.0
        self._last = time.monotonic()

    def step(self, wait_seconds: float) -> None:
        """Count a step; ``wait_seconds`` is what the feed has made training wait so far."""
        now = time.monotonic()
        self.num_steps += 1
        self._waited = wait_seconds
        if self.num_steps == self.WARM_UP_STEPS:
            self.seconds, self._warm_up_waited = 0.0, wait_seconds
        else:
            self.seconds += now - self._last
        self._last = now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Validation and files are no training steps."""
        if self.device.type == "cuda":
            import torch

            torch.cuda.synchronize(self.device)  # the steps before are still running
        self.seconds += time.monotonic() - self._last
        yield
        self._last = time.monotonic()

    def summary(self) -> dict[str, float | int | str | None]:
        """Images a second, share of the time spent waiting for data, peak memory of this process."""
        counted = self.num_steps - self.WARM_UP_STEPS
        enough = counted > 0 and self.seconds > 0
        return {
            "images_per_second": counted * self.images_per_step / self.seconds if enough else None,
            "data_wait_fraction": (self._waited - self._warm_up_waited) / self.seconds if enough else None,
            "peak_memory_bytes": _peak_memory(self.device),
            "device": _device_name(self.device),
            "num_steps": self.num_steps,
        }

    def report(self) -> dict[str, float | int | str | None] | None:
        """Log the summary and give it back; nothing if no step was run."""
        if not self.num_steps:
            return None
        summary = self.summary()
        logger.info("train: %s", ", ".join(f"{name} {value}" for name, value in summary.items()))
        return summary


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return "cpu"
    import torch

    return torch.cuda.get_device_name(device)


def _peak_memory(device: torch.device) -> int:
    """Of the GPU, or resident, in bytes."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
