"""The frozen text encoders as functions: of token ids for captions, of texts for prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from stages.lib.core.paths import BASE
from stages.lib.encoding.windows import token_windows
from stages.lib.models.families.chosen import family_named
from stages.lib.models.families.family import STATES, TEXT_EMBEDS, Family, TextEncoder
from stages.lib.models.families.sd import SD
from stages.lib.models.loaders import load_text_encoder
from stages.lib.store.blocks import Row


def build_caption_encoder(
    family_name: str, clip_skip: int | None, device: str, dtype: str
) -> Callable[[Sequence[np.ndarray]], list[Row]]:
    """The text encoders as a function of input_ids (E, 77) int32, for each encoder, -> a window's conditions.

    These are encoder_hidden_states (77, D) float16, and text_embeds (P,) where the family has them.
    """
    family = family_named(family_name, BASE)
    text_encoders = [
        load_text_encoder(BASE, each).to(device, getattr(torch, dtype)) for each in family.text_encoders
    ]

    @torch.inference_mode()
    def encode(input_ids: Sequence[np.ndarray]) -> list[Row]:
        ids = torch.from_numpy(np.stack(input_ids)).long().to(device)  # (B, E, 77)
        found = encode_window(family, text_encoders, ids.unbind(1), clip_skip)
        arrays = {name: tensor.to("cpu", torch.float16).numpy() for name, tensor in found.items()}
        return [{name: array[row] for name, array in arrays.items()} for row in range(len(ids))]

    return encode


def encode_window(
    family: Family, text_encoders: Sequence[Any], input_ids: Sequence[torch.Tensor], clip_skip: int | None
) -> dict[str, torch.Tensor]:
    """A window of token ids, (B, 77) int64 for each encoder -> its conditions by name.

    Returns:
        encoder_hidden_states (B, 77, D), the encoders' states side by side, and text_embeds (B, P) where one
        of them is pooled.
    """
    states, found = [], {}
    for encoder, text_encoder, ids in zip(family.text_encoders, text_encoders, input_ids, strict=True):
        if encoder.pooled:
            output = text_encoder(ids, output_hidden_states=True)
            found[TEXT_EMBEDS] = output.text_embeds  # (B, P)
            states.append(_states(encoder, text_encoder, output.hidden_states, clip_skip))
        else:
            states.append(encode_text(text_encoder, ids, clip_skip, encoder))
    return {STATES: states[0] if len(states) == 1 else torch.cat(states, dim=-1), **found}


def encode_text(
    text_encoder: torch.nn.Module,
    input_ids: torch.Tensor,
    clip_skip: int | None,
    encoder: TextEncoder = SD.text_encoders[0],
) -> torch.Tensor:
    """Token ids (B, 77) int64 -> encoder_hidden_states (B, 77, D), as diffusers' pipelines compute them.

    With ``clip_skip`` n the last n layers that the family uses are left out; where it asks for the final
    LayerNorm, that is applied to what the layer before them gives.
    """
    if clip_skip is None and encoder.final_norm and not encoder.layers_left_out:
        return text_encoder(input_ids).last_hidden_state
    hidden_states = text_encoder(input_ids, output_hidden_states=True).hidden_states
    return _states(encoder, text_encoder, hidden_states, clip_skip)


def _states(
    encoder: TextEncoder, text_encoder: Any, hidden_states: Sequence[torch.Tensor], clip_skip: int | None
) -> torch.Tensor:
    states = hidden_states[-(encoder.layers_left_out + (clip_skip or 0) + 1)]
    if not encoder.final_norm:
        return states
    layers: Any = getattr(text_encoder, "text_model", text_encoder)  # transformers 5 dropped the wrapper
    return layers.final_layer_norm(states)


def encode_prompt(
    family: Family,
    pipeline: Any,
    text: str,
    clip_skip: int | None,
    num_chunks: int,
    zeros_for_no_caption: bool,
) -> dict[str, torch.Tensor]:
    """A prompt's conditions, as the training captions were encoded: a row does not depend on others.

    Args:
        pipeline: holds the family's tokenizers and text encoders by the names of their folders.
        zeros_for_no_caption: for "", as the base may have been trained.

    Returns:
        encoder_hidden_states (num_chunks * 77, D), and text_embeds (P,) of the first window where the family
        has them, as the encoders' dtype.
    """
    tokenizers = [getattr(pipeline, each.tokenizer) for each in family.text_encoders]
    text_encoders = [getattr(pipeline, each.folder) for each in family.text_encoders]
    windows = [
        torch.from_numpy(token_windows(tokenizer, [text], num_chunks)[0][0]).long().to(pipeline.device)
        for tokenizer in tokenizers
    ]  # each (C, 77)
    parts = [
        encode_window(family, text_encoders, [ids[None, chunk] for ids in windows], clip_skip)
        for chunk in range(num_chunks)
    ]
    found = joined([{name: tensor[0] for name, tensor in part.items()} for part in parts], torch.cat)
    return without_caption(found) if zeros_for_no_caption and not text else found


def joined(windows: Sequence[Mapping[str, Any]], concatenate: Callable[[list[Any]], Any]) -> dict[str, Any]:
    """Conditions of a text's windows as those of the text: states side by side, the rest of the first."""
    states = [window[STATES] for window in windows]
    return {name: concatenate(states) if name == STATES else windows[0][name] for name in windows[0]}


def without_caption(conditions: Mapping[str, Any]) -> dict[str, Any]:
    """Zeros in the place of every condition, for bases trained so."""
    return {name: value * 0 for name, value in conditions.items()}
