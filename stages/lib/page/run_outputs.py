"""What one run left behind - numbers, pictures, curves, parameters, lineage - read from its directory.

The directory is an fsspec file system rooted at the repository: the checkout itself, or a revision of
it through ``dvc.api.DVCFileSystem``.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from fsspec import AbstractFileSystem

from stages.lib.core import paths
from stages.lib.frame.errors import StageError
from stages.lib.page.lineage import read_lock, read_weights_lineage
from stages.lib.page.run import Cell, Copied, Curve, Estimate, Figure, Metric, Picture, Reason, Run, Values

REPORT, CURVES = paths.EVALUATION_REPORT.as_posix(), paths.CURVES.as_posix()
STAGE_OF = {
    paths.PAIRS: "prepare",
    paths.ENCODING_REPORT: "encode_images",
    paths.TRAINING: "train",
    paths.BASELINE: "baseline",
    paths.EVALUATION_REPORT: "report",
    paths.EVALUATION: "evaluate",
}


class MissingOutput(StageError):
    """An output that a page needs cannot be read."""

    def __init__(self, path: str) -> None:
        stage = next(
            stage for place, stage in STAGE_OF.items() if f"{path}/".startswith(f"{place.as_posix()}/")
        )
        super().__init__(f"{path}: expected an output of stage {stage}, found none; run `dvc repro {stage}`")
        self.path = path


# section, title, path
FIGURES = (
    ("pictures", "One prompt over guidance, steps and scheduler", paths.EVALUATION / "sweep.png"),
    ("pictures", "Learning over time", paths.EVALUATION / "learning.png"),
    ("pictures", "Denoising, base", paths.BASELINE / "denoising.png"),
    ("pictures", "Denoising, fine-tuned", paths.EVALUATION / "denoising.png"),
    ("data", "Generated pictures beside the nearest training image", paths.EVALUATION / "nearest.png"),
    ("data", "Training images and what the VAE gives back", paths.BASELINE / "contact_sheet.png"),
    ("data", "Worst reconstructions", paths.ENCODING_REPORT / "worst_reconstructions.png"),
)


def read_run(files: AbstractFileSystem, name: str, revision: str = "") -> Run:
    """Read a run.

    Raises:
        MissingOutput: the report, a picture it lists, or the training curves cannot be read.
        StageError: the report or params.yaml is not what this version of the project writes.
    """
    content = read_file(files, REPORT)
    try:
        report = json.loads(content)
        settings = {setting["name"]: _setting_text(setting) for setting in report["settings"]}
        prompts, seeds = tuple(report["prompts"]), tuple(report["seeds"])
        metrics = tuple(_metric(entry) for entry in report["metrics"])
        memorised = tuple(Copied(*(entry[key] for key in Copied._fields)) for entry in report["memorised"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise StageError(
            f"{REPORT}: expected what this version's stage report writes, got {error!r}; "
            "run `dvc repro report`"
        ) from error
    return Run(
        name=name,
        revision=revision,
        params=_params(files),
        metrics=metrics,
        prompts=prompts,
        seeds=seeds,
        settings=settings,
        examples=report.get("examples") or {},
        memorised=memorised,
        base=_samples(files, paths.BASELINE, list(settings), prompts, seeds),
        tuned=_samples(files, paths.EVALUATION, list(settings), prompts, seeds),
        figures=_figures(files, settings),
        curves=_curves(files),
        rejected=_reasons(files, paths.REJECTED_PAIRS, "name"),
        left_out=_reasons(files, paths.ENCODING_REPORT / "left_out.jsonl", "sample_id"),
        lineage=read_lock(files, REPORT, content),
        unet=read_weights_lineage(files, paths.TRAINED_UNET.as_posix()),
    )


def read_file(files: AbstractFileSystem, path: str) -> bytes:
    """The bytes of a stage's output."""
    try:
        return files.cat_file(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingOutput(path) from error


def _samples(
    files: AbstractFileSystem, folder: Path, settings: list[str], prompts: Sequence[str], seeds: Sequence[int]
) -> dict[Cell, Picture]:
    return {
        Cell(setting, prompt, seed): Picture(
            read_file(files, f"{folder.as_posix()}/samples/{setting}/prompt{index:02d}_seed{seed}.png")
        )
        for setting in settings
        for index, prompt in enumerate(prompts)
        for seed in seeds
    }


def _figures(files: AbstractFileSystem, settings: dict[str, str]) -> tuple[Figure, ...]:
    grids = [
        ("pictures", f"Base and fine-tuned, {text}", paths.EVALUATION / "grids" / f"{setting}.png")
        for setting, text in settings.items()
    ]
    return tuple(
        Figure(section, title, Picture(read_file(files, path.as_posix())))
        for section, title, path in (*grids, *FIGURES)
        if files.exists(path.as_posix())
    )


def _curves(files: AbstractFileSystem) -> tuple[Curve, ...]:
    try:
        paths = sorted(path for path in files.ls(CURVES, detail=False) if path.endswith(".tsv"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingOutput(CURVES) from error
    return tuple(_curve(path, read_file(files, path).decode()) for path in paths)


def _curve(path: str, text: str) -> Curve:
    name = path.rsplit("/", 1)[-1].removesuffix(".tsv")
    rows = list(csv.DictReader(io.StringIO(text), delimiter="\t"))
    points = [(int(row["step"]), float(row[name])) for row in rows]
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    return Curve(name, tuple(step for step, _ in finite), tuple(value for _, value in finite))


def _reasons(files: AbstractFileSystem, path: Path, name: str) -> tuple[Reason, ...]:
    if not files.exists(path.as_posix()):
        return ()
    lines = read_file(files, path.as_posix()).decode().splitlines()
    entries = [json.loads(line) for line in lines]
    return tuple(Reason(entry[name], entry["reason"]) for entry in entries)


def _params(files: AbstractFileSystem) -> dict[str, dict[str, Any]]:
    """Sections as written: an earlier revision's need not be those of today."""
    document = yaml.safe_load(files.cat_file("params.yaml"))
    return {
        section: {key: _number_if_text(value) for key, value in values.items()}
        for section, values in document.items()
        if isinstance(values, dict)
    }


def _number_if_text(value: Any) -> Any:
    """``dvc exp run -S`` writes 1e-05, which YAML 1.1 reads as text."""
    is_number = isinstance(value, str) and re.fullmatch(
        r"[-+]?\d+(\.\d*)?e[-+]?\d{1,2}", value, re.IGNORECASE
    )
    return float(value) if is_number else value


def _metric(entry: dict[str, Any]) -> Metric:
    estimates = {
        key: Estimate(*(_finite((entry.get(key) or {}).get(part)) for part in ("value", "low", "high")))
        for key in ("base", "tuned", "difference", "real")
    }
    rows = entry.get("values")
    values = Values(*(tuple(rows[field]) for field in Values._fields)) if rows else None
    note = entry.get("note") or ""
    return Metric(entry["name"], entry["label"], entry["better"], **estimates, note=note, values=values)


def _finite(value: float | None) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None


def _setting_text(setting: dict[str, Any]) -> str:
    guidance, steps = setting["guidance_scale"], setting["num_inference_steps"]
    scheduler = "base's scheduler" if setting["scheduler"] == "base" else setting["scheduler"]
    return f"{scheduler}, guidance {guidance:g}, {steps} steps"
