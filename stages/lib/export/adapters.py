"""Adapters as other tools load them: in diffusers' keys, which training writes, and in kohya's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stages.lib.core.tensors import checked_metadata, read_header, write_in_parts
from stages.lib.frame.errors import StageError
from stages.lib.models.adapter_files import LORA_WEIGHTS, has_adapters, read_adapters

if TYPE_CHECKING:
    import torch

DIFFUSERS_KINDS = ("lora", "dora")  # of peft's others diffusers has no files
KOHYA_KINDS = ("lora",)
_ADAPTER_METADATA = "lora_adapter_metadata"  # where diffusers looks for ranks and alphas
_KOHYA_ENDS = {"lora_A": "lora_down", "lora_B": "lora_up"}


def check_adapters(unet: Path, name: str) -> None:
    """Raise StageError if a run has no adapters that the format ``name`` knows."""
    if not has_adapters(unet):
        raise StageError(
            f"params.yaml: export.formats: {name}: expected a run with adapters, got {unet} without; leave "
            f"{name} out, or set train.lora_rank and run `dvc repro`"
        )
    kinds = KOHYA_KINDS if name == "lora_kohya" else DIFFUSERS_KINDS
    if (kind := read_adapters(unet).kind) not in kinds:
        raise StageError(
            f"params.yaml: export.formats: {name}: expected adapters of kind {' or '.join(kinds)}, got "
            f"{kind}, which this format has no keys for; leave {name} out, and take pipeline or single_file"
        )


def write_lora_diffusers(path: Path, unet: Path, dtype: torch.dtype) -> None:
    """Write adapters for ``load_lora_weights``: alpha in the metadata, and nothing of this machine.

    Args:
        path: of the file.
        unet: directory that the adapters lie in.
        dtype: of the weights.
    """
    import safetensors.torch

    source = unet / LORA_WEIGHTS
    with open(source, "rb") as file:
        metadata = checked_metadata(read_header(file, source.stat().st_size))
    kept = {_ADAPTER_METADATA: metadata[_ADAPTER_METADATA]}
    write_in_parts(path, [lambda: safetensors.torch.load_file(source)], dtype, lambda _: kept)


def write_lora_kohya(
    path: Path, unet: Path, dtype: torch.dtype, metadata: Callable[[str], Mapping[str, str]]
) -> None:
    """Write adapters with kohya's keys, which A1111 and ComfyUI read.

    Args:
        path: of the file.
        unet: directory that the adapters lie in.
        dtype: of the weights.
        metadata: from the SHA-256 of all that follows the header.
    """
    tensors = kohya_tensors(read_adapters(unet).tensors)
    write_in_parts(path, [lambda: tensors], dtype, metadata)


def kohya_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a UNet's LoRA under kohya's names; the scale lies in them, so alpha is the rank."""
    import torch

    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        module, _, end = name.removesuffix(".weight").rpartition(".")
        place = f"lora_unet_{module.replace('.', '_')}"
        found[f"{place}.{_KOHYA_ENDS[end]}.weight"] = tensor
        if end == "lora_A":
            found[f"{place}.alpha"] = torch.tensor(float(tensor.shape[0]))
    return found
