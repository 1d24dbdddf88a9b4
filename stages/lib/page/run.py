"""What the page shows of one run, as plain data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from stages.lib.page.lineage import Lineage
from stages.lib.page.pictures import Picture


@dataclass(frozen=True)
class Estimate:
    """A number and the ends of its interval; None where it is not known."""

    value: float | None
    low: float | None
    high: float | None


class Values(NamedTuple):
    """What a metric is the mean of: one number a sample or picture, of the base and of the tuned UNet."""

    names: tuple[str, ...]
    base: tuple[float, ...]
    tuned: tuple[float, ...]


@dataclass(frozen=True)
class Metric:
    """One metric of the base, of the tuned UNet, and their paired difference.

    Attributes:
        better: ``higher`` or ``lower``.
        real: of held-out images in the place of generated ones, where that says something.
        values: None for a metric that is no mean.
    """

    name: str
    label: str
    better: str
    base: Estimate
    tuned: Estimate
    difference: Estimate
    real: Estimate
    note: str
    values: Values | None = None


class Cell(NamedTuple):
    """What a picture shows; pictures of two runs are compared where their cells are equal."""

    setting: str
    prompt: str
    seed: int


class Figure(NamedTuple):
    """A drawing that a stage made."""

    section: str
    title: str
    picture: Picture


class Curve(NamedTuple):
    """A logged quantity; points that are not finite are left out."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]


class Reason(NamedTuple):
    """A sample that was left out, and why."""

    name: str
    reason: str


class Copied(NamedTuple):
    """A generated picture and the training image it resembles most."""

    picture: str
    sample_id: str
    similarity: float


@dataclass(frozen=True)
class Run:
    """Everything the page shows of one run.

    Attributes:
        name: as the user wrote it.
        revision: commit, or empty for the workspace.
        params: section -> key -> value.
        settings: name -> text to show, in the report's order.
        examples: prompt -> sample_id of a training sample with that caption.
        base, tuned: pictures of the two UNets.
    """

    name: str
    revision: str
    params: dict[str, dict[str, Any]]
    metrics: tuple[Metric, ...]
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    settings: dict[str, str]
    examples: dict[str, str]
    memorised: tuple[Copied, ...]
    base: dict[Cell, Picture]
    tuned: dict[Cell, Picture]
    figures: tuple[Figure, ...]
    curves: tuple[Curve, ...]
    rejected: tuple[Reason, ...]
    left_out: tuple[Reason, ...]
    lineage: Lineage
    unet: dict[str, str]
