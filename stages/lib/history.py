"""Training curves through DVCLive, replayed on resume so that no point is lost or shifted."""

from __future__ import annotations

from pathlib import Path

TRAINING = Path("data/training")


class History:
    """The points logged so far, in DVCLive's files and as plain data for the checkpoint.

    Args:
        directory: of DVCLive's metrics.json and plots.
        points: of an earlier part of this run, logged again.
        enabled: False in all processes but the first.
    """

    def __init__(self, directory: Path, points: list[tuple[int, dict[str, float]]], enabled: bool) -> None:
        self.live = None
        if enabled:
            from dvclive import Live

            self.live = Live(
                str(directory), dvcyaml=None, report=None, save_dvc_exp=False, monitor_system=False
            )
        self.points: list[tuple[int, dict[str, float]]] = []
        for step, values in points:
            self.log(step, values)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Add one point to each curve in ``values``."""
        self.points.append((step, values))
        if self.live is None:
            return
        self.live.step = step
        for name, value in values.items():
            self.live.log_metric(name, value)
        self.live.make_summary()

    @property
    def best_step(self) -> int | None:
        """The first step with the lowest validation loss, None without one."""
        losses = self._validation_losses()
        return min(losses, key=lambda step: (losses[step], step)) if losses else None

    def has_stalled(self, patience: int | None) -> bool:
        """Whether the last ``patience`` validation losses are no better than one before them."""
        if patience is None or self.best_step is None:
            return False
        return sum(step > self.best_step for step in self._validation_losses()) >= patience

    def _validation_losses(self) -> dict[int, float]:
        return {
            step: values["validation_loss"] for step, values in self.points if "validation_loss" in values
        }

    def close(self) -> None:
        """Finish the files."""
        if self.live is not None:
            self.live.end()
