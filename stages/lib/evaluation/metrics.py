"""The metrics, a short specification each: what they are called, what they are made of, how to read them.

A new metric is a function in `distances` and an entry in `METRICS`. Its interval, what held-out images reach,
and its places in metrics.json, in report.json and on the page follow from the entry.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from stages.lib.diffusion.held_out import HeldOutLosses
from stages.lib.evaluation.distances import clip_image_similarity, clip_scores, cmmd, frechet_distance, kid
from stages.lib.evaluation.intervals import Statistic
from stages.lib.evaluation.measuring.measurements import Measurements, Reference
from stages.lib.evaluation.measuring.nearest import nearest_images
from stages.lib.frame.params import Evaluate


@dataclass(frozen=True)
class Subject:
    """What a metric judges: a UNet's losses and its pictures of held-out captions, or held-out images.

    Attributes:
        losses: of held-out samples; None of images.
        prompts: M captions.
        features: (M, D) float32, CLIP's, of the pictures.
        captions: (M, D) float32, CLIP's, of the captions.
        inception: (M, 2048) float32, where FID is asked for.
    """

    losses: HeldOutLosses | None
    prompts: Sequence[str]
    features: torch.Tensor
    captions: torch.Tensor
    inception: torch.Tensor | None


@dataclass(frozen=True)
class MeanMetric:
    """The mean of one number a picture or a sample, by which two runs can be compared one by one.

    Attributes:
        name: in metrics.json, after ``base_``, ``tuned_`` or ``real_``.
        label: for people.
        better: ``higher`` or ``lower``.
        values: of a subject, (M,), given the features of the data and the options.
        note: what it was computed from; ``{pictures}``, ``{training}`` and ``{threshold}`` are filled in.
        real_form: how the note shows what held-out images reach themselves; "" where that says nothing.
    """

    name: str
    label: str
    better: Literal["higher", "lower"]
    values: Callable[[Subject, Reference, Evaluate], torch.Tensor]
    note: str
    real_form: str = ""


@dataclass(frozen=True)
class DistanceMetric:
    """A distance of a subject's pictures to held-out images as a set: lower is better.

    Attributes:
        name, label: as of `MeanMetric`.
        distance: of two sets of features, (M, D) and (R, D), as a function of weights.
        least: pictures that it needs on either side, given the features' width D.
        interval: ``jackknife`` where repeats in a bootstrap's samples would bias it.
        of_inception: whether the features are Inception's; it is left out where there are none.
    """

    name: str
    label: str
    distance: Callable[[torch.Tensor, torch.Tensor], Statistic]
    least: Callable[[int], int] = lambda width: 2
    interval: Literal["bootstrap", "jackknife"] = "bootstrap"
    of_inception: bool = False

    better = "lower"


AnyMetric = MeanMetric | DistanceMetric


def _clip_score(subject: Subject, reference: Reference, options: Evaluate) -> torch.Tensor:
    return clip_scores(subject.features, subject.captions)


def _image_similarity(subject: Subject, reference: Reference, options: Evaluate) -> torch.Tensor:
    return clip_image_similarity(subject.features, reference.training)


def _memorised(subject: Subject, reference: Reference, options: Evaluate) -> torch.Tensor:
    nearest = nearest_images(subject.features, reference.training)
    return nearest.above(options.memorisation_threshold).double()


METRICS: tuple[AnyMetric, ...] = (
    MeanMetric(
        "clip_score",
        "CLIP score",
        "higher",
        _clip_score,
        "{pictures} pictures of held-out captions to their captions",
        real_form=".3g",
    ),
    MeanMetric(
        "clip_image_similarity",
        "CLIP similarity to the training set",
        "higher",
        _image_similarity,
        "{pictures} pictures of held-out captions to {training} training images",
        real_form=".3g",
    ),
    DistanceMetric("kid", "KID on CLIP features", kid),
    DistanceMetric("cmmd", "CMMD", cmmd),
    DistanceMetric(
        "frechet_distance",
        "Fréchet distance on CLIP features",
        frechet_distance,
        least=lambda width: 2 * width,
        interval="jackknife",
    ),
    DistanceMetric(
        "fid", "FID on Inception's features", frechet_distance, interval="jackknife", of_inception=True
    ),
    MeanMetric(
        "memorised_share",
        "Memorised share",
        "lower",
        _memorised,
        "share of {pictures} pictures of held-out captions whose nearest training image has a cosine above "
        "{threshold:g}",
        real_form=".0%",
    ),
)


def loss_metrics(losses: HeldOutLosses) -> Iterator[MeanMetric]:
    """The held-out loss, and that of each quarter of the noise schedule."""
    timesteps = list(range(len(losses.timesteps)))
    bins = [(f"_t{first}_{last}", f", timesteps {first} to {last}", at) for first, last, at in losses.bins()]
    for ending, part, columns in [("", "", timesteps), *bins]:
        note = (
            f"{len(losses.sample_ids)} held-out samples at {len(columns)} timesteps, the same noise for both"
            if losses.sample_ids
            else "no sample is held out (prepare.validation_fraction)"
        )
        yield MeanMetric(
            f"validation_loss{ending}",
            f"Held-out loss{part}",
            "lower",
            functools.partial(_losses, columns),
            note,
        )


def subject_of(unet: Measurements) -> Subject:
    """A UNet, with its pictures of held-out captions alone."""
    nothing = torch.empty(0, 1)
    count = len(unet.captions)
    return Subject(
        unet.losses,
        unet.captions,
        nothing if unet.picture_features is None else unet.picture_features[:count],
        nothing if unet.caption_features is None else unet.caption_features,
        unet.inception_features,
    )


def held_out_images(reference: Reference) -> Subject:
    """Held-out images in the place of generated ones."""
    prompts = [str(row) for row in range(len(reference.held_out))]
    return Subject(None, prompts, reference.held_out, reference.held_out_captions, None)


def _losses(
    columns: list[int], subject: Subject, reference: Reference | None, options: Evaluate
) -> torch.Tensor:
    assert subject.losses is not None  # a UNet's
    return subject.losses.losses[:, columns].mean(dim=1)
