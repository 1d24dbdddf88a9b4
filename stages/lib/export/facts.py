"""What the model card tells of the run: read from what its stages left behind, nothing computed anew."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from stages.lib.core.files import read_json
from stages.lib.core.paths import BASE, EVALUATION, EVALUATION_REPORT, PREPARE_METRICS, TRAINED_UNET
from stages.lib.core.sums import SUMS, check_hashes, hash_file, read_sealed_json, remedy
from stages.lib.core.tensors import checked_metadata, read_header
from stages.lib.export.whole_pipeline import is_rescaled, sampling_scheduler
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import FetchBase, Params, Prepare
from stages.lib.models.layout import has_adapters
from stages.lib.models.presets import repository_of

_LOCK = Path("dvc.lock")
# In the order in which they run. What was made of the weights afterwards is no part of their lineage.
_UPSTREAM = (
    "fetch_base", "prepare", "tokenize", "encode_captions", "encode_images", "train", "evaluate", "report",
)  # fmt: skip


class Estimated(NamedTuple):
    """A number with the ends of its interval; None where it is not known."""

    value: float | None
    low: float | None
    high: float | None


class MetricFacts(NamedTuple):
    """One metric of the base and of the trained UNet. ``better`` is lower or higher, or empty."""

    label: str
    better: str
    base: Estimated
    tuned: Estimated


class Output(NamedTuple):
    """An output as DVC recorded it."""

    stage: str
    path: str
    hash: str


@dataclass(frozen=True)
class Facts:
    """All that the card is written from.

    Attributes:
        base: what was fine-tuned, in words; ``base_id`` its name on the Hub, if it has one.
        vae: in words, where it is not the base's own.
        data: where the pairs come from, in words; ``data_id`` its name on the Hub.
        counts: of `prepare`.
        parameters: place in params.yaml -> value, of those that determine the weights.
        step: optimizer steps that the weights are of.
        pipeline_class: of diffusers.
        prediction: what the UNet predicts; ``rescaled`` whether its noise schedule ends in pure noise.
        adapters: whether adapters were trained.
        prompt: the first of the grid's, whose picture with the first seed is ``sample``.
        guidance_scale, num_inference_steps: of the grid.
        metrics: base and fine-tuned.
        grid, sample: pictures.
        lineage: of DVC, or why there is none, in ``lineage_problem``.
    """

    base: str
    base_id: str | None
    vae: str | None
    data: str
    data_id: str | None
    counts: Mapping[str, Any]
    parameters: Mapping[str, Any]
    step: int | None
    pipeline_class: str
    prediction: str
    rescaled: bool
    adapters: bool
    prompt: str
    guidance_scale: float
    num_inference_steps: int
    metrics: tuple[MetricFacts, ...]
    grid: Path
    sample: Path
    lineage: tuple[Output, ...]
    lineage_problem: str


def read_facts(params: Params) -> Facts:
    """Read what the stages left, and verify it by the hashes that they left.

    Raises:
        StageError: if an output is missing, damaged, or made of other weights than those in data/unet.
    """
    report = read_sealed_json(EVALUATION_REPORT, "report")
    if report["unet_sha256"] != hash_file(TRAINED_UNET / SUMS):
        raise StageError(
            f"{EVALUATION_REPORT}: expected numbers of the weights in {TRAINED_UNET}, got those of another "
            "run; run `dvc repro report`"
        )
    setting, seed = report["settings"][0], report["seeds"][0]
    pictures = f"grids/{setting['name']}.png", f"samples/{setting['name']}/prompt00_seed{seed}.png"
    check_hashes(EVALUATION, {name: report["files"][name] for name in pictures}, "evaluate")
    weights = _weights_metadata()
    scheduler = sampling_scheduler(TRAINED_UNET)
    lineage, problem = _lineage()
    repository = repository_of(params.fetch_base)
    return Facts(
        base=_base(params.fetch_base),
        base_id=repository.hub_id if repository else None,
        vae=_vae(params.fetch_base),
        data=_data(params.prepare),
        data_id=params.prepare.hub_id,
        counts=read_json(PREPARE_METRICS, "run `dvc repro prepare`"),
        parameters={
            "encode_captions.clip_skip": params.encode_captions.clip_skip,
            "encode_images.resolution": list(params.encode_images.resolution),
            "encode_images.buckets": params.encode_images.buckets,
            "encode_images.horizontal_flip": params.encode_images.horizontal_flip,
            **{
                f"{section}.{key}": value
                for section, values in json.loads(weights.get("params", "{}")).items()
                for key, value in values.items()
            },
        },
        step=json.loads(weights.get("exported", "{}")).get("step"),
        pipeline_class=read_json(BASE / "model_index.json", "run `dvc repro fetch_base`")["_class_name"],
        prediction=scheduler.get("prediction_type", "epsilon"),
        rescaled=is_rescaled(scheduler),
        adapters=has_adapters(TRAINED_UNET),
        prompt=report["prompts"][0],
        guidance_scale=setting["guidance_scale"],
        num_inference_steps=setting["num_inference_steps"],
        metrics=tuple(_metric(entry) for entry in report["metrics"]),
        grid=EVALUATION / pictures[0],
        sample=EVALUATION / pictures[1],
        lineage=lineage,
        lineage_problem=problem,
    )


def _base(options: FetchBase) -> str:
    if repository := repository_of(options):
        hub_id, revision = repository
        return f"[{hub_id}](https://huggingface.co/{hub_id}) at commit `{revision}`"
    if options.source == "file":  # no path of a user's machine here and below
        return f"`{Path(str(options.file)).name}`, a checkpoint in one file"
    return f"`{Path(str(options.directory)).name}`, a diffusers directory"


def _vae(options: FetchBase) -> str | None:
    if options.vae_source == "hub":
        return (
            f"[{options.vae_hub_id}](https://huggingface.co/{options.vae_hub_id}) at `{options.vae_revision}`"
        )
    place = {"directory": options.vae_directory, "file": options.vae_file}.get(options.vae_source)
    return None if place is None else f"`{Path(place).name}`"


def _data(options: Prepare) -> str:
    if options.hub_id is not None:
        return (
            f"[{options.hub_id}](https://huggingface.co/datasets/{options.hub_id}) at commit "
            f"`{options.revision}`"
        )
    if options.sources is not None:
        return ", ".join(f"`{Path(source.path).name}`" for source in options.sources)
    return f"`{Path(str(options.source)).name}`"


def _metric(entry: Mapping[str, Any]) -> MetricFacts:
    base, tuned = (
        Estimated(*(entry[unet][part] for part in Estimated._fields)) for unet in ("base", "tuned")
    )
    return MetricFacts(entry["label"], entry["better"], base, tuned)


def _weights_metadata() -> dict[str, str]:
    """What the trained weights say of themselves."""
    path = min(TRAINED_UNET.glob("*.safetensors"), default=TRAINED_UNET / "none")
    try:
        with open(path, "rb") as file:
            return checked_metadata(read_header(file, path.stat().st_size))
    except (OSError, ValueError) as error:
        raise StageError(
            f"{path}: expected weights with their lineage, got: {error}; {remedy('train')}"
        ) from error


def _lineage() -> tuple[tuple[Output, ...], str]:
    """Outputs of the stages that made the weights and their numbers; or none, and why."""
    if not _LOCK.exists():
        return (), "The stages ran outside of DVC, so that no hashes of them are recorded."
    try:
        stages = (yaml.safe_load(_LOCK.read_text(encoding="utf-8")) or {}).get("stages") or {}
        found = tuple(
            Output(stage, out["path"], str(out[out.get("hash", "md5")]))
            for stage in _UPSTREAM
            for out in stages.get(stage, {}).get("outs", [])
        )
    except (yaml.YAMLError, KeyError, AttributeError, TypeError, UnicodeDecodeError) as error:
        raise StageError(f"{_LOCK}: expected what DVC writes, got {error!r}; run `dvc repro`") from error
    recorded = {output.path: output.hash for output in found}
    own = hashlib.md5(EVALUATION_REPORT.read_bytes(), usedforsecurity=False).hexdigest()
    if recorded.get(EVALUATION_REPORT.as_posix()) != own:
        return (), "dvc.lock is of another run than these weights: the stages ran outside of DVC."
    return found, ""
