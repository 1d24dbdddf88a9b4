"""The UNet that is trained: as it is built, with adapters or without, and as it is exported."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stages.lib.core.files import fresh_directory, write_json
from stages.lib.core.paths import ENCODED_CAPTIONS, LATENTS
from stages.lib.core.sums import write_sums
from stages.lib.core.tensors import write_safetensors
from stages.lib.encoding.conditioning import Conditioning
from stages.lib.encoding.latents import Latents
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import Train
from stages.lib.models.adapter_files import save_adapters, state_of
from stages.lib.models.adapters import Adapters, Strength, add_adapters
from stages.lib.models.loaders import load_unet

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

WEIGHTS = "diffusion_pytorch_model.safetensors"


def build_unet(base: Path, options: Train) -> UNet2DConditionModel:
    """The base's UNet on the CPU, float32, in training mode, with adapters where ``lora_rank`` asks."""
    unet = load_unet(base).train()
    for parameter in unet.parameters():  # as loaded, weights are pages of their file, copied when written
        parameter.data = parameter.data.clone()
    if options.lora_rank is not None:
        by_module = [Strength(each.modules, each.rank, each.alpha) for each in options.lora_by_module or ()]
        adapters = Adapters(
            options.adapter, options.lora_rank, options.lora_alpha, options.lora_target_modules, by_module
        )
        add_adapters(unet, adapters, options.seed)
    if options.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    return unet


def check_shapes(unet: UNet2DConditionModel, latents: Latents, conditioning: Conditioning) -> None:
    """Raise StageError if the stores were not made for this UNet."""
    width = conditioning.encoder_hidden_states.shape[2]
    for store, got, expected in (
        (f"{LATENTS}: channels", latents.num_channels, unet.config.in_channels),
        (f"{ENCODED_CAPTIONS}: width", width, unet.config.cross_attention_dim),
    ):
        if got != expected:
            raise StageError(f"{store} {got}, data/base/unet takes {expected}; run `dvc repro`")


def trained_parameters(unet: torch.nn.Module) -> list[torch.nn.Parameter]:
    """The parameters that require a gradient: all, or the adapters'."""
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def export_unet(
    unet: UNet2DConditionModel, path: Path, scheduler: Mapping[str, Any], lineage: dict[str, str]
) -> None:
    """Write the UNet, whole or where it has adapters those alone, and the config of its scheduler.

    With adapters there is config.json all the same: of the UNet that they belong to.
    """
    if getattr(unet, "peft_config", None):
        fresh_directory(path)
        unet.save_config(path)
        save_adapters(state_of(unet, lineage), path)
    else:
        save_unet(unet, path, lineage)
    write_json(path / "scheduler_config.json", dict(scheduler))
    write_sums(path)


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
