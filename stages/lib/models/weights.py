"""The weights of a component on disk: whole, and what they are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from stages.lib.core.tensors import tensor_names
from stages.lib.frame.errors import StageError
from stages.lib.models.families.family import Family
from stages.lib.models.layout import WEIGHT_STEMS, read_config

_BOOKKEEPING_KEYS = ("transformers_version", "torch_dtype", "dtype")


def weight_files(component: Path) -> list[Path]:
    """The safetensors files of a component, complete.

    Args:
        component: directory of one component, e.g. ``data/base/unet``.

    Raises:
        StageError: if there are none, or shards or tensors named in the index are missing.
    """
    singles = [component / f"{stem}.safetensors" for stem in sorted({*WEIGHT_STEMS.values()})]
    if found := [path for path in singles if path.exists()]:
        return found[:1]
    indices = sorted(component.glob("*.safetensors.index.json"))
    if not indices:
        raise StageError(f"{component}: expected safetensors weights, found none; run `dvc repro fetch_base`")
    shards: dict[str, set[str]] = {}
    try:
        for tensor, shard in read_config(indices[0])["weight_map"].items():
            shards.setdefault(shard, set()).add(tensor)
    except (KeyError, AttributeError, TypeError) as error:
        raise StageError(f"{indices[0]}: expected a weight_map from tensor to file name") from error
    problems = []
    for shard, tensors in sorted(shards.items()):
        if not (component / shard).exists():
            problems.append(f"{shard} is missing")
        elif absent := tensors - tensor_names(component / shard):
            problems.append(f"{shard} lacks {len(absent)} of its tensors, e.g. {min(absent)}")
    if problems:
        raise StageError(f"{indices[0]}: {'; '.join(problems)}; fetch or copy the component again")
    return [component / shard for shard in sorted(shards)]


def component_fingerprint(component: Path) -> str:
    """SHA-256 of what a component computes: its tensors and its config.

    File names, shards and keys that tell who wrote the config and when do not count, nor does the
    ``text_model.`` that a writer puts before the names of a text encoder. One tensor is held at a time.

    Args:
        component: directory with config.json and safetensors, e.g. ``data/base/vae``.

    Raises:
        StageError: if the config or weights are missing or damaged.
    """
    import torch
    from safetensors import safe_open

    config = {
        key: value
        for key, value in read_config(component / "config.json").items()
        if key not in _BOOKKEEPING_KEYS and (key == "_class_name" or not key.startswith("_"))
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    locations = {name: path for path in weight_files(component) for name in tensor_names(path)}
    handles = {path: safe_open(path, framework="pt") for path in sorted(set(locations.values()))}
    is_text_encoder = not any(name.startswith("vision_model.") for name in locations)
    prefix = "text_model." if is_text_encoder else ""
    for name, stored, path in sorted(
        (name.removeprefix(prefix), name, path) for name, path in locations.items()
    ):
        tensor = handles[path].get_tensor(stored)
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def fingerprint_of_text_encoders(base: Path, family: Family) -> str:
    """As `component_fingerprint`, of all text encoders of a base together."""
    found = [component_fingerprint(base / encoder.folder) for encoder in family.text_encoders]
    return found[0] if len(found) == 1 else hashlib.sha256(json.dumps(found).encode()).hexdigest()


def check_made_by(store: Path, what: str, found: str, component: Path, stage: str) -> None:
    """Raise StageError if another model than this one made a store.

    Args:
        store: named in the error.
        what: it holds, in the plural.
        found: fingerprint of the model that made it.
        component: directory of the model expected, e.g. ``data/base/vae``.
        stage: that makes the store.
    """
    check_same_model(store, what, found, component, component_fingerprint(component), stage)


def check_same_model(store: Path, what: str, found: str, model: Path, expected: str, stage: str) -> None:
    """As `check_made_by`, of a model whose fingerprint is known."""
    if found != expected:
        raise StageError(
            f"{store}: expected {what} encoded by {model} ({expected[:12]}), "
            f"got those of another ({found[:12]}); run `dvc repro {stage}`"
        )
