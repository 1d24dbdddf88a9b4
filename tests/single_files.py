"""Checkpoints in the original layout, small: all tensors of a kind, with the published configs divided."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from stages.lib.export.clip_keys import clip_tensors, open_clip_tensors, published_text_names
from stages.lib.export.ldm_keys import unet_names, vae_tensors
from stages.lib.models.single_files import configs
from stages.lib.models.single_files.kinds import Kind

DIVISOR = 8
Tensors = dict[str, torch.Tensor]
published = configs.published_configs


def divided(kind: Kind, prediction_type: str) -> dict[str, dict[str, Any]]:
    """The published configs with widths over `DIVISOR`."""
    found = published(kind, prediction_type)
    for component, config in found.items():
        for key in ("block_out_channels", "cross_attention_dim", "norm_num_groups"):
            if key in config:
                config[key] = [w // DIVISOR for w in config[key]] if key[0] == "b" else config[key] // DIVISOR
        if component.startswith("text_encoder"):
            for key in ("hidden_size", "intermediate_size", "projection_dim"):
                config[key] //= DIVISOR
    if kind == "sdxl":
        found["unet"]["projection_class_embeddings_input_dim"] = 1280 // DIVISOR + 6 * 256
    return found


@pytest.fixture
def small_configs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes conversion expect the divided configs."""
    monkeypatch.setattr(configs, "published_configs", divided)


def random_components(kind: Kind, dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, Tensors]:
    """Component -> its tensors under the names of diffusers, text encoders with the published ones."""
    found: dict[str, Tensors] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for component, config in divided(kind, "epsilon").items():
            if component == "scheduler":
                continue
            if component == "unet":
                model: torch.nn.Module = UNet2DConditionModel.from_config(config)
            elif component == "vae":
                model = AutoencoderKL.from_config(config)
            else:
                one = CLIPTextModelWithProjection if component.endswith("_2") else CLIPTextModel
                model = one(CLIPTextConfig(**config))
            state = {n: t.to(dtype) for n, t in model.state_dict().items() if "position_ids" not in n}
            found[component] = published_text_names(state) if "text" in component else state
    return found


def original(kind: Kind, components: dict[str, Tensors]) -> Tensors:
    """All tensors of a checkpoint under their original names."""
    names = unet_names(components["unet"], 2)
    found = {names[name]: tensor for name, tensor in components["unet"].items()}
    found |= vae_tensors(components["vae"])
    text = components["text_encoder"]
    if kind == "sd1":
        found |= clip_tensors(text, "cond_stage_model.")
        found["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    elif kind == "sd2":
        found |= open_clip_tensors(text, "cond_stage_model.")
        found["cond_stage_model.model.text_projection"] = torch.zeros(1024 // DIVISOR, 1024 // DIVISOR)
        found["cond_stage_model.model.logit_scale"] = torch.zeros(())
    else:
        found |= clip_tensors(text, "conditioner.embedders.0.")
        found |= open_clip_tensors(components["text_encoder_2"], "conditioner.embedders.1.")
    return found


def write_checkpoint(
    path: Path, kind: Kind, dtype: torch.dtype = torch.float32, **metadata: str
) -> dict[str, Tensors]:
    """Write a checkpoint; its components as diffusers names them."""
    components = random_components(kind, dtype)
    tensors = {name: tensor.contiguous() for name, tensor in original(kind, components).items()}
    safetensors.torch.save_file(tensors, path, metadata or None)
    return components
