"""Losses of held-out samples, sample by sample and timestep by timestep, and their means."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

NUM_BINS = 4  # of the noise schedule, whose losses are told apart


@dataclass(frozen=True)
class HeldOutLosses:
    """Unweighted denoising losses of held-out samples.

    Attributes:
        sample_ids: S names; none where no sample is held out.
        timesteps: T, evenly spaced.
        losses: (S, T) float64 on the CPU.
        num_train_timesteps: length of the noise schedule.
    """

    sample_ids: list[str]
    timesteps: list[int]
    losses: torch.Tensor
    num_train_timesteps: int

    def summary(self) -> dict[str, float]:
        """``validation_loss``, the mean over everything, and that of each quarter of the noise schedule.

        A quarter is named by its timesteps, ``validation_loss_t0_249``; one without a timestep is
        left out. Empty if no sample is held out.
        """
        if not self.sample_ids:
            return {}
        means = {"validation_loss": _mean(self.losses)}
        for first, last, columns in self.bins():
            means[f"validation_loss_t{first}_{last}"] = _mean(self.losses[:, columns])
        return means

    def bins(self) -> Iterator[tuple[int, int, list[int]]]:
        """First and last timestep of each quarter, and the columns of ``losses`` that lie in it."""
        edges = [self.num_train_timesteps * part // NUM_BINS for part in range(NUM_BINS + 1)]
        for start, stop in itertools.pairwise(edges):
            columns = [index for index, timestep in enumerate(self.timesteps) if start <= timestep < stop]
            if columns:
                yield start, stop - 1, columns


def _mean(losses: torch.Tensor) -> float:
    return math.fsum(losses.flatten().tolist()) / losses.numel()
