"""The store of latent moments in memory, and the latents drawn from it.

`mean` and `logvar` are what the VAE's encoder gives, unscaled. `latents` are scaled: what the UNet
sees. The step from one to the other is taken here and nowhere else.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from stages.lib.core.devices import to_device
from stages.lib.core.paths import ENCODED_CAPTIONS, LATENTS
from stages.lib.data.pairs import SampleCaptions, read_captions_and_images
from stages.lib.encoding.conditioning import Conditioning
from stages.lib.frame.errors import StageError
from stages.lib.models.weights import check_made_by
from stages.lib.store.stored_rows import StoredRows
from stages.lib.store.zarr_store import attributes_of, open_store, read_array


@dataclass(frozen=True)
class Bucket:
    """The moments of all images of one shape.

    Attributes:
        sample_ids: N names, sorted.
        mean, logvar: (N, V, 4, h, w) float16, unscaled; in memory, or read when asked for.
    """

    sample_ids: list[str]
    mean: torch.Tensor | StoredRows
    logvar: torch.Tensor | StoredRows


@dataclass(frozen=True)
class Latents:
    """All moments of a data set.

    Rows are numbered through the buckets, in their order; a batch is made of one bucket.

    Attributes:
        buckets: one for each shape; only one where all images are cropped to a square.
        left_out: names of the images that are in no bucket, because none fits.
        resolution: pixels; with several shapes the side of a square that stands for them.
        scaling_factor: of the VAE's config, 0.18215 for SD 1 and 2.
        shift_factor: of the VAE's config, 0 where it has none.
        model_fingerprint: of the VAE.
        images: hash of the images that were encoded or left out.
        fingerprint: hash of the store's content.
    """

    buckets: list[Bucket]
    left_out: frozenset[str]
    resolution: int
    scaling_factor: float
    shift_factor: float
    model_fingerprint: str
    images: str
    fingerprint: str

    @property
    def num_views(self) -> int:
        return self.buckets[0].mean.shape[1]

    @property
    def num_channels(self) -> int:
        return self.buckets[0].mean.shape[2]

    def encoded(self, samples: Iterable[SampleCaptions]) -> list[SampleCaptions]:
        """``samples`` without those whose images were left out."""
        return [sample for sample in samples if sample.sample_id not in self.left_out]

    def rows(self, sample_ids: Sequence[str]) -> torch.Tensor:
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

    def bucket_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Number of the bucket of each row, int64."""
        return torch.bucketize(rows, self._first_rows, right=True) - 1

    def moments(
        self, rows: torch.Tensor, views: torch.Tensor | int, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """mean and logvar of (B,) rows of one bucket on ``device``, each (B, 4, h, w)."""
        number = int(self.bucket_of(rows[0]))
        bucket, rows = self.buckets[number], rows - self._first_rows[number]
        return to_device(bucket.mean[rows, views], device), to_device(bucket.logvar[rows, views], device)

    @functools.cached_property
    def _first_rows(self) -> torch.Tensor:
        counts = [0, *(len(bucket.sample_ids) for bucket in self.buckets[:-1])]
        return torch.tensor(counts).cumsum(0)

    @functools.cached_property
    def _row_of(self) -> dict[str, int]:
        names = (sample_id for bucket in self.buckets for sample_id in bucket.sample_ids)
        return {sample_id: row for row, sample_id in enumerate(names)}


def read_latents(path: Path = LATENTS, resident: bool = True) -> Latents:
    """Open the store that encode_images made.

    Args:
        path: of the store.
        resident: load the moments into memory; false reads them as they are asked for.

    Raises:
        StageError: if it is absent, incomplete or damaged.
    """
    store = open_store(path, "encode_images")
    attributes = attributes_of(store)

    def moment(name: str) -> torch.Tensor | StoredRows:
        if not resident:
            return StoredRows(path, store, name)
        return torch.from_numpy(read_array(path, store, name, "encode_images"))

    def bucket(prefix: str) -> Bucket:
        sample_ids = read_array(path, store, f"{prefix}sample_id", "encode_images").tolist()
        return Bucket(sample_ids, moment(f"{prefix}mean"), moment(f"{prefix}logvar"))

    return Latents(
        buckets=[bucket(f"{name}/") for name in sorted(store.group_keys())] or [bucket("")],
        left_out=frozenset(attributes["left_out"]),
        resolution=int(attributes["resolution"]),
        scaling_factor=float(attributes["scaling_factor"]),
        shift_factor=float(attributes["shift_factor"] or 0.0),
        model_fingerprint=str(attributes["model_fingerprint"]),
        images=str(attributes.get("images")),
        fingerprint=str(attributes["fingerprint"]),
    )


def read_samples(latents: Latents, conditioning: Conditioning, captions: Path) -> list[SampleCaptions]:
    """The samples of captions.parquet whose images are in the store.

    Args:
        latents, conditioning: of the same pairs.
        captions: the file.

    Raises:
        StageError: if the stores were not made of the pairs whose captions these are: a file of an earlier
            run may be whole, and still not belong to the others.
    """
    samples, images = read_captions_and_images(captions)
    if latents.images != images:
        raise StageError(
            f"{LATENTS}: expected those of the images that {captions} was written with, got those of others; "
            "run `dvc repro encode_images`"
        )
    texts = {"", *(caption for sample in samples for caption in sample.captions)}
    if differing := sorted(texts ^ conditioning.row_of.keys()):
        raise StageError(
            f"{ENCODED_CAPTIONS}: expected the captions of {captions}, got {len(differing)} others, e.g. "
            f"{differing[0]!r}; run `dvc repro encode_captions`"
        )
    return latents.encoded(samples)


def check_vae(latents: Latents, vae: Path) -> None:
    """Raise StageError if the images were encoded by another VAE than this one."""
    check_made_by(LATENTS, "latents", latents.model_fingerprint, vae, "encode_images")
