"""How far a number may be off, by the method that keeps its promise at the sizes met here.

Means take the bootstrap-t, shares Wilson's interval, differences of paired shares Bonett and Price's,
distances between sets of pictures the jackknife. benchmarks/coverage.py simulates each, docs/evaluation.md
has the table. Percentiles of a bootstrap held the mean of five rows in 83 % of trials, not in 95 %.

A statistic is a function of weights, how often each row counts, so the difference of two statistics on
the same rows is a paired comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch

from stages.lib.core.draws import generator

MIN_LABELS = 5  # of fewer an interval says next to nothing
MAX_RARE = 3  # successes whose lower end Wilson's formula puts too high
# Weights of each sample, (B, N) float64, to the statistic's value under each row of them, (B,).
Statistic = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class Interval:
    """An estimate and the ends of its interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True)
class Mean:
    """The weighted mean of one number a row: (B, N) weights to (B,).

    Attributes:
        values: (N,) float64.
    """

    values: torch.Tensor

    def __call__(self, weights: torch.Tensor) -> torch.Tensor:
        return weights @ self.values / weights.sum(dim=1)


@dataclass(frozen=True)
class Share(Mean):
    """The mean of rows that are 0 or 1."""


@dataclass(frozen=True)
class ShareChange(Mean):
    """The mean of differences of two rows that are 0 or 1 each."""


def mean_of(values: torch.Tensor) -> Mean:
    """The mean of one number a row, (N,), e.g. of scores; of truth values, (N,) bool, their share."""
    return Share(values.double()) if values.dtype == torch.bool else Mean(values.double())


def difference(statistic: Statistic, reference: Statistic) -> Statistic:
    """``statistic - reference`` on the same rows: paired, so what they share cancels."""
    if isinstance(statistic, Mean) and isinstance(reference, Mean):
        are_shares = isinstance(statistic, Share) and isinstance(reference, Share)
        return (ShareChange if are_shares else Mean)(statistic.values - reference.values)
    return lambda *weights: statistic(*weights) - reference(*weights)


def remembered(statistic: Statistic) -> Statistic:
    """``statistic``, computed once for the same weights, which its interval and a `difference` share."""
    known: dict[tuple[bytes, ...], torch.Tensor] = {}

    def value(*weights: torch.Tensor) -> torch.Tensor:
        key = tuple(each.numpy().tobytes() for each in weights)
        if key not in known:
            known[key] = statistic(*weights)
        return known[key]

    return value


def bootstrap_interval(
    statistic: Statistic, samples: Sequence[Sequence[Hashable]], seed: int, num_resamples: int, level: float
) -> Interval:
    """The interval of a statistic, by the method that fits it; only that of a mean draws resamples.

    Args:
        statistic: of `mean_of` or `difference`, or any other that takes a matrix of weights for each of
            ``samples``.
        samples: one list of labels for each sample. Rows with one label are drawn together, in whichever
            samples they are: ``range(N)`` draws N rows one by one. Shares need labels that differ.
        seed: of the resamples, which depend on the labels too, not on the statistic.
        num_resamples: usually 1000 and more for the ends of an interval.
        level: confidence, e.g. 0.95.
    """
    if isinstance(statistic, Share):
        return _wilson(int(statistic.values.sum()), len(statistic.values), level)
    if isinstance(statistic, ShareChange):
        return _bonett_price(statistic.values, level)
    if isinstance(statistic, Mean):
        return _bootstrap_t(statistic, samples[0], seed, num_resamples, level)
    return jackknife_interval(statistic, samples, level)


