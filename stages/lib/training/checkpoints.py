"""Resumable training state in the work directory, under the identity of the run."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from stages.lib.core.files import open_atomically, remove_partials
from stages.lib.frame.errors import StageError
from stages.lib.frame.work_directory import mark_used, trim, use
from stages.lib.training.ema import MovingAverage
from stages.lib.training.processes import gathered, spread_like

logger = logging.getLogger(__name__)
KEPT = 2


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on.

    Attributes:
        global_step: the first step to run.
        points, previews: of the steps before it.
        preview_recipe: that the previews were made by.
        environments: those that these steps were run in, in order.
        measure: how their held-out losses were measured.
        yardstick: how and when; "" where that has changed on the way.
    """

    global_step: int = 0
    points: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    previews: dict[int, torch.Tensor] = field(default_factory=dict)
    preview_recipe: str = ""
    environments: list[dict[str, str]] = field(default_factory=list)
    measure: str = ""
    yardstick: str | None = None

    def yardstick_now(self, yardstick: str) -> str:
        """What the next checkpoint has to say if the losses to come are measured by ``yardstick``."""
        return yardstick if self.yardstick in (None, yardstick) else ""

    def is_measured_by(self, measure: str) -> bool:
        """Whether every held-out loss so far was measured by ``measure``."""
        measured = any("validation_loss" in values for _, values in self.points)
        return self.measure == measure or not measured

    def points_measured_by(self, measure: str) -> list[tuple[int, dict[str, float]]]:
        """The points; held-out losses that were measured in another way than ``measure`` are left out."""
        if self.is_measured_by(measure):
            return self.points
        return [
            (step, {name: value for name, value in values.items() if not name.startswith("validation_loss")})
            for step, values in self.points
        ]


class TrainingState:
    """Everything a run carries from one step to the next; the draws are functions of the step.

    Args:
        parameters: the weights that are trained.
        optimizer, lr_scheduler: with their `state_dict`.
        ema: the moving average, or None.
        scaler: the loss scaler of fp16, or None.
    """

    def __init__(
        self,
        parameters: list[torch.nn.Parameter],
        optimizer: torch.optim.Optimizer,
        lr_scheduler: torch.optim.lr_scheduler.LRScheduler,
        ema: MovingAverage | None,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        self.parameters = parameters
        parts = {"optimizer": optimizer, "lr_scheduler": lr_scheduler, "ema": ema, "scaler": scaler}
        self.parts: dict[str, Any] = {name: part for name, part in parts.items() if part is not None}

    def capture(self) -> dict[str, Any]:
        """The weights and the state of every part, as wholes; all processes take part."""
        states = {name: part.state_dict() for name, part in self.parts.items()}
        return gathered({"weights": [parameter.detach() for parameter in self.parameters], **states})

    def restore(self, saved: dict[str, Any] | None) -> Resumed:
        """Continue from a checkpoint, or begin where there is none."""
        if saved is None:
            return Resumed()
        load_weights(self.parameters, saved["weights"])
        saved["optimizer"]["state"] = {
            index: {name: spread_like(value, self.parameters[index]) for name, value in moments.items()}
            for index, moments in saved["optimizer"]["state"].items()
        }
        for name, part in self.parts.items():
            part.load_state_dict(saved[name])
        return Resumed(**{each.name: saved[each.name] for each in fields(Resumed)})


@torch.no_grad()
def load_weights(parameters: list[torch.nn.Parameter], saved: list[torch.Tensor]) -> None:
    """Copy ``saved`` into ``parameters``, in place."""
    for parameter, value in zip(parameters, saved, strict=True):
        parameter.copy_(spread_like(value, parameter))


class Checkpoints:
    """The checkpoints of one run, ``<root>/train/<identity>/step-<n>.pt``.

    A changed weight, caption, computation or parameter that matters is another identity, so a checkpoint is
    never continued under values it was not made with. The directory is in use, and so never trimmed,
    while this object lives.

    Args:
        root: the work directory.
        identity: hash of everything that determines the run's weights.
        enabled: False in all processes but the first, which alone writes.
    """

    def __init__(self, root: Path, identity: str, enabled: bool = True) -> None:
        self._root, self._enabled = root, enabled
        self.directory = root / "train" / identity[:20]
        self._use = use(self.directory)
        self._refused: set[Path] = set()
        remove_partials(self.directory)

    def paths(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted(self.directory.glob("step-*.pt"))

    def save(self, global_step: int, state: dict[str, Any]) -> None:
        """Write atomically and durably; older ones but for the last two, and refused ones, are removed."""
        if not self._enabled:
            return
        path = self.directory / f"step-{global_step:08d}.pt"
        with open_atomically(path) as handle:
            torch.save({"global_step": global_step, **state}, handle)
        mark_used(path)
        kept = [each for each in self.paths() if each not in self._refused]
        for old in [*self._refused - {path}, *kept[:-KEPT], *self._outdated_best(state.get("best_step"))]:
            old.unlink(missing_ok=True)  # the same run elsewhere may have done it
        trim(self._root)

    def save_best(self, global_step: int, parameters: list[torch.nn.Parameter]) -> None:
        """Keep the weights with the best validation loss so far, beside the checkpoints.

        Those that were best before stay until a checkpoint knows of these: a kill may lie between.
        All processes take part.
        """
        weights = gathered([parameter.detach() for parameter in parameters])
        if not self._enabled:
            return
        path = self._best(global_step)
        with open_atomically(path) as handle:
            torch.save({"weights": weights}, handle)
        mark_used(path)

    def load_best(self, global_step: int | None) -> list[torch.Tensor]:
        """The weights of `save_best`.

        Raises:
            StageError: if they cannot be read.
        """
        assert global_step is not None  # where nothing is held out, the best is refused at the start
        path = self._best(global_step)
        try:
            return torch.load(path, map_location="cpu", weights_only=True)["weights"]
        except Exception as error:  # torch raises a dozen types for a damaged archive
            raise StageError(
                f"{path}: cannot be read ({error}); remove {self.directory} and run `dvc repro train` "
                "to train anew"
            ) from error

    def kept(self) -> str:
        """What of the run is safe, as the end of a message."""
        paths = self.paths()
        return f"last good checkpoint: {paths[-1] if paths else 'none yet'}"

    def _best(self, global_step: int) -> Path:
        return self.directory / f"best-{global_step:08d}.pt"

    def _outdated_best(self, best_step: int | None) -> list[Path]:
        if best_step is None:
            return []
        return [path for path in self.directory.glob("best-*.pt") if path != self._best(best_step)]

    def load_latest(self, yardstick: str | None = None) -> dict[str, Any] | None:
        """The newest state that can be used; one that cannot is left out with a warning.

        Args:
            yardstick: by which every held-out loss so far has to be measured, since the run's result
                depends on it; None where it does not.
        """
        for path in reversed(self.paths()):
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # torch raises a dozen types for a damaged archive
                logger.warning("%s: cannot be read (%s), an older checkpoint is tried", path, error)
                self._refused.add(path)
                continue
            if yardstick is not None and state["yardstick"] != yardstick:
                logger.warning(
                    "%s: its held-out losses were measured in another way (validation_every_steps, "
                    "validate_ema, export_ema or section validation), which decides what train.export: best "
                    "takes; the run begins anew",
                    path,
                )
                self._refused.add(path)
                continue
            mark_used(path)
            logger.info("resuming at step %d from %s", state["global_step"], path)
            return state
        return None
