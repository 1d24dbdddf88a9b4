"""How often each kind of interval holds the true value, in simulations where that is known.

    python benchmarks/coverage.py

Writes benchmarks/results/coverage.json: 1000 trials a setting, nominal 95 %.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import torch

from stages.lib.evaluation.distances import cmmd
from stages.lib.evaluation.intervals import (
    Interval,
    bootstrap_interval,
    difference,
    jackknife_interval,
    mean_of,
)

RESULT = Path(__file__).parent / "results" / "coverage.json"
NUM_TRIALS, LEVEL = 1000, 0.95
DRAWS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], float]] = {
    "normal": (lambda z: z, 0.0),
    "lognormal, sigma 0.5": (lambda z: (0.5 * z).exp(), math.exp(0.125)),
    "exponential": (lambda z: -torch.special.ndtr(z).log(), 1.0),
}


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def held(intervals: list[Interval], truth: float) -> float:
    return round(sum(each.low <= truth <= each.high for each in intervals) / len(intervals), 3)


def means(draw: str, rows: int) -> float:
    transform, truth = DRAWS[draw]
    samples = transform(normal(NUM_TRIALS, rows, seed=rows))
    found = [
        bootstrap_interval(mean_of(values), [range(rows)], trial, 1000, LEVEL)
        for trial, values in enumerate(samples)
    ]
    return held(found, truth)


def shares(share: float, rows: int) -> float:
    """Exact: summed over all outcomes."""
    count = torch.arange(rows + 1, dtype=torch.float64)
    ways = math.lgamma(rows + 1) - torch.lgamma(count + 1) - torch.lgamma(rows - count + 1)
    mass = (ways + count * math.log(share) + (rows - count) * math.log1p(-share)).exp()
    found = [
        bootstrap_interval(mean_of(torch.arange(rows) < true), [range(rows)], 0, 100, LEVEL)
        for true in range(rows + 1)
    ]
    is_held = torch.tensor([each.low <= share <= each.high for each in found]).double()
    return round(float(mass @ is_held), 3)


def share_changes(rows: int) -> float:
    """Of 0.3 and 0.42, a third of the rows drawn anew."""
    uniform = normal(NUM_TRIALS, 3, rows, seed=rows).mul(0.5**0.5).erf().add(1).div(2)
    base = uniform[:, 0] < 0.3
    tuned = torch.where(uniform[:, 1] < 0.4, uniform[:, 2] < 0.6, base)
    found = [
        bootstrap_interval(difference(mean_of(left), mean_of(right)), [range(rows)], 0, 100, LEVEL)
        for left, right in zip(tuned, base, strict=True)
    ]
    return held(found, 0.12)


def distances(shift: float, rows: int, num_trials: int = 300) -> float:
    """CMMD with paired captions; the truth is the mean of the trials, which is unbiased."""
    labels, found = (range(rows), range(rows)), []
    for trial in range(num_trials):
        captions = normal(rows, 16, seed=3 * trial) + 0.5
        sides = [captions + 0.7 * normal(rows, 16, seed=3 * trial + side) for side in (1, 2)]
        found.append(jackknife_interval(cmmd(sides[0] + shift, sides[1], labels), labels, LEVEL))
    return held(found, sum(each.estimate for each in found) / num_trials)


def main() -> None:
    result = {
        "level": LEVEL,
        "means": {draw: {rows: means(draw, rows) for rows in (5, 8, 16, 64)} for draw in DRAWS},
        "shares": {
            share: {rows: shares(share, rows) for rows in (16, 64, 256)} for share in (0.01, 0.1, 0.5)
        },
        "differences of paired shares": {rows: share_changes(rows) for rows in (16, 64, 256)},
        "cmmd, by shift": {
            shift: {rows: distances(shift, rows) for rows in (16, 64)} for shift in (0.0, 0.2, 0.5)
        },
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(RESULT.read_text())


if __name__ == "__main__":
    main()
