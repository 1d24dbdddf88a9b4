"""The store of latent moments in memory, and the latents drawn from it.

`mean` and `logvar` are what the VAE's encoder gives, unscaled. `latents` are scaled: what the UNet
sees. The step from one to the other is taken here and nowhere else.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from stages.lib.core.devices import to_device
from stages.lib.core.paths import ENCODED_CAPTIONS, LATENTS
from stages.lib.data.pairs import SampleCaptions, read_captions_and_images
from stages.lib.encoding.conditioning import Conditioning
from stages.lib.frame.errors import StageError
from stages.lib.models.weights import check_made_by
from stages.lib.store.stored_rows import StoredRows
from stages.lib.store.zarr_store import attributes_of, open_store, read_array, subgroup

MOMENTS = {"mean", "logvar", "mask", "sample_id"}


@dataclass(frozen=True)
class Bucket:
    """The moments of all images of one shape.

    Attributes:
        sample_ids: N names, sorted.
        mean, logvar: (N, V, 4, h, w) float16, unscaled; in memory, or read when asked for.
        mask: (N, V, 1, h, w) float16 in [0, 1], weights of the training loss, where images have masks.
        rank: place of their resolution among several, 0 for the first.
        told: what the UNet is told of each view, by name, e.g. time_ids (N, V, 6) int32.
    """

    sample_ids: list[str]
    mean: torch.Tensor | StoredRows
    logvar: torch.Tensor | StoredRows
    mask: torch.Tensor | StoredRows | None = None
    rank: int = 0
    told: Mapping[str, torch.Tensor | StoredRows] = field(default_factory=dict)


@dataclass(frozen=True)
class Latents:
    """All moments of a data set.

    Rows are numbered through the buckets, in their order; a batch is made of one bucket. Of an image in
    several resolutions each has a row, the nominal one is that of the first that it is there in.

    Attributes:
        buckets: one for each shape; only one where all images are cropped to a square.
        left_out: names of the images that are in no bucket, because none fits.
        resolution: pixels; with several shapes the side of a square that stands for them, with several
            resolutions the first of them.
        scaling_factor: of the VAE's config, 0.18215 for SD 1 and 2.
        shift_factor: of the VAE's config, 0 where it has none.
        model_fingerprint: of the VAE.
        images: hash of the images that were encoded or left out.
        fingerprint: hash of the store's content.
        factor: pixels a latent along each side, where the UNet is told of views; else 0.
    """

    buckets: list[Bucket]
    left_out: frozenset[str]
    resolution: int
    scaling_factor: float
    shift_factor: float
    model_fingerprint: str
    images: str
    fingerprint: str
    factor: int = 0

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
        """Row numbers of ``sample_ids``, int64: of each image its nominal one.

        Raises:
            StageError: if a sample was never encoded.
        """
        return torch.tensor([rows[0] for rows in self.rows_of_each(sample_ids)], dtype=torch.int64)

    def rows_of_each(self, sample_ids: Sequence[str]) -> list[list[int]]:
        """As `rows`, of each image all that it has, in the order of the resolutions."""
        try:
            return [self._rows_of[sample_id] for sample_id in sample_ids]
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

    def conditions(
        self, rows: torch.Tensor, views: torch.Tensor | int, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """What the UNet is told of (B,) rows of one bucket on ``device``, by name, float32; {} if nothing."""
        number = int(self.bucket_of(rows[0]))
        rows = rows - self._first_rows[number]
        told = self.buckets[number].told
        return {name: to_device(values[rows, views], device).float() for name, values in told.items()}

    def masks(
        self, rows: torch.Tensor, views: torch.Tensor | int, device: torch.device
    ) -> torch.Tensor | None:
        """mask of (B,) rows of one bucket on ``device``, (B, 1, h, w); None where there are no masks."""
        number = int(self.bucket_of(rows[0]))
        mask = self.buckets[number].mask
        return None if mask is None else to_device(mask[rows - self._first_rows[number], views], device)

    @functools.cached_property
    def _first_rows(self) -> torch.Tensor:
        counts = [0, *(len(bucket.sample_ids) for bucket in self.buckets[:-1])]
        return torch.tensor(counts).cumsum(0)

    @functools.cached_property
    def _rows_of(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        first_rows = zip(self.buckets, self._first_rows.tolist(), strict=True)
        for bucket, first_row in sorted(first_rows, key=lambda each: each[0].rank):
            for row, sample_id in enumerate(bucket.sample_ids, first_row):
                found.setdefault(sample_id, []).append(row)
        return found


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
    rank_of = {
        name: attributes["resolutions"].index(resolution)
        for name, resolution in attributes.get("resolution_of", {}).items()
    }

    def array(name: str) -> torch.Tensor | StoredRows:
        if not resident:
            return StoredRows(path, store, name)
        return torch.from_numpy(read_array(path, store, name, "encode_images"))

    def bucket(group: str) -> Bucket:
        prefix = f"{group}/" if group else ""
        sample_ids = read_array(path, store, f"{prefix}sample_id", "encode_images").tolist()
        mean, logvar = array(f"{prefix}mean"), array(f"{prefix}logvar")
        mask = array(f"{prefix}mask") if "masks" in attributes else None
        names = set(subgroup(store, group).array_keys())
        told = {name: array(f"{prefix}{name}") for name in sorted(names - MOMENTS)}
        return Bucket(sample_ids, mean, logvar, mask, rank_of.get(group, 0), told)

    return Latents(
        buckets=[bucket(name) for name in sorted(store.group_keys())] or [bucket("")],
        left_out=frozenset(attributes["left_out"]),
        resolution=int(attributes["resolution"]),
        scaling_factor=float(attributes["scaling_factor"]),
        shift_factor=float(attributes["shift_factor"] or 0.0),
        model_fingerprint=str(attributes["model_fingerprint"]),
        images=str(attributes.get("images")),
        fingerprint=str(attributes["fingerprint"]),
        factor=int(attributes.get("factor", 0)),
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
    expected, told = set(conditioning.family.of_view), set(latents.buckets[0].told)
    if told != expected:
        raise StageError(
            f"{LATENTS}: expected {', '.join(sorted(expected)) or 'nothing'} of each view, which a base of "
            f"family {conditioning.family.name} is told, got {', '.join(sorted(told)) or 'nothing'}; "
            "run `dvc repro encode_images encode_captions`"
        )
    return latents.encoded(samples)


def check_vae(latents: Latents, vae: Path) -> None:
    """Raise StageError if the images were encoded by another VAE than this one."""
    check_made_by(LATENTS, "latents", latents.model_fingerprint, vae, "encode_images")
