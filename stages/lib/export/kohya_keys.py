"""Adapters under the names of kohya's scripts and LyCORIS, which A1111, Forge, ComfyUI and others read.

A module's name is its path with underscores: in diffusers' UNet for Stable Diffusion 1 and 2, in the original
one for SDXL (kohya-ss/sd-scripts, networks/lora.py). Every reader scales by alpha / rank; alpha is the rank
here, and the scale a part of the weights, so that who takes no notice of alpha is right as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from stages.lib.export.ldm_keys import UNET_PREFIX, unet_names
from stages.lib.models.adapter_files import AdapterState

if TYPE_CHECKING:
    import torch

PREFIX = "lora_unet_"
_SD2_WIDTH = 1024  # of the text encoder's output
# Parameters of LoKr and LoHa have the same names in LyCORIS, where peft took them from.
_RENAMED = {
    "lora_A.weight": "lora_down.weight",
    "lora_B.weight": "lora_up.weight",
    "lora_magnitude_vector": "dora_scale",
}
_RANK_AXIS = {"lora_A.weight": 0, "lora_B.weight": 1}
# From sd-scripts' names to keys of params.yaml's train section; they are shown, and change no picture.
_SHOWN = {
    "ss_learning_rate": "learning_rate",
    "ss_lr_scheduler": "lr_scheduler",
    "ss_lr_warmup_steps": "lr_warmup_steps",
    "ss_max_grad_norm": "max_grad_norm",
    "ss_max_train_steps": "max_train_steps",
    "ss_min_snr_gamma": "snr_gamma",
    "ss_mixed_precision": "mixed_precision",
    "ss_noise_offset": "noise_offset",
    "ss_optimizer": "optimizer",
    "ss_seed": "seed",
    "ss_total_batch_size": "train_batch_size",
    "ss_zero_terminal_snr": "rescale_betas_zero_snr",
}


def kohya_tensors(state: AdapterState, unet_config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """An adapter's tensors under kohya's names, with an alpha of every module.

    Where LoRA's ranks differ they are filled up with zeros to the largest: diffusers takes one alpha for the
    attention of all blocks, which would be wrong for other ranks.

    Args:
        state: adapters of any kind, as `read_adapters` gives them.
        unet_config: config.json of the UNet that they belong to.

    Raises:
        StageError: naming modules that SDXL's original layout has no place for.
    """
    import torch

    split = {name: _split(name) for name in state.tensors}
    names = kohya_names({module for module, _ in split.values()}, unet_config)
    largest = _largest_rank(state)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in sorted(state.tensors.items()):
        module, parameter = split[name]
        if parameter == "lora_magnitude_vector":  # a row's length, in as many dimensions as the weight has
            tensor = tensor.reshape(-1, *[1] * max(1, tensor.ndim - 1))
        rank = state.ranks.get(module, state.rank)
        if parameter in _RANK_AXIS:
            tensor = _filled_up(tensor, _RANK_AXIS[parameter], largest)
            rank = largest
        found[f"{names[module]}.{_RENAMED.get(parameter, parameter)}"] = tensor
        if parameter != "lora_magnitude_vector":
            found[f"{names[module]}.alpha"] = torch.tensor(float(rank))
    return found


def _largest_rank(state: AdapterState) -> int:
    return max(
        (tensor.shape[0] for name, tensor in state.tensors.items() if name.endswith("lora_A.weight")),
        default=state.rank,
    )


def _filled_up(tensor: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """With zeros at the end of an axis."""
    import torch

    lacking = list(tensor.shape)
    lacking[axis] = size - tensor.shape[axis]
    return torch.cat([tensor, tensor.new_zeros(lacking)], axis) if lacking[axis] else tensor


def kohya_names(modules: Iterable[str], unet_config: Mapping[str, Any]) -> dict[str, str]:
    """Module of diffusers' UNet -> kohya's name of its adapter."""
    found = {module: module for module in modules}
    if is_sdxl(unet_config):
        # Where a block's sampler stands depends on whether the block has attention.
        attentions = {
            f"up_blocks.{index}.attentions.0.norm.weight"
            for index, kind in enumerate(unet_config["up_block_types"])
            if "Attn" in kind
        }
        weights = {f"{module}.weight" for module in found}
        original = unet_names(weights | attentions, unet_config["layers_per_block"])
        found = {
            module: original[f"{module}.weight"].removeprefix(UNET_PREFIX).removesuffix(".weight")
            for module in found
        }
    return {module: PREFIX + name.replace(".", "_") for module, name in found.items()}


def is_sdxl(unet_config: Mapping[str, Any]) -> bool:
    """Whether the UNet is conditioned on sizes and a pooled text, as SDXL's."""
    return bool(unet_config.get("addition_embed_type") == "text_time")


def kohya_metadata(state: AdapterState, unet_config: Mapping[str, Any]) -> dict[str, str]:
    """What readers show of a file and sort it by: sd-scripts' ``ss_*``, and ModelSpec's required entries.

    No date: the same adapters give the same texts.
    """
    sdxl, sd2 = is_sdxl(unet_config), unet_config.get("cross_attention_dim") == _SD2_WIDTH
    predicts_v = state.lineage.get("prediction_type") == "v_prediction"
    architecture = "stable-diffusion-v1"
    if sdxl:
        architecture = "stable-diffusion-xl-v1-base"
    elif sd2:
        architecture = "stable-diffusion-v2-768-v" if predicts_v else "stable-diffusion-v2-512"
    train = json.loads(state.lineage.get("params", "{}")).get("train", {})
    step = json.loads(state.lineage.get("exported", "{}")).get("step")
    shown = {name: train.get(key) for name, key in _SHOWN.items()}
    rank = _largest_rank(state)
    module, arguments = _network(state, rank)
    return {
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models"
        if sdxl
        else "diffusers",
        "modelspec.prediction_type": "v" if predicts_v else "epsilon",
        "modelspec.sai_model_spec": "1.0.1",
        "ss_base_model_version": "sdxl_base_v1-0" if sdxl else "sd_v2" if sd2 else "sd_v1",
        "ss_network_alpha": str(float(rank)),
        "ss_network_args": json.dumps(arguments, sort_keys=True),
        "ss_network_dim": str(rank),
        "ss_network_module": module,
        "ss_v2": str(sd2 and not sdxl),
        **{name: str(value) for name, value in {**shown, "ss_steps": step}.items() if value is not None},
    }


def _network(state: AdapterState, rank: int) -> tuple[str, dict[str, str]]:
    """The module of sd-scripts that trains such adapters, and its arguments."""
    has_kernels = any(
        name.endswith("lora_A.weight") and tensor.ndim == 4 and tensor.shape[-1] > 1
        for name, tensor in state.tensors.items()
    )
    conv = {"conv_dim": str(rank), "conv_alpha": str(float(rank))} if has_kernels else {}
    if state.kind == "lora":
        return "networks.lora", conv
    dora = {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}
    return "lycoris.kohya", conv | (dora if state.kind == "dora" else {"algo": state.kind})


def _split(name: str) -> tuple[str, str]:
    """Module and parameter."""
    module, _, parameter = name.removesuffix(".weight").rpartition(".")
    has_end = name.endswith(".weight") and parameter in ("lora_A", "lora_B")
    return module, f"{parameter}.weight" if has_end else parameter
