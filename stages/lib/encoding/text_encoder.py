"""The frozen text encoder as a function on token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from stages.lib.core.paths import BASE
from stages.lib.models.loaders import load_text_encoder
from stages.lib.store.blocks import Row


def build_caption_encoder(
    clip_skip: int | None, device: str, dtype: str
) -> Callable[[Sequence[np.ndarray]], list[Row]]:
    """The text encoder as a function of input_ids (77,) int32 -> encoder_hidden_states (77, D) float16."""
    text_encoder = load_text_encoder(BASE).to(device, getattr(torch, dtype))

    @torch.inference_mode()
    def encode(input_ids: Sequence[np.ndarray]) -> list[Row]:
        ids = torch.from_numpy(np.stack(input_ids)).long().to(device)  # (B, 77)
        hidden_states = encode_text(text_encoder, ids, clip_skip)  # (B, 77, D)
        return [{"encoder_hidden_states": row} for row in hidden_states.to("cpu", torch.float16).numpy()]

    return encode


def encode_text(
    text_encoder: torch.nn.Module, input_ids: torch.Tensor, clip_skip: int | None
) -> torch.Tensor:
    """Token ids (B, 77) int64 -> encoder_hidden_states (B, 77, D), as diffusers' pipelines compute them.

    With ``clip_skip`` n the last n layers are left out and the final LayerNorm is applied to what
    the layer before them gives; None takes the encoder's output.
    """
    if clip_skip is None:
        return text_encoder(input_ids).last_hidden_state
    layers: Any = getattr(text_encoder, "text_model", text_encoder)  # transformers 5 dropped the wrapper
    hidden_states = text_encoder(input_ids, output_hidden_states=True).hidden_states
    return layers.final_layer_norm(hidden_states[-(clip_skip + 1)])
