"""The store of latent moments in memory, and the latents drawn from it.

`mean` and `logvar` are what the VAE's encoder gives, unscaled. `latents` are scaled: what the UNet
sees. The step from one to the other is taken here and nowhere else.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from stages.lib.errors import StageError
from stages.lib.stores import content_fingerprint, open_store, read_array

LATENTS = Path("data/latents.zarr")


@dataclass(frozen=True)
class Latents:
    """All moments of a data set, resident in memory.

    Attributes:
        sample_ids: N names, sorted.
        mean: (N, V, 4, h, w) float16, unscaled.
        logvar: (N, V, 4, h, w) float16, unscaled.
        scaling_factor: of the VAE's config, 0.18215 for SD 1 and 2.
        shift_factor: of the VAE's config, 0 where it has none.
        fingerprint: hash of the store's content.
    """

    sample_ids: list[str]
    mean: torch.Tensor
    logvar: torch.Tensor
    scaling_factor: float
    shift_factor: float
    fingerprint: str

    def rows(self, sample_ids: list[str]) -> torch.Tensor:
        """Row numbers of ``sample_ids``, int64.

        Raises:
            StageError: if a sample was never encoded.
        """
        try:
            return torch.tensor([self._row_of[sample_id] for sample_id in sample_ids], dtype=torch.int64)
        except KeyError as error:
            raise StageError(
                f"{LATENTS}: sample {error} is not encoded; run `dvc repro encode_images`"
            ) from error

    def moments(
        self, rows: torch.Tensor, views: torch.Tensor | int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """mean and logvar of (B,) rows on ``device``, each (B, 4, h, w)."""
        return self.mean[rows, views].to(device), self.logvar[rows, views].to(device)

    @functools.cached_property
    def _row_of(self) -> dict[str, int]:
        return {sample_id: row for row, sample_id in enumerate(self.sample_ids)}


def read_latents(path: Path = LATENTS) -> Latents:
    """Load the store that encode_images made.

    Raises:
        StageError: if it is absent, incomplete or damaged.
    """
    store = open_store(path, "encode_images")
    return Latents(
        sample_ids=read_array(path, store, "sample_id", "encode_images").tolist(),
        mean=torch.from_numpy(read_array(path, store, "mean", "encode_images")),
        logvar=torch.from_numpy(read_array(path, store, "logvar", "encode_images")),
        scaling_factor=float(store.attrs["scaling_factor"]),
        shift_factor=float(store.attrs["shift_factor"] or 0.0),
        fingerprint=content_fingerprint(path),
    )


def sample_latents(
    mean: torch.Tensor,
    logvar: torch.Tensor,
    posterior_noise: torch.Tensor,
    scaling_factor: float,
    shift_factor: float = 0.0,
) -> torch.Tensor:
    """Draw from the VAE's posterior and scale (Kingma and Welling 2014, eq. 10).

    Args:
        mean, logvar: (B, 4, h, w) unscaled moments, any float dtype.
        posterior_noise: (B, 4, h, w) float32, standard normal; zeros give the mode.

    Returns:
        latents (B, 4, h, w) float32: ``(mean + exp(logvar / 2) * noise - shift) * scale``.
    """
    std = torch.exp(0.5 * logvar.float().clamp(-30.0, 20.0))
    return (mean.float() + std * posterior_noise - shift_factor) * scaling_factor


def channel_statistics(mean: np.ndarray) -> dict[str, float]:
    """Mean and standard deviation of each latent channel over (N, V, C, h, w), unscaled, in float64."""
    statistics = {}
    for channel in range(mean.shape[2]):
        values = mean[:, :, channel].astype(np.float64)
        statistics[f"latent_mean_{channel}"] = float(values.mean())
        statistics[f"latent_std_{channel}"] = float(values.std())
    return statistics
