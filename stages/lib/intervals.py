"""How far a number may be off: percentile bootstrap over the pictures or prompts it was computed from.

A resample is a row of weights, how often each picture was drawn. Statistics are functions of weights, so
one set of resamples serves them all, and the difference of two statistics is a paired comparison.

Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, sections 13.3 and 8.3.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import torch

from stages.lib.draws import generator

MIN_LABELS = 5  # of fewer a bootstrap says next to nothing

# Weights of each sample, (B, N) float64, to the statistic's value under each row of them, (B,).
Statistic = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its interval."""

    estimate: float
    low: float
    high: float


def bootstrap_interval(
    statistic: Statistic, samples: Sequence[Sequence[Hashable]], seed: int, num_resamples: int, level: float
) -> Interval:
    """Percentile interval of a statistic.

    Args:
        statistic: takes one matrix of weights for each of ``samples``.
        samples: one list of labels for each independently drawn sample. Rows with one label are drawn
            together, ``range(N)`` draws N rows one by one. Label pictures by prompt where a prompt has
            several seeds: resampling whole groups, and not within them too, comes closest to the variance
            of nested data (Davison and Hinkley 1997, Bootstrap Methods and their Application, section 3.8).
        seed: the resamples depend on it and on the labels, not on the statistic.
        num_resamples: usually 1000 and more for the ends of an interval.
        level: share of the resamples inside, e.g. 0.95.
    """
    estimate = statistic(*(torch.ones(1, len(labels), dtype=torch.float64) for labels in samples))
    weights = [
        resample_weights(labels, seed, position, num_resamples) for position, labels in enumerate(samples)
    ]
    replicates = statistic(*weights)  # (B,)
    # Two or three pictures are at times all one and the same, where a statistic of pairs is undefined.
    replicates = replicates[replicates.isfinite()]
    tail = (1.0 - level) / 2.0
    low, high = torch.quantile(replicates, torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist()
    return Interval(estimate.item(), low, high)


def resample_weights(
    labels: Sequence[Hashable], seed: int, position: int, num_resamples: int
) -> torch.Tensor:
    """How often each row is drawn when as many labels as there are, are drawn with replacement.

    Args:
        labels: of the rows, N.
        seed: of the bootstrap.
        position: of the sample among those of a statistic; two positions are drawn independently.
        num_resamples: B.

    Returns:
        (B, N) float64 counts.
    """
    number_of = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    size = (num_resamples, len(number_of))
    drawn = torch.randint(len(number_of), size, generator=generator(seed, "bootstrap", position))
    counts = torch.zeros(size, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(size).double())
    return counts[:, [number_of[label] for label in labels]]


def mean_of(values: torch.Tensor) -> Statistic:
    """The weighted mean of one number a row, (N,), e.g. of scores, or the share of true ones."""
    values = values.double()
    return lambda weights: weights @ values / weights.sum(dim=1)


def difference(statistic: Statistic, reference: Statistic) -> Statistic:
    """``statistic - reference`` on the same resamples: paired, so what they share cancels."""
    return lambda *weights: statistic(*weights) - reference(*weights)
