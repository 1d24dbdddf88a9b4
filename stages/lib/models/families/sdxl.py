"""Stable Diffusion XL: two text encoders, and a UNet that is told how its picture was cropped.

Podell et al. 2023, sections 2.1 and 2.2. The states of both encoders are those of their penultimate
layers, without a final LayerNorm; the second also gives the projection of its end token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stages.lib.models.families.family import STATES, TEXT_EMBEDS, TIME_IDS, Family, TextEncoder, View

if TYPE_CHECKING:
    import torch


def _view_conditions(view: View) -> dict[str, list[int]]:
    return {TIME_IDS: [*view.original, *view.corner, *view.target]}


def _unet_inputs(conditions: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    added = {TEXT_EMBEDS: conditions[TEXT_EMBEDS], TIME_IDS: conditions[TIME_IDS]}
    return {"encoder_hidden_states": conditions[STATES], "added_cond_kwargs": added}


def _pipeline_inputs(
    conditions: Mapping[str, torch.Tensor], without: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    return {
        "prompt_embeds": conditions[STATES],
        "negative_prompt_embeds": without[STATES],
        "pooled_prompt_embeds": conditions[TEXT_EMBEDS],
        "negative_pooled_prompt_embeds": without[TEXT_EMBEDS],
    }


SDXL = Family(
    name="sdxl",
    pipeline="StableDiffusionXLPipeline",
    unused={"feature_extractor": None, "image_encoder": None, "add_watermarker": False},
    text_encoders=(
        TextEncoder(layers_left_out=1, final_norm=False),
        TextEncoder(
            folder="text_encoder_2",
            tokenizer="tokenizer_2",
            class_name="CLIPTextModelWithProjection",
            input_ids="input_ids_2",
            layers_left_out=1,
            final_norm=False,
            pooled=True,
        ),
    ),
    components=(
        "tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2", "vae", "unet", "scheduler",
    ),
    view_conditions=_view_conditions,
    unet_inputs=_unet_inputs,
    pipeline_inputs=_pipeline_inputs,
    follows_force_zeros=True,
)  # fmt: skip
