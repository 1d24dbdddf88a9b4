"""The numbers of an evaluation with their intervals: metrics.json for DVC, report.json for the page."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from stages.lib.evaluation.intervals import (
    MIN_LABELS,
    Statistic,
    bootstrap_interval,
    difference,
    equal_weights,
    mean_of,
    remembered,
)
from stages.lib.evaluation.measuring.measurements import Measurements, Reference
from stages.lib.evaluation.metrics import (
    METRICS,
    AnyMetric,
    DistanceMetric,
    MeanMetric,
    Subject,
    held_out_images,
    loss_metrics,
    matched,
    subject_of,
)
from stages.lib.frame.params import Evaluate

EstimateEntry = dict[str, float | None]
Rows = Sequence[Sequence[Hashable]]
UNKNOWN: EstimateEntry = {"value": None, "low": None, "high": None}
NO_CLIP = "data/base has no clip/ to measure with (fetch_base.clip_source)"
SUMMARY = (
    "base_validation_loss",
    "tuned_validation_loss",
    "validation_loss_change",
    "tuned_clip_score",
    "tuned_kid",
    "tuned_cmmd",
    "tuned_memorised_share",
)


def report_entries(
    base: Measurements, tuned: Measurements, reference: Reference | None, options: Evaluate
) -> list[dict[str, Any]]:
    """The ``metrics`` of report.json: base, tuned and their paired difference, each with an interval.

    Args:
        base, tuned: what was measured of the two UNets, on the same samples and captions.
        reference: of the data; None without CLIP.
        options: thresholds, and how intervals are found.
    """
    return [
        _entry(metric, base, tuned, reference, options)
        for metric in (*loss_metrics(base.losses), *_metrics_on_pictures(reference))
    ]


def base_numbers(
    base: Measurements, reference: Reference | None, options: Evaluate
) -> dict[str, float | None]:
    """data/baseline/metrics.json: ``base_<name>`` and the ends of its interval, ``_low`` and ``_high``."""
    subject = subject_of(base)
    return _flat(
        (
            f"base_{metric.name}",
            _estimate(_statistic(metric, subject, reference, options), metric, subject, reference, options),
        )
        for metric in (*loss_metrics(base.losses), *_metrics_on_pictures(reference))
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


def _metrics_on_pictures(reference: Reference | None) -> Iterator[AnyMetric]:
    """Those that can be asked for: FID where Inception's features are."""
    for metric in METRICS:
        of_inception = isinstance(metric, DistanceMetric) and metric.of_inception
        if not of_inception or (reference is not None and reference.held_out_inception is not None):
            yield metric


def _entry(
    metric: AnyMetric,
    base: Measurements,
    tuned: Measurements,
    reference: Reference | None,
    options: Evaluate,
) -> dict[str, Any]:
    subjects = {"base": subject_of(base), "tuned": subject_of(tuned)}
    statistics = {unet: _statistic(metric, subject, reference, options) for unet, subject in subjects.items()}
    entry: dict[str, Any] = {"name": metric.name, "label": metric.label, "better": metric.better}
    entry |= {
        unet: _estimate(statistic, metric, subjects["base"], reference, options)
        for unet, statistic in statistics.items()
    }
    note, change = _note(metric, subjects["base"], reference, options), None
    if metric.name.startswith("validation_loss") and not tuned.compares_with(base):
        note += (
            f"; the losses do not compare: the base predicts {base.prediction_type}, the fine-tuned UNet "
            f"{tuned.prediction_type}, or their noise schedules differ"
        )
    elif statistics["base"] is not None and statistics["tuned"] is not None:
        change = difference(statistics["tuned"], statistics["base"])
    entry |= {"difference": _estimate(change, metric, subjects["base"], reference, options), "note": note}
    if isinstance(metric, MeanMetric):
        if metric.real_form and reference is not None and len(reference.held_out):
            entry["real"] = _real(metric, reference, options)
        if None not in (entry["base"]["value"], entry["tuned"]["value"]):
            entry["values"] = {"names": _rows_of(metric, subjects["base"], reference)} | {
                unet: _values(metric, subject, reference, options).double().tolist()
                for unet, subject in subjects.items()
            }
    return entry


