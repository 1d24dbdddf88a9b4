"""Taking measurements: features of the pictures that a UNet made, and of the data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from stages.lib.data.image_shards import iter_images
from stages.lib.data.pairs import TRAIN, VALIDATION, SampleCaptions
from stages.lib.data.pictures.decoding import decoded
from stages.lib.diffusion.held_out import HeldOutLosses
from stages.lib.evaluation.measuring.clip_features import Clip, image_features, text_features
from stages.lib.evaluation.measuring.inception_features import Inception, inception_features
from stages.lib.evaluation.measuring.measurements import Measurements, Reference
from stages.lib.frame.progress import progress_bar

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler


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
        captions=list(captions),
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
    return ImageOps.fit(decoded(content), (side, side), Image.Resampling.LANCZOS)
