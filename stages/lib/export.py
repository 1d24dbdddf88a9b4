"""The trained UNet on disk, as diffusers loads it, with its lineage."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from stages.lib.stage_run import fresh_directory

WEIGHTS = "diffusion_pytorch_model.safetensors"


def save_unet(unet: UNet2DConditionModel, path: Path, lineage: dict[str, str]) -> None:
    """Write config.json and float32 safetensors; the same weights give the same bytes.

    Args:
        unet: in any memory format.
        path: of the directory; what lay there is removed.
        lineage: text values kept in the safetensors metadata.
    """
    fresh_directory(path)
    unet.save_config(path)
    tensors = {name: tensor.contiguous().cpu() for name, tensor in unet.state_dict().items()}
    content = safetensors.torch.save(tensors, {"format": "pt", **lineage})
    (path / WEIGHTS).write_bytes(_with_sorted_metadata(content))


def read_lineage(path: Path) -> dict[str, str]:
    """The lineage of a UNet that `save_unet` wrote."""
    with safetensors.safe_open(path / WEIGHTS, framework="pt") as weights:
        return weights.metadata() or {}


def _with_sorted_metadata(content: bytes) -> bytes:
    # safetensors writes its metadata in a hash map's order, another one in each process.
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + content[8 + length :]