def _statistic(
    metric: AnyMetric, subject: Subject, reference: Reference | None, options: Evaluate
) -> Statistic | None:
    """The metric of a subject as a function of weights; None where it cannot be computed."""
    if isinstance(metric, MeanMetric):
        counts = [len(_names(metric, subject))]
        if not _is_loss(metric):
            counts.append(0 if reference is None else len(reference.held_out))
        is_known = _is_loss(metric) or reference is not None
        is_known = is_known and counts[0] > 0 and min(counts) >= metric.least
        return mean_of(_values(metric, subject, reference, options)) if is_known else None
    if reference is None:
        return None
    generated, held_out = _sides(metric, subject, reference)
    if generated is None or held_out is None:
        return None
    if min(len(generated), len(held_out)) < metric.least(held_out.shape[1]):
        return None
    return remembered(metric.distance(generated, held_out, matched(subject, reference)))


def _sides(
    metric: DistanceMetric, subject: Subject, reference: Reference
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if metric.of_inception:
        return subject.inception, reference.held_out_inception
    return subject.features, reference.held_out


def _values(
    metric: MeanMetric, subject: Subject, reference: Reference | None, options: Evaluate
) -> torch.Tensor:
    return metric.values(subject, reference, options)  # type: ignore[arg-type]  # a loss needs no reference


def _is_loss(metric: AnyMetric) -> bool:
    return metric.name.startswith("validation_loss")


def _names(metric: MeanMetric, subject: Subject) -> list[str]:
    """What the values were measured on."""
    if _is_loss(metric):
        return list(subject.losses.sample_ids) if subject.losses else []
    return list(subject.prompts)


def _rows_of(metric: MeanMetric, subject: Subject, reference: Reference | None) -> list[str]:
    """Names of the values, those of held-out images in the order of their sample_ids."""
    if metric.of_images:
        return [f"held-out image {row}" for row in range(0 if reference is None else len(reference.held_out))]
    return _names(metric, subject)


def _rows(metric: AnyMetric, subject: Subject, reference: Reference | None) -> Rows:
    """Labels of what the statistic's weights weigh, see `bootstrap_interval`."""
    if isinstance(metric, MeanMetric):
        return [range(len(_rows_of(metric, subject, reference)))]
    return [[], []] if reference is None else list(matched(subject, reference))


def _real(metric: MeanMetric, reference: Reference, options: Evaluate) -> EstimateEntry:
    subject = held_out_images(reference)
    return _estimate(_statistic(metric, subject, reference, options), metric, subject, reference, options)


def _note(metric: AnyMetric, subject: Subject, reference: Reference | None, options: Evaluate) -> str:
    """What the metric was computed from, and what to read it beside."""
    if _is_loss(metric):
        return metric.note if isinstance(metric, MeanMetric) else ""
    if reference is None:
        return NO_CLIP
    num_pictures, num_held_out = len(subject.prompts), len(reference.held_out)
    if isinstance(metric, MeanMetric):
        note = metric.note.format(
            pictures=num_pictures,
            images=num_held_out,
            training=len(reference.training),
            threshold=options.memorisation_threshold,
        )
        if metric.real_form and num_held_out:
            real = metric.values(held_out_images(reference), reference, options).double().mean().item()
            note += f"; of held-out images {real:{metric.real_form}}"
        return note
    note = f"{num_pictures} pictures of held-out captions, {num_held_out} held-out images"
    if metric.of_inception:
        return f"{note}; published values are of many thousands, and not extrapolated"
    least = metric.least(reference.held_out.shape[1])
    if min(num_pictures, num_held_out) < least:
        note += f"; needs {least} of both (evaluate.num_metric_samples)"
    return note


def _estimate(
    statistic: Statistic | None,
    metric: AnyMetric,
    subject: Subject,
    reference: Reference | None,
    options: Evaluate,
) -> EstimateEntry:
    if statistic is None:
        return UNKNOWN
    rows = _rows(metric, subject, reference)
    value = statistic(*equal_weights(rows)).item()
    if not math.isfinite(value):
        return UNKNOWN
    has_interval = isinstance(metric, MeanMetric) or metric.has_interval
    if not has_interval or any(len(set(labels)) < MIN_LABELS for labels in rows):
        return {**UNKNOWN, "value": value}
    interval = bootstrap_interval(
        statistic, rows, options.bootstrap_seed, options.bootstrap_resamples, options.bootstrap_level
    )
    return {"value": interval.estimate, "low": interval.low, "high": interval.high}


def _flat(estimates: Iterable[tuple[str, EstimateEntry]]) -> dict[str, float | None]:
    return {
        f"{name}{'' if part == 'value' else f'_{part}'}": number
        for name, estimate in estimates
        for part, number in estimate.items()
    }
