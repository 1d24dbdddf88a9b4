"""Geometry of the page's drawings: axes, lines, whiskers. The template turns it into SVG."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stages.lib.page.run import Curve, Estimate

WIDTH, HEIGHT = 360, 200
LEFT, RIGHT, TOP, BOTTOM = 50, 350, 10, 172  # of the plot inside it
TITLES = {
    "train_loss": "Training loss",
    "validation_loss": "Held-out loss",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "inversion_loss": "Loss of the placeholder",
    "inversion_validation_loss": "Held-out loss of the placeholder",
    "inversion_grad_norm": "Gradient norm of the placeholder",
}


class Tick(NamedTuple):
    """Where a tick lies, in SVG units, and its label."""

    at: float
    label: str


class Line(NamedTuple):
    """One run's curve: label and colour as the page shows them, and its points in SVG units."""

    label: str
    color: str
    points: str
    curve: Curve


@dataclass(frozen=True)
class Chart:
    """Curves of one quantity over optimizer steps.

    Attributes:
        reference: height of the base's value, where there is one, and its text.
        steps, values: ends of the axes.
    """

    title: str
    lines: tuple[Line, ...]
    step_ticks: tuple[Tick, ...]
    value_ticks: tuple[Tick, ...]
    reference: Tick | None
    steps: tuple[float, float]
    values: tuple[float, float]


class Whisker(NamedTuple):
    """Dot and ends of the interval, in per cent of the drawing's width."""

    value: float
    low: float
    high: float


def draw_chart(name: str, curves: Sequence[tuple[str, str, Curve]], reference: float | None = None) -> Chart:
    """A chart of one quantity.

    Args:
        name: of the quantity.
        curves: label, colour and points of each run.
        reference: a value to draw a level line at.
    """
    steps = [step for _, _, curve in curves for step in curve.steps]
    values = [value for _, _, curve in curves for value in curve.values]
    values += [] if reference is None else [reference]
    across = 0.0, float(max(1, *steps))
    value_ticks = ticks(min(values), max(values))
    upward = value_ticks[0], value_ticks[-1]

    def right(step: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * _share(step, across), 1)

    def down(value: float) -> float:
        return round(BOTTOM - (BOTTOM - TOP) * _share(value, upward), 1)

    lines = [
        Line(
            label,
            color,
            " ".join(
                f"{right(step):g},{down(value):g}"
                for step, value in zip(curve.steps, curve.values, strict=True)
            ),
            curve,
        )
        for label, color, curve in curves
    ]
    return Chart(
        title=curve_title(name),
        lines=tuple(lines),
        step_ticks=tuple(
            Tick(right(tick), f"{tick:,.0f}")
            for tick in ticks(*across)
            if tick <= across[1] and tick == int(tick)
        ),
        value_ticks=tuple(map(Tick, map(down, value_ticks), tick_labels(value_ticks))),
        reference=None if reference is None else Tick(down(reference), f"base {number(reference)}"),
        steps=across,
        values=upward,
    )


def curve_title(name: str) -> str:
    """What a logged quantity is called on the page."""
    quarter = re.fullmatch(r"validation_loss_t(\d+)_(\d+)", name)
    if quarter:
        return f"Held-out loss, timesteps {quarter[1]} to {quarter[2]}"
    return TITLES.get(name, name.replace("_", " "))


def curve_order(name: str) -> tuple[int, str]:
    """Sorts the known quantities first."""
    return ([*TITLES].index(name) if name in TITLES else len(TITLES), name)


def whiskers(estimates: Sequence[Estimate]) -> list[Whisker | None]:
    """All estimates on one scale with a margin at both ends; None for a value that is not known."""
    known = [part for each in estimates for part in _parts(each)]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    margin = 0.06 * (high - low) or 1.0
    ends = low - margin, high + margin
    return [
        Whisker(*(round(100 * _share(part, ends), 2) for part in _parts(each))) if _parts(each) else None
        for each in estimates
    ]


def ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers, steps of 1, 2 or 5 times a power of ten, around ``low`` to ``high``."""
    if high <= low:
        low, high = low - (abs(low) or 1.0) / 2, high + (abs(high) or 1.0) / 2
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{index * step:.12g}") for index in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """As short as they can be, all with the same number of decimals."""
    texts = [f"{value:g}" for value in values]
    decimals = max(len(text.partition(".")[2]) for text in texts)
    if not any("e" in text for text in texts):
        texts = [f"{value:.{decimals}f}" if value else "0" for value in values]
    return [_shorten(text) for text in texts]


def number(value: float | None) -> str:
    """Four significant digits, with a true minus sign."""
    if value is None:
        return "–"
    return _shorten("0" if value == 0.0 else f"{value:#.4g}")


def signed(value: float | None) -> str:
    """As `number`, with a plus sign."""
    return number(value) if value is None or value < 0 else f"+{number(value)}"


def interval(estimate: Estimate) -> str:
    """``low to high``, empty where it is not known."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{number(estimate.low)} to {number(estimate.high)}"


def _shorten(text: str) -> str:
    """``-1.5e-05`` as ``−1.5e−5``."""
    mantissa, _, exponent = text.partition("e")
    return (f"{mantissa}e{int(exponent)}" if exponent else text).replace("-", "−")


def _parts(estimate: Estimate) -> list[float]:
    """Value and ends; the value itself where an end is not known."""
    if estimate.value is None:
        return []
    ends = (estimate.low, estimate.high)
    return [estimate.value, *(estimate.value if end is None else end for end in ends)]


def _share(value: float, ends: Iterable[float]) -> float:
    low, high = ends
    return (value - low) / (high - low)
