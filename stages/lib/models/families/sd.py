"""Stable Diffusion 1.x and 2.x: one text encoder, whose states are all that a UNet is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stages.lib.models.families.family import STATES, Family, TextEncoder, View

if TYPE_CHECKING:
    import torch


def _view_conditions(view: View) -> dict[str, list[int]]:
    return {}


def _unet_inputs(conditions: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    return {"encoder_hidden_states": conditions[STATES]}


def _pipeline_inputs(
    conditions: Mapping[str, torch.Tensor], without: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    return {"prompt_embeds": conditions[STATES], "negative_prompt_embeds": without[STATES]}


SD = Family(
    name="sd",
    pipeline="StableDiffusionPipeline",
    unused={"safety_checker": None, "requires_safety_checker": False},
    text_encoders=(TextEncoder(),),
    components=("tokenizer", "text_encoder", "vae", "unet", "scheduler"),
    view_conditions=_view_conditions,
    unet_inputs=_unet_inputs,
    pipeline_inputs=_pipeline_inputs,
)
