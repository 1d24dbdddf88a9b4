"""Adapters as other tools load them: in diffusers' keys, which training writes, and in kohya's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stages.lib.core.tensors import checked_metadata, read_header, write_in_parts
from stages.lib.export.components import trained_unet_config
from stages.lib.export.kohya_keys import kohya_metadata, kohya_tensors
from stages.lib.frame.errors import StageError
from stages.lib.models.adapter_files import read_adapters
from stages.lib.models.layout import LORA_WEIGHTS, has_adapters

if TYPE_CHECKING:
    import torch

DIFFUSERS_KINDS = ("lora", "dora")  # of peft's others diffusers has no files
_ADAPTER_METADATA = "lora_adapter_metadata"  # where diffusers looks for ranks and alphas


def check_adapters(unet: Path, name: str) -> None:
    """Raise StageError if a run has no adapters that the format ``name`` knows."""
    if not has_adapters(unet):
        raise StageError(
            f"params.yaml: export.formats: {name}: expected a run with adapters, got {unet} without; leave "
            f"{name} out, or set train.lora_rank and run `dvc repro`"
        )
    kind = read_adapters(unet).kind
    if name == "lora_diffusers" and kind not in DIFFUSERS_KINDS:
        raise StageError(
            f"params.yaml: export.formats: {name}: expected adapters of kind {' or '.join(DIFFUSERS_KINDS)}, "
            f"got {kind}, which diffusers has no files for; leave {name} out, and take lora_kohya or pipeline"
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
    path: Path, base: Path, unet: Path, dtype: torch.dtype, metadata: Callable[[str], Mapping[str, str]]
) -> None:
    """Write adapters with kohya's keys, which A1111 and ComfyUI read.

    Args:
        path: of the file.
        base: directory of the base model.
        unet: directory that the adapters lie in.
        dtype: of the weights.
        metadata: from the SHA-256 of all that follows the header; what kohya's own says goes before it.
    """
    state, config = read_adapters(unet), trained_unet_config(base, unet)
    tensors, own = kohya_tensors(state, config), kohya_metadata(state, config)
    write_in_parts(path, [lambda: tensors], dtype, lambda digest: {**metadata(digest), **own})
