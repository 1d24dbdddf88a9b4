"""One HTML page about one run or several: no network, no build step, pictures inside it or beside it.

The Content-Security-Policy in the page forbids every script but its own and every request but for pictures
that lie beside it, so neither a caption nor a prompt can bring one in.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import yaml

from stages.lib.page.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Chart,
    curve_order,
    draw_chart,
    interval,
    number,
    signed,
)
from stages.lib.page.metric_lines import color, compare_metrics, run_label, shared_label
from stages.lib.page.pictures import Picture
from stages.lib.page.run import Cell, Estimate, Figure, Metric, Run

FILES = Path(__file__).parent / "templates"
PLOT = {"left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM, "width": WIDTH, "height": HEIGHT}
NUM_REASONS = 20
MISSING = object()


class PictureSource(NamedTuple):
    """Pictures of one UNet, under the label and colour that the page gives it."""

    label: str
    color: str
    pictures: dict[Cell, Picture]


class Parameter(NamedTuple):
    """A key of params.yaml, its value in each run, and whether the runs differ in it."""

    key: str
    values: list[str]
    differs: bool


def render_page(
    runs: Sequence[Run], changes_from_first: Mapping[tuple[str, int], Estimate] | None = None
) -> str:
    """The page, the same text for the same runs.

    Args:
        runs: one or several, in the order shown.
        changes_from_first: (name of a metric, index of a run) -> its change from the first run's.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FILES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "interval": interval}
    script = (FILES / "page.js").read_text(encoding="utf-8")
    sources, charts = picture_sources(runs), draw_charts(runs)
    return environment.get_template("page.html.jinja").render(
        runs=runs,
        title=title_of(runs[0]),
        params_text=yaml.safe_dump(runs[0].params, sort_keys=False, allow_unicode=True)
        if len(runs) == 1
        else "",
        colors=[color(index) for index in range(len(runs))],
        several=len(runs) > 1,
        sources=sources,
        headline=headlines(runs),
        metrics=compare_metrics(runs, changes_from_first or {}),
        are_paired=bool(changes_from_first),
        charts=charts,
        plot=PLOT,
        figures=group_figures(runs),
        params=compare_params(runs),
        num_reasons=NUM_REASONS,
        data=page_data(runs, sources, charts),
        style=(FILES / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def title_of(run: Run) -> str:
    """What was fine-tuned on what, and for how long."""
    prepare, train = run.params.get("prepare", {}), run.params.get("train", {})
    source = prepare.get("source") or prepare.get("hub_id") or "several sources"
    name = Path(str(source)).name or str(source)
    steps, epochs = train.get("max_train_steps"), train.get("num_train_epochs")
    length = f", {steps:,} steps" if isinstance(steps, int) else f", {epochs} epochs" if epochs else ""
    return f"Fine-tuned on {name}{length}"


def picture_sources(runs: Sequence[Run]) -> list[PictureSource]:
    """Bases first; runs whose bases drew the same pictures share one."""
    bases: list[tuple[list[str], dict[Cell, Picture]]] = []
    for run in runs:
        for names, pictures in bases:
            shared = run.base.keys() & pictures.keys()
            if shared and all(run.base[cell] == pictures[cell] for cell in shared):
                names.append(run.name)
                pictures |= run.base
                break
        else:
            bases.append(([run.name], dict(run.base)))
    return [
        *(
            PictureSource(shared_label("base", names, len(bases)), "base", pictures)
            for names, pictures in bases
        ),
        *(PictureSource(run_label(run, runs), color(index), run.tuned) for index, run in enumerate(runs)),
    ]


def headlines(runs: Sequence[Run]) -> list[Metric | None]:
    """Held-out loss of each run."""
    return [next((each for each in run.metrics if each.name == "validation_loss"), None) for run in runs]


def draw_charts(runs: Sequence[Run]) -> list[Chart]:
    """A chart for each logged quantity that has points, the runs' curves in one."""
    names = {curve.name for run in runs for curve in run.curves if curve.steps}
    charts = []
    for name in sorted(names, key=curve_order):
        curves = [
            (run_label(run, runs), color(index), curve)
            for index, run in enumerate(runs)
            for curve in run.curves
            if curve.name == name and curve.steps
        ]
        bases = {metric.base.value for run in runs for metric in run.metrics if metric.name == name}
        charts.append(draw_chart(name, curves, bases.pop() if len(bases) == 1 else None))
    return charts


def group_figures(runs: Sequence[Run]) -> list[tuple[Figure, list[str]]]:
    """Each distinct figure once, with the names of the runs that share it."""
    groups: dict[Figure, list[str]] = {}
    for run in runs:
        for figure in run.figures:
            groups.setdefault(figure, []).append(run.name)
    titles = list(dict.fromkeys(figure.title for figure in groups))
    return sorted(groups.items(), key=lambda group: titles.index(group[0].title))


def compare_params(runs: Sequence[Run]) -> dict[str, list[Parameter]]:
    """Section -> its parameters, in the order of params.yaml."""
    return {
        section: [
            _compare_param(key, [run.params.get(section, {}).get(key, MISSING) for run in runs])
            for key in _union(run.params.get(section, {}) for run in runs)
        ]
        for section in _union(run.params for run in runs)
    }


def _compare_param(key: str, values: list[Any]) -> Parameter:
    texts = {param_text(False if value == "no" else value) for value in values}  # one to the stages
    return Parameter(key, [param_text(value) for value in values], len(texts) > 1)


def param_text(value: Any) -> str:
    """A parameter as YAML writes it."""
    if value is MISSING:
        return "absent"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    if isinstance(value, list):
        return ", ".join(map(param_text, value))
    return str(value)


def page_data(
    runs: Sequence[Run], sources: Sequence[PictureSource], charts: Sequence[Chart]
) -> dict[str, Any]:
    """What the script needs, as JSON: each distinct picture once, where it is shown, the curves."""
    prompts = _union(run.prompts for run in runs)
    seeds = _union(run.seeds for run in runs)
    settings = {name: text for run in reversed(runs) for name, text in run.settings.items()}
    names = _union(run.settings for run in runs)
    examples = {prompt: sample for run in reversed(runs) for prompt, sample in run.examples.items()}
    return {
        "prompts": [{"text": prompt, "example": examples.get(prompt)} for prompt in prompts],
        "seeds": seeds,
        "settings": [settings[name] for name in names],
        "pictures": {
            picture.name: {"uri": picture.source, "thumbnail": picture.thumbnail, "small": picture.is_small}
            for source in sources
            for picture in source.pictures.values()
        },
        "sources": [
            {
                "label": source.label,
                "color": source.color,
                "cells": {
                    f"{names.index(cell.setting)}/{prompts.index(cell.prompt)}/{seeds.index(cell.seed)}": (
                        picture.name
                    )
                    for cell, picture in source.pictures.items()
                },
            }
            for source in sources
        ],
        "right": len(sources) - len(runs),
        "plot": PLOT,
        "charts": [
            {
                "steps": chart.steps,
                "values": chart.values,
                "lines": [{"steps": line.curve.steps, "values": line.curve.values} for line in chart.lines],
            }
            for chart in charts
        ],
    }


def _union(lists: Iterable[Iterable[Any]]) -> list[Any]:
    return list(dict.fromkeys(item for items in lists for item in items))
