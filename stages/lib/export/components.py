"""Tensors and configs of the trained UNet and of the base's other models, as they are on disk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.lib.core.files import read_json
from stages.lib.models.weights import weight_files

if TYPE_CHECKING:
    import torch

DTYPES = {"float32": "fp32", "float16": "fp16"}  # export.dtype -> in file names, as the Hub has it


def base_tensors(base: Path, component: str) -> dict[str, torch.Tensor]:
    """A component of the base, mapped into memory and not read yet, under the names it was published with."""
    import safetensors.torch

    found: dict[str, torch.Tensor] = {}
    for path in weight_files(base / component):
        found |= safetensors.torch.load_file(path)
    return found


def trained_unet_tensors(base: Path, unet: Path) -> Mapping[str, torch.Tensor]:
    """The whole trained UNet under the names of diffusers, adapters added to the base's weights.

    Args:
        base: directory of the base model.
        unet: directory of the weights, or of adapters alone.
    """
    from stages.lib.models.trained import load_trained_unet  # loads torch, which a card does without

    tensors: Mapping[str, torch.Tensor] = load_trained_unet(base, unet).state_dict()
    return tensors


def trained_unet_config(base: Path, unet: Path) -> dict[str, Any]:
    """config.json of the trained UNet; where adapters lie alone, that of the base."""
    own = unet / "config.json"
    config = read_json(own if own.exists() else base / "unet" / "config.json")
    return {key: value for key, value in config.items() if key != "_name_or_path"}
