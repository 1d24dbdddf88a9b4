"""What one run left behind - numbers, pictures, curves, parameters, lineage - read from its directory.

The directory is an fsspec file system rooted at the repository: the checkout itself, or a revision of
it through ``dvc.api.DVCFileSystem``.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from fsspec import AbstractFileSystem

from stages.lib.core import paths
from stages.lib.core.sums import SUMS, parse_sums, remedy, sum_of, unsealed
from stages.lib.frame.errors import StageError, printable
from stages.lib.page.lineage import Lineage, read_lock, read_weights_lineage
from stages.lib.page.pictures import Picture, PictureFiles
from stages.lib.page.run import Cell, Copied, Curve, Estimate, Figure, Metric, Reason, Run, Values

REPORT, CURVES = paths.EVALUATION_REPORT.as_posix(), paths.CURVES.as_posix()
STAGE_OF = {
    paths.PAIRS: "prepare",
    paths.ENCODING_REPORT: "encode_images",
    paths.TRAINING: "train",
    paths.TRAINED_UNET: "train",
    paths.EMBEDDINGS: "invert",
    paths.BASELINE: "baseline",
    paths.EVALUATION_REPORT: "report",
    paths.EVALUATION: "evaluate",
}


class MissingOutput(StageError):
    """An output that a page needs cannot be read."""

    def __init__(self, path: str) -> None:
        stage = stage_of(path)
        super().__init__(f"{path}: expected an output of stage {stage}, found none; run `dvc repro {stage}`")
        self.path = path


# Sections of params.yaml that nothing a page shows was made with.
UNUSED = ("export",)
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


def read_run(files: AbstractFileSystem, name: str, pictures: PictureFiles, revision: str = "") -> Run:
    """Read a run, and verify what is read by the hashes that its stages left.

    Args:
        files: rooted at the repository.
        name: of the run.
        pictures: get the run's.
        revision: commit, empty for what is in the working tree.

    Raises:
        MissingOutput: the report, a picture it lists, or the training curves cannot be read.
        StageError: an output is damaged or of another run, or the report or params.yaml is not what this
            version of the project writes.
    """
    outputs = Outputs(files, is_earlier=bool(revision))
    content = outputs.read(REPORT)
    with _expected(REPORT, "what this version's stage report writes", "report"):
        report = outputs.unsealed(json.loads(content), REPORT, "report")
        settings = {setting["name"]: _setting_text(setting) for setting in report["settings"]}
        prompts, seeds = tuple(report["prompts"]), tuple(report["seeds"])
        metrics = tuple(_metric(entry) for entry in report["metrics"])
        memorised = tuple(Copied(*(entry[key] for key in Copied._fields)) for entry in report["memorised"])
        outputs.take_hashes(paths.BASELINE.as_posix(), report.get("base_files"))
        outputs.take_hashes(paths.EVALUATION.as_posix(), report.get("files"))
    outputs.check_run(report.get("unet_sha256"))
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
        base=_samples(outputs, pictures, paths.BASELINE, list(settings), prompts, seeds),
        tuned=_samples(outputs, pictures, paths.EVALUATION, list(settings), prompts, seeds),
        figures=_figures(outputs, pictures, settings),
        curves=_curves(outputs),
        rejected=_reasons(outputs, paths.REJECTED_PAIRS, "name"),
        left_out=_reasons(outputs, paths.ENCODING_REPORT / "left_out.jsonl", "sample_id"),
        lineage=_lineage(files, content),
        unet=_weights_lineage(outputs),
    )


class Outputs:
    """The files of a run, each read once it is verified.

    Args:
        files: rooted at the repository.
        is_earlier: of a revision, which may be of a version of the project that left no hashes.
    """

    def __init__(self, files: AbstractFileSystem, is_earlier: bool) -> None:
        self.files, self.is_earlier = files, is_earlier
        self._hash_of: dict[str, str] = {}
        self._hashed: list[str] = []  # directories of which every file that is read has a hash
        for directory in (paths.PLOTS, paths.ENCODING_REPORT):
            self._take_sums(directory.as_posix(), f"{directory.as_posix()}/{SUMS}")
        if files.exists(embeddings := f"{paths.EMBEDDINGS.as_posix()}/{SUMS}"):
            self._take_sums(paths.EMBEDDINGS.as_posix(), embeddings)
        self._take_sums(paths.PAIRS.as_posix(), sum_of(paths.REJECTED_PAIRS).as_posix())

    def read(self, path: str) -> bytes:
        """The bytes of a stage's output."""
        content = read_file(self.files, path)
        expected = self._hash_of.get(path)
        if expected is None and not any(path.startswith(f"{directory}/") for directory in self._hashed):
            return content
        if hashlib.sha256(content).hexdigest() != expected:
            stage = stage_of(path)
            raise StageError(f"{path}: expected what stage {stage} wrote, got another file; {remedy(stage)}")
        return content

    def exists(self, path: str) -> bool:
        """Whether there is such a file, or should be one."""
        return path in self._hash_of or bool(self.files.exists(path))

    def recorded(self, directory: str) -> list[str]:
        """The files of a directory that have hashes, whether they are there or not."""
        return [path for path in self._hash_of if path.startswith(f"{directory}/")]

    def unsealed(self, values: dict[str, Any], path: str, stage: str) -> dict[str, Any]:
        """The values of a sealed JSON object."""
        if self.is_earlier and "sha256" not in values:
            return values
        return unsealed(values, path, stage)

    def take_hashes(self, directory: str, hash_of: dict[str, str] | None) -> None:
        """Take the hashes of files of ``directory`` that the report holds."""
        if hash_of is None:
            if not self.is_earlier:
                raise KeyError("files")
            return
        self._take(directory, hash_of)

    def check_run(self, unet: str | None) -> None:
        """Raise StageError if the weights or the curves are not those of the run that was evaluated."""
        if self.is_earlier:  # DVC has them by their hashes, or no longer
            return
        sums, run = f"{paths.TRAINED_UNET.as_posix()}/{SUMS}", f"{paths.PLOTS.as_posix()}/{paths.RUN_FILE}"
        with _expected(run, "the run that its curves belong to", "train"):
            of_curves = json.loads(self.read(run))["unet_sha256"]
        found = hashlib.sha256(read_file(self.files, sums)).hexdigest()
        for path, other in ((sums, found), (run, of_curves)):
            if other != unet:
                raise StageError(
                    f"{path}: expected the weights that {REPORT} was made of, got those of another run; "
                    "run `dvc repro evaluate report`"
                )

    def _take_sums(self, directory: str, path: str) -> None:
        if self.is_earlier and not self.files.exists(path):
            return
        stage = stage_of(path)
        with _expected(path, "hashes of what lies there", stage):
            self._take(directory, parse_sums(read_file(self.files, path).decode(), path, stage))

    def _take(self, directory: str, hash_of: dict[str, str]) -> None:
        self._hash_of |= {f"{directory}/{name}": digest for name, digest in hash_of.items()}
        self._hashed.append(directory)


