"""Resumable training state in the work directory, under the fingerprint of what determines the run."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from stages.lib.ema import MovingAverage
from stages.lib.work import open_atomically, remove_partials
from stages.lib.work_directory import mark_used, trim, use

logger = logging.getLogger(__name__)
KEPT = 2


class TrainingState:
    """Everything a run carries from one step to the next; the draws are functions of the step.

    Args:
        unet: the live weights.
        optimizer, lr_scheduler: with their `state_dict`.
        ema: the moving average, or None.
        scaler: the loss scaler of fp16, or None.
    """

    def __init__(
        self,
        unet: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        ema: MovingAverage | None,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        parts = {
            "unet": unet,
            "optimizer": optimizer,
            "lr_scheduler": lr_scheduler,
            "ema": ema,
            "scaler": scaler,
        }
        self.parts: dict[str, Any] = {name: part for name, part in parts.items() if part is not None}

    def capture(self) -> dict[str, Any]:
        """The state of every part."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def restore(self, saved: dict[str, Any] | None) -> tuple[int, list]:
        """Continue from a checkpoint.

        Returns:
            The first step to run and the points logged before it; 0 and none without a checkpoint.
        """
        if saved is None:
            return 0, []
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        return saved["global_step"], saved["points"]


class Checkpoints:
    """The checkpoints of one run, ``<root>/train/<fingerprint>/step-<n>.pt``.

    A changed parameter, weight, caption or library is another fingerprint, so a checkpoint is
    never continued under values it was not made with. The directory is in use, and so never trimmed,
    while this object lives.
    """

    def __init__(self, root: Path, run_fingerprint: str) -> None:
        self._root = root
        self.directory = root / "train" / run_fingerprint[:20]
        self._use = use(self.directory)
        remove_partials(self.directory)

    def paths(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(self.directory.glob("step-*.pt"))

    def save(self, global_step: int, state: dict[str, Any]) -> Path:
        """Write atomically and durably; older ones but for the last two are removed."""
        path = self.directory / f"step-{global_step:08d}.pt"
        with open_atomically(path) as handle:
            torch.save({"global_step": global_step, **state}, handle)
        mark_used(path)
        for old in self.paths()[:-KEPT]:
            old.unlink(missing_ok=True)  # the same run elsewhere may have done it
        trim(self._root)
        return path

    def load_latest(self) -> dict[str, Any] | None:
        """The newest state that can be read; a damaged one is left out with a warning."""
        for path in reversed(self.paths()):
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises a dozen types for a damaged archive
                logger.warning("%s: cannot be read (%s), an older checkpoint is tried", path, error)
                continue
            mark_used(path)
            logger.info("resuming at step %d from %s", state["global_step"], path)
            return state
        return None
