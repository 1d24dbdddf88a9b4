"""What a run shows on its way, curves and previews: replayed on resume so that nothing is lost or shifted."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from stages.lib.core.files import fresh_directory
from stages.lib.core.tensors import write_checked
from stages.lib.data.pairs import SampleCaptions
from stages.lib.diffusion.previews import preview_captions, sample_previews
from stages.lib.encoding.conditioning import Conditioning
from stages.lib.frame.params import Train


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


class PreviewLatents:
    """The previews so far: files of their directory, and plain data for the checkpoint.

    ``step-00000175.safetensors`` holds ``latents`` (P, 4, h, w) float32, scaled as the UNet sees
    them; its metadata, ``captions`` (a JSON list of P texts) and ``global_step``.

    Args:
        directory: emptied.
        samples: captions of held-out ones are previewed; of all where none is held out.
        options: number, seed and guidance.
        earlier: previews of this run by step, written again if they were made by the same recipe.
        earlier_recipe: that they were made by, see `recipe`.
        enabled: False in all processes but the first, which alone writes.
    """

    def __init__(
        self,
        directory: Path,
        samples: list[SampleCaptions],
        options: Train,
        earlier: Mapping[int, torch.Tensor],
        earlier_recipe: str,
        enabled: bool,
    ) -> None:
        self.directory = fresh_directory(directory) if enabled else None
        self.captions = preview_captions(samples, options.num_previews)
        self.options = options
        wanted = options.preview_every_steps is not None and earlier_recipe == self.recipe
        self.latents_of: dict[int, torch.Tensor] = dict(earlier) if wanted else {}
        for global_step in self.latents_of:
            self._write(global_step)

    @property
    def recipe(self) -> str:
        """What two sets of previews have to share to be laid side by side."""
        averaged = self.options.use_ema and self.options.validate_ema
        return json.dumps([self.captions, self.options.preview_guidance_scale, averaged])

    def add(
        self,
        forward: Callable[..., Any],
        config: Mapping[str, Any],
        conditioning: Conditioning,
        shape: tuple[int, ...],
        factor: int,
        device: torch.device,
        num_steps: int,
    ) -> None:
        """Sample, keep and write the latents after ``num_steps`` steps; see `sample_previews`."""
        if num_steps not in self.latents_of:
            self.latents_of[num_steps] = sample_previews(
                forward, config, conditioning, self.captions, shape, factor, self.options, device
            )
            self._write(num_steps)

    def _write(self, global_step: int) -> None:
        if self.directory is not None:
            metadata = {
                "captions": json.dumps(self.captions, ensure_ascii=False),
                "global_step": str(global_step),
            }
            path = self.directory / f"step-{global_step:08d}.safetensors"
            write_checked(path, {"latents": self.latents_of[global_step]}, metadata)
