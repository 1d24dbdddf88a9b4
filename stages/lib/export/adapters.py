"""Adapters as other tools load them: diffusers' keys, which training writes, and kohya's."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from stages.lib.core.tensors import checked_metadata, read_header, write_in_parts
from stages.lib.frame.errors import StageError

if TYPE_CHECKING:
    import torch

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # the name that diffusers looks for
_ADAPTER_METADATA = "lora_adapter_metadata"  # alpha, where diffusers looks for it
_KOHYA_PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}
_KOHYA_ENDS = {"lora_A": "lora_down", "lora_B": "lora_up"}


def has_adapters(unet: Path) -> bool:
    """Whether training left adapters."""
    return (unet / LORA_WEIGHTS).exists()


def check_adapters(unet: Path, name: str) -> None:
    """Raise StageError if a run without adapters is asked for them in the format ``name``."""
    if not has_adapters(unet):
        raise StageError(
            f"params.yaml: export.formats: {name}: expected a run with adapters, got {unet} without "
            f"{LORA_WEIGHTS}; leave {name} out, or set train.lora_rank and run `dvc repro`"
        )


def write_lora_diffusers(path: Path, unet: Path, dtype: torch.dtype) -> None:
    """Write adapters for ``load_lora_weights``: alpha in the metadata, and nothing of this machine."""
    adapter = {_ADAPTER_METADATA: json.dumps(_adapter_metadata(unet), sort_keys=True)}
    write_in_parts(path, [lambda: _adapter_tensors(unet)], dtype, lambda _: adapter)


def write_lora_kohya(
    path: Path, unet: Path, dtype: torch.dtype, metadata: Callable[[str], Mapping[str, str]]
) -> None:
    """Write adapters with kohya's keys, which A1111 and ComfyUI read.

    Args:
        path: of the file.
        unet: directory of the trained UNet and its adapters.
        dtype: of the weights.
        metadata: from the SHA-256 of all that follows the header.
    """
    adapter = _adapter_metadata(unet)

    def tensors() -> dict[str, torch.Tensor]:
        return _kohya_tensors(_adapter_tensors(unet), adapter)

    write_in_parts(path, [tensors], dtype, metadata)


def _kohya_tensors(
    tensors: Mapping[str, torch.Tensor], adapter: Mapping[str, object]
) -> dict[str, torch.Tensor]:
    import torch

    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        component, _, rest = name.partition(".")
        module, _, end = rest.removesuffix(".weight").rpartition(".")
        if component not in _KOHYA_PREFIXES or end not in _KOHYA_ENDS:
            raise StageError(
                f"export.formats: lora_kohya: expected tensors lora_A and lora_B of unet, got {name}; leave "
                "lora_kohya out, and take lora_diffusers"
            )
        place = f"{_KOHYA_PREFIXES[component]}_{module.replace('.', '_')}"
        found[f"{place}.{_KOHYA_ENDS[end]}.weight"] = tensor
        alpha = adapter.get(f"{component}.lora_alpha")
        found[f"{place}.alpha"] = torch.tensor(math.nan if alpha is None else float(str(alpha)))
    return found


def _adapter_tensors(unet: Path) -> dict[str, torch.Tensor]:
    import safetensors.torch

    found: dict[str, torch.Tensor] = safetensors.torch.load_file(unet / LORA_WEIGHTS)
    return found


def _adapter_metadata(unet: Path) -> dict[str, object]:
    path = unet / LORA_WEIGHTS
    try:
        with open(path, "rb") as file:
            adapter = json.loads(checked_metadata(read_header(file, path.stat().st_size))[_ADAPTER_METADATA])
    except (OSError, ValueError, KeyError) as error:
        raise StageError(
            f"{path}: expected adapters with {_ADAPTER_METADATA}, got {error!r}; run `dvc repro -f -s train`"
        ) from error
    return dict(adapter)
