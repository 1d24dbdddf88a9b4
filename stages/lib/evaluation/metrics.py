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
import torch.nn.functional as F

from stages.lib.diffusion.held_out import HeldOutLosses
from stages.lib.evaluation.distances import (
    Labels,
    clip_image_similarity,
    clip_scores,
    cmmd,
    extrapolated_frechet,
    kid,
)
from stages.lib.evaluation.intervals import Statistic
from stages.lib.evaluation.manifolds import NUM_NEIGHBOURS, precision, recall, retrieved
from stages.lib.evaluation.measuring.measurements import Measurements, Reference
from stages.lib.evaluation.measuring.nearest import nearest_images
from stages.lib.frame.params import Evaluate

SAME_CAPTION = 1.0 - 1e-6  # cosine of two captions' features


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
        values: of a subject, (M,), given the features of the data and the options; truth values where the
            mean is a share.
        note: what it was computed from; ``{pictures}``, ``{images}``, ``{training}`` and ``{threshold}`` are
            filled in.
        real_form: how the note shows what held-out images reach themselves; "" where that says nothing.
        of_images: whether the values are of held-out images, not of pictures.
        least: pictures that it needs, and held-out images where it takes those.
    """

    name: str
    label: str
    better: Literal["higher", "lower"]
    values: Callable[[Subject, Reference, Evaluate], torch.Tensor]
    note: str
    real_form: str = ""
    of_images: bool = False
    least: int = 0


@dataclass(frozen=True)
class DistanceMetric:
    """A distance of a subject's pictures to held-out images as a set: lower is better.

    Attributes:
        name, label: as of `MeanMetric`.
        distance: of two sets of features, (M, D) and (R, D), and their labels, as a function of weights.
        least: pictures that it needs on either side, given the features' width D.
        has_interval: whether one is known that keeps what it promises.
        of_inception: whether the features are Inception's; it is left out where there are none.
    """

    name: str
    label: str
    distance: Callable[[torch.Tensor, torch.Tensor, Labels], Statistic]
    least: Callable[[int], int] = lambda width: 2
    has_interval: bool = True
    of_inception: bool = False

    better = "lower"


AnyMetric = MeanMetric | DistanceMetric


def _clip_score(subject: Subject, reference: Reference, options: Evaluate) -> torch.Tensor:
    return clip_scores(subject.features, subject.captions)


def _image_similarity(subject: Subject, reference: Reference, options: Evaluate) -> torch.Tensor:
    return clip_image_similarity(subject.features, reference.training)


def _memorised(subject: Subject, reference: Reference, options: Evaluate) -> torch.Tensor:
    nearest = nearest_images(subject.features, reference.training)
    return nearest.above(options.memorisation_threshold)


def _precision(subject: Subject, reference: Reference, options: Evaluate) -> torch.Tensor:
    return precision(subject.features, reference.held_out)


def _recall(subject: Subject, reference: Reference, options: Evaluate) -> torch.Tensor:
    return recall(subject.features, reference.held_out)


def _retrieved(subject: Subject, reference: Reference, options: Evaluate) -> torch.Tensor:
    return retrieved(subject.features, subject.captions)


def _frechet(generated: torch.Tensor, reference: torch.Tensor, labels: Labels) -> Statistic:
    return lambda *weights: extrapolated_frechet(generated, reference, labels)


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
        _frechet,
        least=lambda width: 2 * width,
        has_interval=False,
    ),
    DistanceMetric("fid", "FID on Inception's features", _frechet, has_interval=False, of_inception=True),
    MeanMetric(
        "precision",
        "Precision on CLIP features",
        "higher",
        _precision,
        "share of {pictures} pictures of held-out captions that lie among {images} held-out images",
        least=NUM_NEIGHBOURS + 1,
    ),
    MeanMetric(
        "recall",
        "Recall on CLIP features",
        "higher",
        _recall,
        "share of {images} held-out images that lie among {pictures} pictures of held-out captions",
        of_images=True,
        least=NUM_NEIGHBOURS + 1,
    ),
    MeanMetric(
        "retrieved_share",
        "Captions found again",
        "higher",
        _retrieved,
        "share of {pictures} pictures that are nearer to their own caption than to each of the others",
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


def matched(subject: Subject, reference: Reference) -> Labels:
    """Numbers of a subject's pictures and of the held-out images, equal where the caption is.

    Captions are told apart by their features: CLIP gives equal captions equal ones, and sees no
    difference between others of equal features either.
    """
    captions = F.normalize(torch.cat([subject.captions, reference.held_out_captions]).double())
    numbers = ((captions @ captions.T) > SAME_CAPTION).int().argmax(dim=1).tolist()  # the first alike
    count = len(subject.captions)
    return numbers[:count], numbers[count:]


def _losses(
    columns: list[int], subject: Subject, reference: Reference | None, options: Evaluate
) -> torch.Tensor:
    assert subject.losses is not None  # a UNet's
    return subject.losses.losses[:, columns].mean(dim=1)
