"""Metrics of several runs, line by line: values, changes, and what a change says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from stages.lib.page.charts import (
    Whisker,
    whiskers,
)
from stages.lib.page.run import Estimate, Metric, Run

NUM_COLORS = 8


class Change(NamedTuple):
    """A difference, and what it says: ``better``, ``worse``, ``unsettled``, or nothing."""

    estimate: Estimate
    verdict: str


class Estimated(NamedTuple):
    """One line of a metric: whose it is, its value, and its changes, None where there is nothing to compare.

    Attributes:
        changes: from the base, and from the first run's, each with its verdict.
    """

    label: str
    color: str
    estimate: Estimate
    changes: tuple[Change | None, Change | None]


class Compared(NamedTuple):
    """A metric over all runs."""

    label: str
    better: str
    note: str
    lines: list[Estimated]
    whiskers: list[Whisker | None]


def color(index: int) -> str:
    """CSS class of a run's colour."""
    return f"run-{index % NUM_COLORS}"


def run_label(run: Run, runs: Sequence[Run]) -> str:
    return run.name if len(runs) > 1 else "fine-tuned"


def shared_label(label: str, names: Sequence[str], num_groups: int) -> str:
    return label if num_groups == 1 else f"{label} of {', '.join(names)}"


def compare_metrics(
    runs: Sequence[Run], changes_from_first: Mapping[tuple[str, int], Estimate]
) -> list[Compared]:
    """Metrics in the order of the first run that has them."""
    labels = {metric.name: metric for run in reversed(runs) for metric in run.metrics}
    order = dict.fromkeys(metric.name for run in runs for metric in run.metrics)
    return [_compare_metric(labels[name], name, runs, changes_from_first) for name in order]


def _compare_metric(
    metric: Metric, name: str, runs: Sequence[Run], changes_from_first: Mapping[tuple[str, int], Estimate]
) -> Compared:
    found = [(index, each) for index, run in enumerate(runs) for each in run.metrics if each.name == name]
    bases = _share_lines("base", "base", [(runs[index].name, each.base) for index, each in found])
    tuned = [
        Estimated(
            run_label(runs[index], runs),
            color(index),
            each.tuned,
            (
                _change(each.difference, each.better),
                _change(changes_from_first.get((name, index)), each.better),
            ),
        )
        for index, each in found
    ]
    known = [(runs[index].name, each.real) for index, each in found if each.real.value is not None]
    lines = [*bases, *tuned, *_share_lines("held-out images", "real", known)]
    return Compared(
        metric.label, metric.better, metric.note, lines, whiskers([line.estimate for line in lines])
    )


def _share_lines(label: str, css: str, estimates: Iterable[tuple[str, Estimate]]) -> list[Estimated]:
    """A line for each distinct estimate, with the names of the runs that share it where there are several."""
    groups: dict[Estimate, list[str]] = {}
    for name, estimate in estimates:
        groups.setdefault(estimate, []).append(name)
    return [
        Estimated(shared_label(label, names, len(groups)), css, estimate, (None, None))
        for estimate, names in groups.items()
    ]


def _change(estimate: Estimate | None, better: str) -> Change | None:
    if estimate is None or estimate.value is None:
        return None
    return Change(estimate, verdict(estimate, better))


def verdict(difference: Estimate, better: str) -> str:
    """``better``, ``worse``, ``unsettled`` where the interval of the difference holds 0, or nothing."""
    low, high = difference.low, difference.high
    if low is None or high is None:
        return ""
    if low <= 0.0 <= high:
        return "unsettled"
    return "better" if (low > 0.0) == (better == "higher") else "worse"