def _bootstrap_t(
    mean: Mean, labels: Sequence[Hashable], seed: int, num_resamples: int, level: float
) -> Interval:
    """``mean - t * se`` with quantiles of the resamples' own t: skewed values make it lopsided.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, section 12.5; of labels with several
    rows the standard error is that of a ratio (Cochran 1977, Sampling Techniques, equation 6.13).
    """
    groups = _numbered(labels)  # (N,)
    num_groups = int(groups.max()) + 1
    estimate = mean.values.mean()
    nothing = torch.zeros(num_groups, dtype=torch.float64)
    sums = nothing.scatter_add(0, groups, mean.values - estimate)  # (G,)
    sizes = nothing.scatter_add(0, groups, torch.ones_like(mean.values))

    def of(counts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, G) to the mean less the estimate and its standard error, (B,) each."""
        total = counts @ sizes
        mean = counts @ sums / total
        squares = counts @ sums**2 - 2 * mean * (counts @ (sums * sizes)) + mean**2 * (counts @ sizes**2)
        return mean, (squares.clamp(min=0.0) * num_groups / (num_groups - 1)).sqrt() / total

    _, (se,) = of(torch.ones(1, num_groups, dtype=torch.float64))
    means, errors = of(resample_weights(range(num_groups), seed, 0, num_resamples))
    # A resample of one row alone has no error to divide by.
    t = (means / errors)[errors > 1e-6 * se]
    if not len(t):
        return Interval(estimate.item(), estimate.item(), estimate.item())
    tail = (1.0 - level) / 2.0
    low, high = torch.quantile(t, torch.tensor([tail, 1.0 - tail], dtype=torch.float64))
    # The estimate lies inside at low levels too, where both quantiles may have one sign.
    ends = estimate - high.clamp(min=0.0) * se, estimate - low.clamp(max=0.0) * se
    return Interval(estimate.item(), ends[0].item(), ends[1].item())


def _wilson(successes: int, count: int, level: float) -> Interval:
    """Of a share. Source: Brown, Cai and DasGupta 2001, Interval Estimation for a Binomial Proportion.

    Wilson's (equation 4), and for up to three rows of one kind the end near 0 or 1 that section 4.1.1
    takes from the Poisson distribution: Wilson's own leaves rare events out.
    """
    share = successes / count
    z = NormalDist().inv_cdf((1.0 + level) / 2.0)
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    half = z / (1 + z**2 / count) * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    low, high = middle - half, middle + half
    if successes <= MAX_RARE:
        low = min(low, _poisson_low(successes, 1.0 - level) / count)
    if count - successes <= MAX_RARE:
        high = max(high, 1.0 - _poisson_low(count - successes, 1.0 - level) / count)
    return Interval(share, min(max(low, 0.0), share), max(min(high, 1.0), share))


def _poisson_low(events: int, tail: float) -> float:
    """The rate at which that many events or more have the probability ``tail``; 0 for none."""
    low, high = 0.0, float(events)
    for _ in range(60 if events else 0):
        rate = (low + high) / 2
        fewer = sum(math.exp(-rate) * rate**number / math.factorial(number) for number in range(events))
        low, high = (rate, high) if 1.0 - fewer < tail else (low, rate)
    return low


def _bonett_price(changes: torch.Tensor, level: float) -> Interval:
    """Of a difference of paired shares, from (N,) of -1, 0 and 1.

    Source: Bonett and Price 2012, Adjusted Wald Confidence Interval for a Difference of Binomial
    Proportions Based on Paired Data: one row is added to either kind of discordant rows.
    """
    count = len(changes)
    gained, lost = (float((changes == sign).sum() + 1) / (count + 2) for sign in (1, -1))
    half = NormalDist().inv_cdf((1.0 + level) / 2.0) * math.sqrt(
        (gained + lost - (gained - lost) ** 2) / (count + 2)
    )
    middle, estimate = gained - lost, changes.mean().item()
    return Interval(estimate, min(max(middle - half, -1.0), estimate), max(min(middle + half, 1.0), estimate))


def jackknife_interval(statistic: Statistic, samples: Sequence[Sequence[Hashable]], level: float) -> Interval:
    """``estimate ± t * se`` from the statistic without each label in turn.

    Labels that are in the same samples are left out of one stratum; the variances of strata add up.

    Args:
        statistic, samples: as of `bootstrap_interval`.
        level: confidence, e.g. 0.95.

    Source: Efron and Tibshirani 1993, chapter 11; for statistics of pairs Arvesen 1969, Jackknifing
    U-statistics.
    """
    estimate = statistic(*equal_weights(samples)).item()
    held = [set(labels) for labels in samples]
    strata: dict[tuple[bool, ...], list[Hashable]] = {}
    for label in dict.fromkeys(label for labels in samples for label in labels):
        strata.setdefault(tuple(label in each for each in held), []).append(label)
    variance = 0.0
    for labels in strata.values():
        replicates = statistic(*(_without(labels, rows) for rows in samples))  # (L,)
        replicates = replicates[replicates.isfinite()]
        if len(replicates) > 1:
            variance += (len(replicates) - 1) * replicates.var(correction=0).item()
    t = _students_t(level, min(map(len, held)) - 1)
    half = t * math.sqrt(variance)
    return Interval(estimate, estimate - half, estimate + half)


def _students_t(level: float, freedom: int) -> float:
    """Quantile of Student's t, to the third order (Abramowitz and Stegun 1964, 26.7.5)."""
    z = NormalDist().inv_cdf((1.0 + level) / 2.0)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )


def _without(left_out: Sequence[Hashable], rows: Sequence[Hashable]) -> torch.Tensor:
    """0 for the rows of one label, 1 for the others: (L, N) float64."""
    number_of = {label: number for number, label in enumerate(left_out)}
    numbers = torch.tensor([number_of.get(row, -1) for row in rows])
    return (numbers != torch.arange(len(left_out))[:, None]).double()


def equal_weights(samples: Sequence[Sequence[Hashable]]) -> list[torch.Tensor]:
    """Of samples as they are, (1, N) float64 each."""
    return [torch.ones(1, len(labels), dtype=torch.float64) for labels in samples]


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
    groups = _numbered(labels)
    size = (num_resamples, int(groups.max()) + 1)
    drawn = torch.randint(size[1], size, generator=generator(seed, "bootstrap", position))
    counts = torch.zeros(size, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(size).double())
    return counts[:, groups]


def _numbered(labels: Sequence[Hashable]) -> torch.Tensor:
    number_of = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    return torch.tensor([number_of[label] for label in labels])
