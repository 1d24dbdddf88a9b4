"""The UNet that is trained: as it is built, with adapters or without, and as it is exported.

Adapters are low-rank updates through peft (Hu et al. 2022): W + alpha / rank * B A, with W frozen.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stages.lib.core.draws import generator
from stages.lib.core.files import fresh_directory, write_json
from stages.lib.core.paths import ENCODED_CAPTIONS, LATENTS
from stages.lib.core.sums import write_sums
from stages.lib.core.tensors import write_safetensors
from stages.lib.encoding.conditioning import Conditioning
from stages.lib.encoding.latents import Latents
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import Train
from stages.lib.models.loaders import load_unet

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

WEIGHTS = "diffusion_pytorch_model.safetensors"
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"


def build_unet(base: Path, options: Train) -> UNet2DConditionModel:
    """The base's UNet on the CPU, float32, in training mode, with adapters where ``lora_rank`` asks."""
    unet = load_unet(base).train()
    for parameter in unet.parameters():  # as loaded, weights are pages of their file, copied when written
        parameter.data = parameter.data.clone()
    if options.lora_rank is not None:
        add_lora(unet, options.lora_rank, options.lora_alpha, options.lora_target_modules, options.seed)
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
    """Write the whole UNet, the config of the scheduler to sample it with, and adapters where it has any."""
    has_adapters = bool(getattr(unet, "peft_config", None))
    save_unet(merge_lora(unet) if has_adapters else unet, path, lineage)
    write_json(path / "scheduler_config.json", dict(scheduler))
    if has_adapters:
        save_lora(unet, path, lineage)
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


def add_lora(
    unet: UNet2DConditionModel, rank: int, alpha: int, target_modules: Sequence[str], seed: int
) -> None:
    """Freeze the UNet and add adapters, in place; only they require a gradient.

    B is zero, so the output is the base's until the first step. A is drawn as peft draws it,
    uniform within 1 / sqrt(fan_in), from a stream of (seed, name of the weight).

    Args:
        unet: on the CPU.
        rank: of the update, 1 or more.
        alpha: the update is scaled by alpha / rank.
        target_modules: ends of module names, e.g. ``to_q`` or ``to_out.0``.
        seed: of the run.

    Raises:
        StageError: naming every entry of ``target_modules`` that no module's name ends in, and
            for modules that peft has no adapter for.
    """
    names = [f".{name}" for name, _ in unet.named_modules()]
    absent = [end for end in target_modules if not any(name.endswith(f".{end}") for name in names)]
    if absent:
        raise StageError(
            f"params.yaml: train.lora_target_modules: data/base/unet has no module {', '.join(absent)}; "
            "attention projections are to_q, to_k, to_v and to_out.0"
        )
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise StageError(
            "params.yaml: train.lora_rank needs the package peft, which is not installed; "
            'run `pip install -e ".[lora]"`'
        ) from error
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(target_modules))
    try:
        with torch.random.fork_rng(devices=[]):
            unet.add_adapter(config)
    except ValueError as error:
        raise StageError(f"params.yaml: train.lora_target_modules: {error}") from error
    for name, parameter in unet.named_parameters():
        if ".lora_A." in name:
            torch.nn.init.kaiming_uniform_(parameter, a=math.sqrt(5), generator=generator(seed, "lora", name))


def save_lora(unet: UNet2DConditionModel, path: Path, lineage: dict[str, str]) -> None:
    """Write the adapters so that ``StableDiffusionPipeline.load_lora_weights(path)`` reads them.

    The same weights give the same bytes. Alpha lies in the metadata, where diffusers looks for it;
    a reader that does not takes it to be the rank.

    Args:
        unet: that `add_lora` was applied to.
        path: of an existing directory.
        lineage: text values kept in the safetensors metadata.
    """
    from peft import get_peft_model_state_dict

    config = unet.peft_config["default"]
    # The keys that every version of peft knows: a reader rejects those it does not.
    adapter = {
        "unet.r": config.r,
        "unet.lora_alpha": config.lora_alpha,
        "unet.target_modules": sorted(config.target_modules),
    }
    tensors = {f"unet.{name}": tensor for name, tensor in get_peft_model_state_dict(unet).items()}
    metadata = {**lineage, "lora_adapter_metadata": json.dumps(adapter, sort_keys=True)}
    write_safetensors(path / LORA_WEIGHTS, tensors, metadata)


def merge_lora(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A plain UNet with the adapters added to its weights; ``unet`` stays as it is.

    Needs memory for a second UNet.
    """
    merged = copy.deepcopy(unet)
    merged.fuse_lora()
    merged.unload_lora()
    return merged
