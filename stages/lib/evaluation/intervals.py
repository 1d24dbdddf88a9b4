"""How far a number may be off: bootstrap or jackknife over the pictures or prompts it was computed from.

A resample is a row of weights, how often each picture was drawn. Statistics are functions of weights, so
one set of resamples serves them all, and the difference of two statistics is a paired comparison.

Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, sections 13.3 and 8.3, chapter 11.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch

from stages.lib.core.draws import generator

MIN_LABELS = 5  # of fewer an interval says next to nothing
NUM_GROUPS = 10  # of the jackknife
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
    estimate = statistic(*equal_weights(samples))
    weights = [
        resample_weights(labels, seed, position, num_resamples) for position, labels in enumerate(samples)
    ]
    replicates = statistic(*weights)  # (B,)
    # Two or three pictures are at times all one and the same, where a statistic of pairs is undefined.
    replicates = replicates[replicates.isfinite()]
    tail = (1.0 - level) / 2.0
    low, high = torch.quantile(replicates, torch.tensor([tail, 1.0 - tail], dtype=torch.float64)).tolist()
    return Interval(estimate.item(), low, high)


def jackknife_interval(
    statistic: Statistic, samples: Sequence[Sequence[Hashable]], seed: int, level: float
) -> Interval:
    """Interval of a statistic that the repeats in a bootstrap's samples would bias: ``estimate ± t * se``.

    The statistic is computed again without each of `NUM_GROUPS` groups, a group of every sample at a time:
    the samples are independent, so their variances add up. Student's t, to the first order (Abramowitz and
    Stegun 1964, 26.7.5), allows for a standard error from so few values.

    Args:
        statistic, samples: as of `bootstrap_interval`.
        seed: the groups depend on it and on the labels, not on the statistic.
        level: confidence, e.g. 0.95.
    """
    estimate = statistic(*equal_weights(samples))
    num_groups = min(NUM_GROUPS, *(len(set(labels)) for labels in samples))
    weights = [
        jackknife_weights(labels, seed, position, num_groups) for position, labels in enumerate(samples)
    ]
    replicates = statistic(*weights)  # (num_groups,)
    se = ((num_groups - 1) * replicates.var(correction=0)).sqrt()
    z = NormalDist().inv_cdf((1.0 + level) / 2.0)
    t = z + (z**3 + z) / (4 * (num_groups - 1))
    return Interval(estimate.item(), (estimate - t * se).item(), (estimate + t * se).item())


def equal_weights(samples: Sequence[Sequence[Hashable]]) -> list[torch.Tensor]:
    """Of samples as they are, (1, N) float64 each."""
    return [torch.ones(1, len(labels), dtype=torch.float64) for labels in samples]


def jackknife_weights(labels: Sequence[Hashable], seed: int, position: int, num_groups: int) -> torch.Tensor:
    """0 for the rows of one group, 1 for the others: (num_groups, N) float64; groups are drawn at random."""
    number_of = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    shuffled = torch.randperm(len(number_of), generator=generator(seed, "jackknife", position))
    groups = (shuffled % num_groups)[[number_of[label] for label in labels]]  # (N,)
    return (groups != torch.arange(num_groups)[:, None]).double()


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


def remembered(statistic: Statistic) -> Statistic:
    """``statistic``, computed once for the same weights, which its interval and a `difference` share."""
    known: dict[tuple[bytes, ...], torch.Tensor] = {}

    def value(*weights: torch.Tensor) -> torch.Tensor:
        key = tuple(each.numpy().tobytes() for each in weights)
        if key not in known:
            known[key] = statistic(*weights)
        return known[key]

    return value


def difference(statistic: Statistic, reference: Statistic) -> Statistic:
    """``statistic - reference`` on the same resamples: paired, so what they share cancels."""
    return lambda *weights: statistic(*weights) - reference(*weights)
