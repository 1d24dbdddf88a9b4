"""model_index.json: what kind of pipeline a base is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from stages.lib.frame.errors import StageError
from stages.lib.models.families.family import Family
from stages.lib.models.layout import read_config
from stages.lib.models.origins import Origin

# Parts of a pipeline that training has no use for; the pictures of `evaluate` are made without them.
DROPPED_COMPONENTS = ("feature_extractor", "image_encoder", "safety_checker")


def read_pipeline_index(source: Origin) -> dict[str, Any]:
    """``model_index.json`` of the source.

    Raises:
        StageError: if it has none, as a single-file checkpoint has not, or is a refiner's.
    """
    if "model_index.json" not in source.paths:
        singles = sorted(p for p in source.paths if "/" not in p and p.endswith((".safetensors", ".ckpt")))
        if singles and "config.json" not in source.paths:
            raise StageError(
                f"{source}: expected a directory with model_index.json, got a single-file checkpoint; set "
                f"fetch_base.source to file and fetch_base.file to the path of {singles[0]}"
            )
        raise StageError(f"{source}: expected a diffusers directory, but there is no model_index.json")
    index = read_config(source.fetch(["model_index.json"]) / "model_index.json")
    if index.get("requires_aesthetics_score"):
        raise StageError(
            f"{source}: model_index.json: expected a base, got a refiner (requires_aesthetics_score), which "
            "has no first text encoder and is told a score: not supported; take the base that it refines, "
            "e.g. stabilityai/stable-diffusion-xl-base-1.0"
        )
    return index


def pipeline_problems(index: Mapping[str, Any], family: Family) -> list[str]:
    """What in a ``model_index.json`` tells of another kind of model than those that are known here."""
    components = {name: value[-1] for name, value in index.items() if isinstance(value, list) and value}
    known = (*family.components, *DROPPED_COMPONENTS)
    extra = [f"{name} ({value})" for name, value in components.items() if value and name not in known]
    problems = []
    if extra:
        kind = index.get("_class_name", "the pipeline")
        problems.append(f"model_index.json: {kind} has {', '.join(sorted(extra))}, not supported yet")
    for component, classes in supported_classes(family).items():
        if (got := components.get(component)) not in classes:
            problems.append(
                f"model_index.json: expected {component} {classes[0]}, got {got}, not supported yet"
            )
    library, scheduler = (index.get("scheduler") or [None, None])[:2]
    if library != "diffusers" or not re.fullmatch(r"(?!Flax)\w+Scheduler", str(scheduler)):
        problems.append(f"model_index.json: expected a scheduler of diffusers, got {scheduler} of {library}")
    return problems


def supported_classes(family: Family) -> dict[str, tuple[str, ...]]:
    """Component -> classes it may be of."""
    classes: dict[str, tuple[str, ...]] = {}
    for encoder in family.text_encoders:
        classes[encoder.tokenizer] = ("CLIPTokenizer", "CLIPTokenizerFast")
    classes |= {encoder.folder: (encoder.class_name,) for encoder in family.text_encoders}
    return {**classes, "vae": ("AutoencoderKL",), "unet": ("UNet2DConditionModel",)}
