"""Which family a base is of, by its model_index.json or by the name in a store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.lib.core.files import read_json
from stages.lib.frame.errors import StageError
from stages.lib.models.families.family import Family
from stages.lib.models.families.sd import SD
from stages.lib.models.families.sdxl import SDXL

INDEX = "model_index.json"
FAMILIES = {family.name: family for family in (SD, SDXL)}
# In model_index.json: whether "no caption" is zeros instead of the encoded "".
FORCE_ZEROS = "force_zeros_for_empty_prompt"


def family_of_index(index: Mapping[str, Any]) -> Family:
    """The family that the pipeline of a ``model_index.json`` is nearest to; for inpainting too, say."""
    return SDXL if "StableDiffusionXL" in str(index.get("_class_name")) else SD


def family_of(base: Path) -> Family:
    """The family of a base on disk; StageError if it has no model_index.json."""
    return family_of_index(_index_of(base))


def zeros_for_no_caption(base: Path) -> bool:
    """Whether the base was trained with zeros where there is no caption; the default is diffusers'."""
    index = _index_of(base)
    return family_of_index(index).follows_force_zeros and bool(index.get(FORCE_ZEROS, True))


def family_attributes(family: Family, zeros: bool) -> dict[str, Any]:
    """What data/captions.zarr says of the family; nothing of Stable Diffusion's, which said nothing before.

    Args:
        family: of the base.
        zeros: whether the row of "" is zeros.
    """
    if family is SD:
        return {}
    return {"family": family.name, "no_caption": "zeros" if zeros else "encoded"}


def family_named(name: str, where: Path) -> Family:
    """The family that a store names; StageError for one that is not known here."""
    if name not in FAMILIES:
        raise StageError(f"{where}: expected family {' or '.join(FAMILIES)}, got {name!r}; run `dvc repro`")
    return FAMILIES[name]


def all_components() -> tuple[str, ...]:
    """Of every family, each once."""
    return tuple(dict.fromkeys(name for family in FAMILIES.values() for name in family.components))


def _index_of(base: Path) -> dict[str, Any]:
    return read_json(base / INDEX, "run `dvc repro fetch_base`")
