"""Resumable training state in the work directory, under the identity of the run."""

from __future__ import annotations

import contextlib
import errno
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any

import torch

from stages.lib.core.files import remove_partials
from stages.lib.core.trees import read_tree, write_tree
from stages.lib.frame.errors import StageError
from stages.lib.frame.locks import holder, open_lock, sign, try_lock
from stages.lib.frame.work_directory import OWNER, format_bytes, mark_used, trim, use
from stages.lib.training.ema import MovingAverage
from stages.lib.training.processes import gathered, spread_like

logger = logging.getLogger(__name__)
KEPT = 2
RUN = "run"  # the name of its directory, in a checkpoint


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
            index: {
                name: spread_like(value, self.parameters[index]) if isinstance(value, torch.Tensor) else value
                for name, value in moments.items()
            }
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
    """The checkpoints of one run, ``<root>/train/<identity>/step-<n>.safetensors``.

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
        self._owner: IO[bytes] | None = None
        self._refused: set[Path] = set()
        remove_partials(self.directory)

    def own(self, agree: Callable[[bool], bool] = bool) -> None:
        """Wait until no other run trains this, and keep others from it while this object lives.

        The same training may be asked for twice at once, with another export or evaluation. Whoever comes
        second finds what the first has made, and has nothing to train.

        Args:
            agree: gives every process the first one's answer; all ask again and again, as no collective
                operation waits for hours.
        """
        handle = open_lock(self.directory / OWNER) if self._enabled else None
        has_waited = False
        while not agree(handle is not None and try_lock(handle)):
            if handle is not None and not has_waited:
                logger.warning(
                    "waiting for its end: this very training is being run by %s",
                    holder(self.directory / OWNER),
                )
            has_waited = True
            time.sleep(1.0)
        if handle is not None:
            sign(handle)
        self._owner = handle

    def paths(self) -> list[Path]:
        """Checkpoints that are there, oldest first."""
        return sorted(self.directory.glob("step-*.safetensors"))

    def save(self, global_step: int, state: dict[str, Any]) -> None:
        """Write atomically and durably; older ones but for the last two, and refused ones, are removed."""
        if not self._enabled:
            return
        path = self.directory / f"step-{global_step:08d}.safetensors"
        self._write(path, {"global_step": global_step, **state, RUN: self.directory.name})
        mark_used(path)
        kept = [each for each in self.paths() if each not in self._refused]
        for old in [
            *self._refused - {path},
            *kept[:-KEPT],
            *self._outdated_bests(kept[-KEPT:], state.get("best_step")),
            *self.directory.glob("*.damaged"),
        ]:
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
        self._write(path, {"weights": weights, RUN: self.directory.name})
        mark_used(path)

    def load_best(self, global_step: int | None) -> list[torch.Tensor]:
        """The weights of `save_best`.

        Raises:
            StageError: if they cannot be read, or are damaged.
        """
        assert global_step is not None  # where nothing is held out, the best is refused at the start
        path = self._best(global_step)
        try:
            return self._tree(path)["weights"]
        except (OSError, ValueError, KeyError) as error:
            raise StageError(
                f"{path}: expected the best weights of this run, got: {error}; run `dvc repro train`, which "
                "goes on before they were made"
            ) from error

    def save_snapshot(self, global_step: int, averaged: bool, parameters: list[torch.nn.Parameter]) -> None:
        """Keep weights to be looked at later; all processes take part.

        Args:
            global_step: after which they are these.
            averaged: whether they are the moving average; the live weights have another file.
            parameters: the weights.
        """
        weights = gathered([parameter.detach() for parameter in parameters])
        if not self._enabled:
            return
        path = self._snapshot(global_step, averaged)
        self._write(path, {"weights": weights, RUN: self.directory.name})
        mark_used(path)

    def load_snapshot(self, global_step: int, averaged: bool) -> list[torch.Tensor] | None:
        """The weights of `save_snapshot`; None, with a warning, where they were not kept or are damaged."""
        path = self._snapshot(global_step, averaged)
        tree = self._read(path, f"data/snapshots has none of step {global_step}")
        return None if tree is None else tree["weights"]

    def check_room(
        self,
        state_bytes: int,
        best_bytes: int,
        num_checkpoints: int,
        has_best: bool,
        num_snapshots: int = 0,
    ) -> None:
        """Raise StageError if the disk cannot take what the rest of the run writes here.

        At the peak, while one is written, there are three training states and three sets of best weights.

        Args:
            state_bytes: of a training state.
            best_bytes: of a set of best weights.
            num_checkpoints: still to be written.
            has_best: whether best weights will be.
            num_snapshots: sets of weights to be kept.
        """
        if not self._enabled:
            return
        states = min(num_checkpoints, max(0, KEPT + 1 - len(self.paths())))
        bests = min(num_checkpoints, max(0, KEPT + 1 - len(self._bests()))) if has_best else 0
        needed = states * state_bytes + (bests + num_snapshots) * best_bytes
        free = shutil.disk_usage(self.directory).free
        logger.info(
            "train: checkpoints need at most %s more of disk, %s are free",
            format_bytes(needed),
            format_bytes(free),
        )
        if needed > free:
            state, best = format_bytes(state_bytes), format_bytes(best_bytes)
            raise StageError(
                f"{self.directory}: expected room for {states} training state(s) of {state}, {bests} set(s) "
                f"of best weights and {num_snapshots} snapshot(s) of {best} each, together "
                f"{format_bytes(needed)}, got {format_bytes(free)} free; free space there, "
                "let SD_WORK name a larger disk, train with fewer weights "
                "(train.lora_rank) or a smaller state (train.optimizer)"
            )

    def kept(self) -> str:
        """What of the run is safe, as the end of a message."""
        paths = self.paths()
        return f"last good checkpoint: {paths[-1] if paths else 'none yet'}"

    def load_latest(self, yardstick: str | None = None) -> dict[str, Any] | None:
        """The newest state that can be used; one that cannot is left out with a warning.

        Args:
            yardstick: by which every held-out loss so far has to be measured, since the run's result is
                its best weights; None where it is not.
        """
        for path in reversed(self.paths()):
            state = self._read(path, "an older checkpoint is tried")
            if state is None:
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
            if yardstick is not None and not self._has_best(state["best_step"]):
                self._refused.add(path)
                continue
            mark_used(path)
            logger.info("resuming at step %d from %s", state["global_step"], path)
            return state
        return None

    def _has_best(self, best_step: int | None) -> bool:
        """Whether the best weights that a checkpoint knows of are whole."""
        if best_step is None:
            return True
        return self._read(self._best(best_step), "the run goes on before they were made") is not None

    def _read(self, path: Path, otherwise: str) -> dict[str, Any] | None:
        """A whole file's tree; one that is damaged is set aside, with a warning that says what is done."""
        try:
            return self._tree(path)
        except FileNotFoundError:
            logger.warning("%s: gone; %s", path, otherwise)
        except (OSError, ValueError) as error:
            aside = path.with_name(f"{path.name}.damaged")
            logger.warning("%s: damaged (%s); set aside as %s, %s", path, error, aside.name, otherwise)
            if self._enabled:
                with contextlib.suppress(OSError):
                    path.replace(aside)
        return None

    def _tree(self, path: Path) -> dict[str, Any]:
        tree = read_tree(path)
        if tree.pop(RUN, None) != self.directory.name:
            raise ValueError("of another run")
        return tree

    def _write(self, path: Path, tree: dict[str, Any]) -> None:
        """Write a file; where the disk is full, the oldest of several checkpoints makes room for it."""
        try:
            write_tree(path, tree)
        except OSError as error:
            older = [each for each in self.paths() if each != path]
            if error.errno != errno.ENOSPC or len(older) < KEPT:
                raise
            logger.warning("%s: no space is left; %s makes room for it", path, older[0].name)
            older[0].unlink(missing_ok=True)
            write_tree(path, tree)

    def _best(self, global_step: int) -> Path:
        return self.directory / f"best-{global_step:08d}.safetensors"

    def _snapshot(self, global_step: int, averaged: bool) -> Path:
        kind = "average" if averaged else "live"
        return self.directory / f"snapshot-{kind}-{global_step:08d}.safetensors"

    def _bests(self) -> list[Path]:
        return sorted(self.directory.glob("best-*.safetensors"))

    def _outdated_bests(self, kept: list[Path], best_step: int | None) -> list[Path]:
        """Best weights that none of the checkpoints ``kept`` knows of; ``best_step`` is the last one's."""
        if best_step is None:
            return []
        needed = {self._best(best_step)}
        for checkpoint in kept[:-1]:  # what was best then is the last that was best until then
            until_then = [path for path in self._bests() if path.stem[-8:] <= checkpoint.stem[-8:]]
            needed |= set(until_then[-1:])
        return [path for path in self._bests() if path not in needed]
