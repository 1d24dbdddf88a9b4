"""Encoded captions in memory: what the UNet attends to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stages.lib.errors import StageError
from stages.lib.stores import content_fingerprint, open_store, read_array

CAPTIONS = Path("data/captions.zarr")


@dataclass(frozen=True)
class Conditioning:
    """All distinct captions of a data set.

    Attributes:
        encoder_hidden_states: (U, 77, D) float16.
        row_of: caption text -> row.
        empty_row: row of "", the unconditional input.
        clip_skip: the text encoder's layers left out, None for none.
        fingerprint: hash of the store's content.
    """

    encoder_hidden_states: torch.Tensor
    row_of: dict[str, int]
    empty_row: int
    clip_skip: int | None
    fingerprint: str

    def rows(self, captions: list[str]) -> torch.Tensor:
        """Row numbers of ``captions``, int64.

        Raises:
            StageError: if a caption was never encoded.
        """
        try:
            return torch.tensor([self.row_of[caption] for caption in captions], dtype=torch.int64)
        except KeyError as error:
            raise StageError(
                f"{CAPTIONS}: caption {error} is not encoded; run `dvc repro encode_captions`"
            ) from error

    def states(self, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        """encoder_hidden_states of (B,) rows on ``device``, (B, 77, D) float32."""
        return self.encoder_hidden_states[rows].to(device).float()


def read_conditioning(path: Path = CAPTIONS) -> Conditioning:
    """Load the store that encode_captions made.

    Raises:
        StageError: if it is absent, incomplete or damaged.
    """
    store = open_store(path, "encode_captions")
    captions = read_array(path, store, "caption", "encode_captions").tolist()
    clip_skip = store.attrs["clip_skip"]
    return Conditioning(
        encoder_hidden_states=torch.from_numpy(
            read_array(path, store, "encoder_hidden_states", "encode_captions")
        ),
        row_of={caption: row for row, caption in enumerate(captions)},
        empty_row=int(store.attrs["empty_row"]),
        clip_skip=None if clip_skip is None else int(clip_skip),
        fingerprint=content_fingerprint(path),
    )


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
