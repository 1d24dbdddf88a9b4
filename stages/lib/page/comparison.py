"""How much better one run is than another, on the same held-out samples: what they share cancels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from stages.lib.evaluation.intervals import MIN_LABELS, bootstrap_interval, difference, mean_of
from stages.lib.page.run import Estimate, Metric, Run


def changes_from_first(runs: Sequence[Run]) -> dict[tuple[str, int], Estimate]:
    """Paired differences of the tuned UNets, with bootstrap intervals.

    Two runs are paired in a metric where they measured the same things in the same way: their *base*
    reached the same number on each of them. Losses also need UNets that predict what their bases do.

    Returns:
        (name of the metric, index of the run) -> change from the first run, for the runs after it.
    """
    if not runs:
        return {}
    first = {metric.name: metric for metric in runs[0].metrics}
    return {
        (metric.name, index): _change(metric, first[metric.name], runs[0].params["evaluate"])
        for index, run in enumerate(runs)
        for metric in run.metrics
        if index and _are_paired(metric, first.get(metric.name))
    }


def _are_paired(metric: Metric, first: Metric | None) -> bool:
    if metric.values is None or first is None or first.values is None:
        return False
    if metric.difference.value is None or first.difference.value is None:  # a loss on another problem
        return False
    return metric.values.names == first.values.names and metric.values.base == first.values.base


def _change(metric: Metric, first: Metric, options: Mapping[str, int | float]) -> Estimate:
    assert metric.values is not None and first.values is not None
    tuned, reference = (
        torch.tensor(values, dtype=torch.float64) for values in (metric.values.tuned, first.values.tuned)
    )
    change = (tuned - reference).mean().item()
    is_share = bool(((tuned == 0) | (tuned == 1)).all() and ((reference == 0) | (reference == 1)).all())
    if is_share:
        statistic = difference(mean_of(tuned.bool()), mean_of(reference.bool()))
    else:
        statistic = mean_of(tuned - reference)
    if len(tuned) < MIN_LABELS:
        return Estimate(change, None, None)
    interval = bootstrap_interval(
        statistic,
        [range(len(tuned))],
        int(options["bootstrap_seed"]),
        int(options["bootstrap_resamples"]),
        float(options["bootstrap_level"]),
    )
    return Estimate(interval.estimate, interval.low, interval.high)
