"""What is measured of a UNet and of the data before any statistics: held-out losses and features of pictures.

baseline writes both to one file, which evaluate reads instead of measuring the base and the data again.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import torch
from PIL import Image, ImageOps

from stages.lib.core.tensors import write_safetensors
from stages.lib.data.pairs import TRAIN, VALIDATION, SampleCaptions, iter_images
from stages.lib.diffusion.validation import HeldOutLosses
from stages.lib.evaluation.clip_features import Clip, image_features, text_features
from stages.lib.evaluation.inception_features import Inception, inception_features
from stages.lib.frame.errors import StageError
from stages.lib.frame.progress import progress_bar

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler


@dataclass(frozen=True)
class Reference:
    """Features of the data, (N, D) float32, in the order of the sample_ids: CLIP's, but for the last.

    Attributes:
        training: images of the training split.
        held_out: images of the validation split.
        held_out_captions: the first captions of those.
        held_out_inception: Inception's features of the held-out images, where FID is asked for.
    """

    training: torch.Tensor
    held_out: torch.Tensor
    held_out_captions: torch.Tensor
    held_out_inception: torch.Tensor | None = None


@dataclass(frozen=True)
class Measurements:
    """What was measured of one UNet.

    Attributes:
        losses: of held-out samples.
        prediction_type: what the UNet predicts.
        alphas_cumprod: (num_train_timesteps,) of its noise schedule.
        picture_features: (N, D) of the pictures it made, those of held-out captions first; None without CLIP.
        caption_features: (M, D) of the M held-out captions.
        inception_features: (M, 2048) of the pictures of held-out captions, where FID is asked for.
        inception_fingerprint: of the Inception that saw them.
    """

    losses: HeldOutLosses
    prediction_type: str
    alphas_cumprod: torch.Tensor
    picture_features: torch.Tensor | None
    caption_features: torch.Tensor | None
    inception_features: torch.Tensor | None = None
    inception_fingerprint: str = ""

    def compares_with(self, other: Measurements) -> bool:
        """Whether the losses are of the same problems: equal targets on equal noise schedules."""
        return self.prediction_type == other.prediction_type and torch.equal(
            self.alphas_cumprod, other.alphas_cumprod
        )


def measure_unet(
    losses: HeldOutLosses,
    scheduler: DDPMScheduler,
    clip: Clip | None,
    inception: Inception | None,
    pictures: Sequence[Path],
    captions: Sequence[str],
) -> Measurements:
    """Take the features of the pictures in files and of the captions of the first of them."""
    return Measurements(
        losses=losses,
        prediction_type=scheduler.config.prediction_type,
        alphas_cumprod=scheduler.alphas_cumprod.cpu(),  # add_noise moves it to the samples' device
        picture_features=None if clip is None else image_features(clip, map(Image.open, pictures)),
        caption_features=None if clip is None else text_features(clip, captions),
        inception_features=None
        if inception is None
        else inception_features(inception, map(Image.open, pictures[: len(captions)])),
        inception_fingerprint="" if inception is None else inception.fingerprint,
    )


def measure_data(
    clip: Clip,
    inception: Inception | None,
    samples: Sequence[SampleCaptions],
    images: Path,
    resolution: int,
) -> Reference:
    """Features of all images, at the resolution of the pictures: sharpness would tell them apart."""
    ids = {
        split: {sample.sample_id for sample in samples if sample.split == split}
        for split in (TRAIN, VALIDATION)
    }

    def squares(split: str) -> Iterator[Image.Image]:
        with progress_bar(f"features, {split}", "images", len(ids[split])) as bar:
            for _, content in iter_images(images, ids[split]):
                yield square(content, resolution)
                bar.update()

    captions = [sample.captions[0] for sample in samples if sample.split == VALIDATION]
    return Reference(
        image_features(clip, squares(TRAIN)),
        image_features(clip, squares(VALIDATION)),
        text_features(clip, captions),
        None if inception is None else inception_features(inception, squares(VALIDATION)),
    )


def square(content: bytes, side: int) -> Image.Image:
    """The centre of an image file, ``side`` pixels a side."""
    with Image.open(io.BytesIO(content)) as opened:
        return ImageOps.fit(opened.convert("RGB"), (side, side), Image.Resampling.LANCZOS)


def write_measurements(path: Path, measurements: Measurements, reference: Reference | None) -> None:
    """Write a safetensors file; the same values give the same bytes."""
    losses = measurements.losses
    tensors = {
        "validation_losses": losses.losses,  # computed in float32: nothing is lost
        "alphas_cumprod": measurements.alphas_cumprod,
        "picture_features": measurements.picture_features,
        "caption_features": measurements.caption_features,
        "inception_features": measurements.inception_features,
    }
    if reference is not None:
        tensors |= {
            "training_features": reference.training,
            "held_out_features": reference.held_out,
            "held_out_caption_features": reference.held_out_captions,
            "held_out_inception_features": reference.held_out_inception,
        }
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    metadata = {
        "prediction_type": measurements.prediction_type,
        "sample_ids": json.dumps(losses.sample_ids),
        "timesteps": json.dumps(losses.timesteps),
        "num_train_timesteps": str(losses.num_train_timesteps),
        "inception_fingerprint": measurements.inception_fingerprint,
    }
    write_safetensors(path, present, metadata)


def read_measurements(path: Path) -> tuple[Measurements, Reference | None]:
    """What `write_measurements` wrote.

    Raises:
        StageError: if there is no such file.
    """
    if not path.exists():
        raise StageError(f"{path}: not found; run `dvc repro baseline`")
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    losses = HeldOutLosses(
        json.loads(metadata["sample_ids"]),
        json.loads(metadata["timesteps"]),
        tensors["validation_losses"].double(),
        int(metadata["num_train_timesteps"]),
    )
    measurements = Measurements(
        losses,
        metadata["prediction_type"],
        tensors["alphas_cumprod"],
        tensors.get("picture_features"),
        tensors.get("caption_features"),
        tensors.get("inception_features"),
        metadata["inception_fingerprint"],
    )
    if "training_features" not in tensors:
        return measurements, None
    reference = Reference(
        tensors["training_features"],
        tensors["held_out_features"],
        tensors["held_out_caption_features"],
        tensors.get("held_out_inception_features"),
    )
    return measurements, reference
