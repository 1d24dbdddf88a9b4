"""The numbers of an evaluation with their intervals: metrics.json for DVC, report.json for the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stages.lib.evaluation.distances import (
    Nearest,
    clip_image_similarity,
    clip_scores,
    cmmd,
    frechet_distance,
    kid,
    nearest_images,
)
from stages.lib.evaluation.intervals import (
    MIN_LABELS,
    Interval,
    Statistic,
    bootstrap_interval,
    difference,
    equal_weights,
    jackknife_interval,
    mean_of,
    remembered,
)
from stages.lib.evaluation.measurements import Measurements, Reference
from stages.lib.frame.params import Evaluate

Estimate = dict[str, float | None]
Rows = Sequence[Sequence[Hashable]]
FindInterval = Callable[[Statistic, Rows, Evaluate], Interval]
Distance = Callable[[torch.Tensor, torch.Tensor], Statistic]
SUMMARY = (
    "base_validation_loss",
    "tuned_validation_loss",
    "validation_loss_change",
    "tuned_clip_score",
    "tuned_kid",
    "tuned_cmmd",
    "tuned_memorised_share",
)
_CLIP_METRICS = {
    "clip_score": ("CLIP score", "higher"),
    "clip_image_similarity": ("CLIP similarity to the training set", "higher"),
    "kid": ("KID on CLIP features", "lower"),
    "cmmd": ("CMMD", "lower"),
    "frechet_distance": ("Fréchet distance on CLIP features", "lower"),
    "memorised_share": ("Memorised share", "lower"),
}
UNKNOWN: Estimate = {"value": None, "low": None, "high": None}


def bootstrapped(statistic: Statistic, rows: Rows, options: Evaluate) -> Interval:
    return bootstrap_interval(
        statistic, rows, options.bootstrap_seed, options.bootstrap_resamples, options.bootstrap_level
    )


def jackknifed(statistic: Statistic, rows: Rows, options: Evaluate) -> Interval:
    return jackknife_interval(statistic, rows, options.bootstrap_seed, options.bootstrap_level)


@dataclass(frozen=True)
class Metric:
    """One number of a UNet.

    Attributes:
        name: in metrics.json, after ``base_`` or ``tuned_``.
        label: for people.
        better: ``higher`` or ``lower``.
        rows: labels of what the statistic's weights weigh, see `bootstrap_interval`.
        statistic: of a UNet's measurements; None where it cannot be computed.
        note: what it was computed from, and what to read it beside.
        real: the same of held-out images in the place of generated ones, if that says something.
        values: of which the statistic is the mean, (N,), where runs are compared by it one by one.
        names: of these values, N: what they were measured on.
        interval: how it is found.
    """

    name: str
    label: str
    better: str
    rows: Rows
    statistic: Callable[[Measurements], Statistic | None]
    note: str
    real: Statistic | None = None
    real_rows: Rows = ()
    values: Callable[[Measurements], torch.Tensor] | None = None
    names: Sequence[str] = ()
    interval: FindInterval = bootstrapped


def metrics_of(
    base: Measurements, reference: Reference | None, captions: Sequence[str], options: Evaluate
) -> list[Metric]:
    """Every metric, also those that cannot be computed here.

    Args:
        base: of the base UNet.
        reference: of the data; None without CLIP.
        captions: of all pictures, those of held-out captions first.
        options: thresholds.
    """
    return [*_loss_metrics(base), *_clip_metrics(base, reference, captions, options)]


def report_entries(
    metrics: Sequence[Metric], base: Measurements, tuned: Measurements, options: Evaluate
) -> list[dict[str, Any]]:
    """The ``metrics`` of report.json: base, tuned and their paired difference, each with an interval."""
    return [_entry(metric, base, tuned, options) for metric in metrics]


def base_numbers(metrics: Sequence[Metric], base: Measurements, options: Evaluate) -> dict[str, float | None]:
    """data/baseline/metrics.json: ``base_<name>`` and the ends of its interval, ``_low`` and ``_high``."""
    return _flat(
        (f"base_{metric.name}", _estimate(metric.statistic(base), metric.rows, metric.interval, options))
        for metric in metrics
    )


def compared_numbers(entries: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """data/evaluation/metrics.json: as `base_numbers`, with ``tuned_``, and ``real_`` for held-out images.

    ``validation_loss_change`` is relative, negative where the trained UNet is better.
    """
    numbers = _flat(
        (f"{unet}_{entry['name']}", entry[unet]) for entry in entries for unet in ("base", "tuned")
    )
    numbers |= {f"real_{entry['name']}": entry["real"]["value"] for entry in entries if "real" in entry}
    loss = next(entry for entry in entries if entry["name"] == "validation_loss")
    change = loss["difference"]["value"]
    numbers["validation_loss_change"] = None if change is None else change / loss["base"]["value"]
    return numbers


def summary_of(numbers: Mapping[str, float | None]) -> dict[str, float | None]:
    """data/evaluation/summary.json: the few of `compared_numbers` that `dvc exp show` has columns for."""
    return {name: numbers[name] for name in SUMMARY}


def nearest_training_images(measurements: Measurements, reference: Reference) -> Nearest:
    """Of every picture that the UNet made."""
    assert measurements.picture_features is not None  # as there is a reference
    return nearest_images(measurements.picture_features, reference.training)


def _entry(metric: Metric, base: Measurements, tuned: Measurements, options: Evaluate) -> dict[str, Any]:
    statistics = metric.statistic(base), metric.statistic(tuned)
    entry: dict[str, Any] = {"name": metric.name, "label": metric.label, "better": metric.better}
    entry |= {
        unet: _estimate(statistic, metric.rows, metric.interval, options)
        for unet, statistic in zip(("base", "tuned"), statistics, strict=True)
    }
    note, change = metric.note, None
    if metric.name.startswith("validation_loss") and not tuned.compares_with(base):
        note += (
            f"; the losses do not compare: the base predicts {base.prediction_type}, the fine-tuned UNet "
            f"{tuned.prediction_type}, or their noise schedules differ"
        )
    elif statistics[0] is not None and statistics[1] is not None:
        change = difference(statistics[1], statistics[0])
    entry |= {"difference": _estimate(change, metric.rows, metric.interval, options), "note": note}
    if metric.real is not None:
        entry["real"] = _estimate(metric.real, metric.real_rows, metric.interval, options)
    if metric.values is not None and None not in (entry["base"]["value"], entry["tuned"]["value"]):
        entry["values"] = {
            "names": list(metric.names),
            "base": metric.values(base).tolist(),
            "tuned": metric.values(tuned).tolist(),
        }
    return entry


def _estimate(
    statistic: Statistic | None, rows: Rows, find_interval: FindInterval, options: Evaluate
) -> Estimate:
    if statistic is None:
        return UNKNOWN
    value = statistic(*equal_weights(rows)).item()
    if not math.isfinite(value):
        return UNKNOWN
    if any(len(set(labels)) < MIN_LABELS for labels in rows):
        return {**UNKNOWN, "value": value}
    interval = find_interval(statistic, rows, options)
    return {"value": interval.estimate, "low": interval.low, "high": interval.high}


def _flat(estimates: Iterator[tuple[str, Estimate]]) -> dict[str, float | None]:
    return {
        f"{name}{'' if part == 'value' else f'_{part}'}": number
        for name, estimate in estimates
        for part, number in estimate.items()
    }


def _loss_metrics(base: Measurements) -> Iterator[Metric]:
    losses = base.losses
    num_samples, timesteps = len(losses.sample_ids), range(len(losses.timesteps))
    bins = [(f"_t{first}_{last}", f", timesteps {first} to {last}", at) for first, last, at in losses.bins()]
    for ending, part, columns in [("", "", list(timesteps)), *bins]:

        def values(unet: Measurements, columns: list[int] = columns) -> torch.Tensor:
            return unet.losses.losses[:, columns].mean(dim=1)

        note = f"{num_samples} held-out samples at {len(columns)} timesteps, the same noise for both"
        yield Metric(
            f"validation_loss{ending}",
            f"Held-out loss{part}",
            "lower",
            [range(num_samples)],
            _mean(values) if num_samples else _unknown,
            note if num_samples else "no sample is held out (prepare.validation_fraction)",
            values=values,
            names=losses.sample_ids,
        )


def _clip_metrics(
    base: Measurements, reference: Reference | None, captions: Sequence[str], options: Evaluate
) -> Iterator[Metric]:
    if reference is None or base.caption_features is None:
        note = "data/base has no clip/ to measure with (fetch_base.clip_source)"
        for name, (label, better) in _CLIP_METRICS.items():
            yield Metric(name, label, better, (), _unknown, note)
        return
    prompted = list(captions[: len(base.caption_features)])
    yield from _likeness_metrics(reference, prompted)
    yield from _distance_metrics(reference, prompted)
    if reference.held_out_inception is not None:
        yield _fid(reference, prompted)
    yield _memorised_share(reference, prompted, options)


def _likeness_metrics(reference: Reference, prompted: list[str]) -> Iterator[Metric]:
    def score(unet: Measurements) -> torch.Tensor:
        return clip_scores(_generated(unet), _captions(unet))

    def similarity(unet: Measurements) -> torch.Tensor:
        return clip_image_similarity(_generated(unet), reference.training)

    real_scores = clip_scores(reference.held_out, reference.held_out_captions)
    real_similarity = clip_image_similarity(reference.held_out, reference.training)
    to_training = f"to {len(reference.training)} training images"
    for name, values, what, real in (
        ("clip_score", score, "to their captions", real_scores),
        ("clip_image_similarity", similarity, to_training, real_similarity),
    ):
        label, better = _CLIP_METRICS[name]
        yield Metric(
            name,
            label,
            better,
            [range(len(prompted))],
            _mean(values) if prompted else _unknown,
            f"{len(prompted)} pictures of held-out captions {what}{_beside(real, '.3g')}",
            real=mean_of(real) if len(real) else None,
            real_rows=[range(len(real))],
            values=values,
            names=prompted,
        )


def _distance_metrics(reference: Reference, prompted: list[str]) -> Iterator[Metric]:
    num_held_out, width = reference.held_out.shape
    fewest = min(len(prompted), num_held_out)

    distances: tuple[tuple[str, Distance, int, FindInterval], ...] = (
        ("kid", kid, 2, bootstrapped),
        ("cmmd", cmmd, 2, bootstrapped),
        ("frechet_distance", _frechet_distance, 2 * width, jackknifed),
    )
    for name, distance, needed, interval in distances:

        def statistic(unet: Measurements, distance: Distance = distance) -> Statistic:
            return distance(_generated(unet), reference.held_out)

        label, better = _CLIP_METRICS[name]
        note = _of_both(prompted, reference)
        if fewest < needed:
            note += f"; needs {needed} of both (evaluate.num_metric_samples)"
        yield Metric(
            name,
            label,
            better,
            [range(len(prompted)), range(num_held_out)],
            statistic if fewest >= needed else _unknown,
            note,
            interval=interval,
        )


def _fid(reference: Reference, prompted: list[str]) -> Metric:
    def distance(unet: Measurements) -> Statistic | None:
        generated, real = unet.inception_features, reference.held_out_inception
        if generated is None or real is None or min(len(generated), len(real)) < 2:
            return None
        return _frechet_distance(generated, real)

    return Metric(
        "fid",
        "FID on Inception's features",
        "lower",
        [range(len(prompted)), range(len(reference.held_out))],
        distance,
        f"{_of_both(prompted, reference)}; published values are of many thousands",
        interval=jackknifed,
    )


def _frechet_distance(generated: torch.Tensor, reference: torch.Tensor) -> Statistic:
    return remembered(frechet_distance(generated, reference))  # seconds where features are wide


def _of_both(prompted: list[str], reference: Reference) -> str:
    return f"{len(prompted)} pictures of held-out captions, {len(reference.held_out)} held-out images"


def _memorised_share(reference: Reference, prompted: list[str], options: Evaluate) -> Metric:
    def memorised(unet: Measurements) -> torch.Tensor:
        nearest = nearest_images(_generated(unet), reference.training)
        return nearest.above(options.memorisation_threshold).double()

    real = nearest_images(reference.held_out, reference.training).above(options.memorisation_threshold)
    label, better = _CLIP_METRICS["memorised_share"]
    return Metric(
        "memorised_share",
        label,
        better,
        [range(len(prompted))],
        _mean(memorised) if prompted else _unknown,
        f"share of {len(prompted)} pictures of held-out captions whose nearest training image has a "
        f"cosine above {options.memorisation_threshold:g}{_beside(real, '.0%')}",
        real=mean_of(real) if len(real) else None,
        real_rows=[range(len(real))],
        values=memorised,
        names=prompted,
    )


def _mean(values: Callable[[Measurements], torch.Tensor]) -> Callable[[Measurements], Statistic]:
    return lambda unet: mean_of(values(unet))


def _unknown(unet: Measurements) -> None:
    return None


def _beside(real: torch.Tensor, form: str) -> str:
    """What held-out images themselves reach: near-duplicates in the data lift it for any model."""
    return f"; of held-out images {real.double().mean().item():{form}}" if len(real) else ""


def _generated(unet: Measurements) -> torch.Tensor:
    """Features of the pictures of held-out captions."""
    assert unet.picture_features is not None  # as there is a reference
    return unet.picture_features[: len(_captions(unet))]


def _captions(unet: Measurements) -> torch.Tensor:
    assert unet.caption_features is not None  # as there is a reference
    return unet.caption_features
