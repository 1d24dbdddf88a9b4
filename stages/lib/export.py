"""Trained weights on disk, as diffusers loads them, with their lineage."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import safetensors
import torch

from stages.lib.stage_run import fresh_directory
from stages.lib.work import open_atomically

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

WEIGHTS = "diffusion_pytorch_model.safetensors"


def save_unet(unet: UNet2DConditionModel, path: Path, lineage: dict[str, str]) -> None:
    """Write config.json and float32 safetensors; the same weights give the same bytes.

    Args:
        unet: on any device, in any memory format.
        path: of the directory; what lay there is removed.
        lineage: text values kept in the safetensors metadata.
    """
    fresh_directory(path)
    unet.save_config(path)
    write_safetensors(path / WEIGHTS, unet.state_dict(), lineage)


def read_lineage(path: Path) -> dict[str, str]:
    """The lineage of a UNet that `save_unet` wrote."""
    with safetensors.safe_open(path / WEIGHTS, framework="pt") as weights:
        return weights.metadata() or {}


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write tensors as float32, whole or not at all, with no more than one of them copied at a time.

    The safetensors library would hold the whole file in memory, and write its metadata in the
    order of a hash map, another one in each process. Here both are sorted by name, so the same
    tensors give the same bytes (format: 8 bytes of header length, JSON header padded to 8 bytes, data).
    """
    names = sorted(tensors)
    header: dict[str, object] = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))}
    start = 0
    for name in names:
        stop = start + 4 * tensors[name].numel()
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    with open_atomically(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = tensors[name].detach().to("cpu", torch.float32).contiguous()
            file.write(tensor.reshape(-1).numpy().data)