def read_file(files: AbstractFileSystem, path: str) -> bytes:
    """The bytes of a stage's output."""
    try:
        return files.cat_file(path)
    except OSError as error:
        raise MissingOutput(path) from error


def stage_of(path: str) -> str:
    """The stage that makes an output."""
    return next(stage for place, stage in STAGE_OF.items() if f"{path}/".startswith(f"{place.as_posix()}/"))


@contextlib.contextmanager
def _expected(path: str, what: str, stage: str) -> Iterator[None]:
    """Within the block whatever a file's content raises becomes one error."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise StageError(f"{path}: expected {what}, got {error!r}; {remedy(stage)}") from error


def _samples(
    outputs: Outputs,
    pictures: PictureFiles,
    folder: Path,
    settings: list[str],
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> dict[Cell, Picture]:
    path_of = {
        Cell(setting, prompt, seed): f"{folder.as_posix()}/samples/{setting}/prompt{index:02d}_seed{seed}.png"
        for setting in settings
        for index, prompt in enumerate(prompts)
        for seed in seeds
    }
    return dict(zip(path_of, pictures.add(_read(outputs, path_of.values())), strict=True))


def _figures(outputs: Outputs, pictures: PictureFiles, settings: dict[str, str]) -> tuple[Figure, ...]:
    grids = [
        ("pictures", f"Base and fine-tuned, {text}", paths.EVALUATION / "grids" / f"{setting}.png")
        for setting, text in settings.items()
    ]
    found = [
        (section, title, path.as_posix())
        for section, title, path in (*grids, *FIGURES)
        if outputs.exists(path.as_posix())
    ]
    drawn = pictures.add(_read(outputs, [path for *_, path in found]))
    return tuple(
        Figure(section, title, picture) for (section, title, _), picture in zip(found, drawn, strict=True)
    )


def _read(outputs: Outputs, wanted: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    return ((path, outputs.read(path)) for path in wanted)


def _curves(outputs: Outputs) -> tuple[Curve, ...]:
    try:
        present = outputs.files.ls(CURVES, detail=False)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise MissingOutput(CURVES) from error
    learned = outputs.recorded(paths.EMBEDDINGS_CURVES.as_posix())
    found = {path for path in (*present, *outputs.recorded(CURVES), *learned) if path.endswith(".tsv")}
    return tuple(_curve(path, outputs.read(path)) for path in sorted(found))


def _curve(path: str, content: bytes) -> Curve:
    name = path.rsplit("/", 1)[-1].removesuffix(".tsv")
    with _expected(path, f"columns step and {name}", stage_of(path)):
        rows = list(csv.DictReader(io.StringIO(content.decode()), delimiter="\t"))
        points = [(int(row["step"]), float(row[name])) for row in rows]
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    return Curve(name, tuple(step for step, _ in finite), tuple(value for _, value in finite))


def _reasons(outputs: Outputs, path: Path, name: str) -> tuple[Reason, ...]:
    if not outputs.exists(path.as_posix()):
        return ()
    content = outputs.read(path.as_posix())
    with _expected(path.as_posix(), f"lines of JSON with {name} and reason", stage_of(path.as_posix())):
        # Names may hold what str.splitlines takes for ends of lines, or bytes that were no text.
        entries = [json.loads(line) for line in content.split(b"\n") if line]
        return tuple(
            Reason(printable(str(entry[name])), printable(str(entry["reason"]))) for entry in entries
        )


def _lineage(files: AbstractFileSystem, report: bytes) -> Lineage:
    with _expected("dvc.lock", "the stages that DVC ran", "report"):
        return read_lock(files, REPORT, report)


def _weights_lineage(outputs: Outputs) -> dict[str, str]:
    directory = paths.TRAINED_UNET.as_posix()
    with _expected(directory, "weights with their lineage", "train"):
        return read_weights_lineage(outputs.files, directory, outputs.is_earlier)


def _params(files: AbstractFileSystem) -> dict[str, dict[str, Any]]:
    """Sections as written: an earlier revision's need not be those of today."""
    with _expected("params.yaml", "sections of keys", "gallery"):
        document = yaml.safe_load(read_file(files, "params.yaml"))
        return {
            section: {key: _number_if_text(value) for key, value in values.items()}
            for section, values in document.items()
            if isinstance(values, dict) and section not in UNUSED
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
