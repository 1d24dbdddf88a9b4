"""Encoded captions in memory: what the UNet attends to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from stages.lib.core.devices import to_device
from stages.lib.core.paths import ENCODED_CAPTIONS
from stages.lib.frame.errors import StageError
from stages.lib.models.weights import check_made_by
from stages.lib.store.stored_rows import StoredRows
from stages.lib.store.zarr_store import attributes_of, open_store, read_array


@dataclass(frozen=True)
class Conditioning:
    """All distinct captions of a data set.

    Attributes:
        encoder_hidden_states: (U, num_chunks * 77, D) float16; in memory, or read when asked for.
        row_of: caption text -> row.
        empty_row: row of "", the unconditional input.
        num_chunks: windows a caption, each of 77 tokens.
        clip_skip: the text encoder's layers left out, None for none.
        model_fingerprint: of the text encoder.
        fingerprint: of the store's content.
    """

    encoder_hidden_states: torch.Tensor | StoredRows
    row_of: dict[str, int]
    empty_row: int
    num_chunks: int
    clip_skip: int | None
    model_fingerprint: str
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
                f"{ENCODED_CAPTIONS}: caption {error} is not encoded; run `dvc repro encode_captions`"
            ) from error

    def states(self, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        """encoder_hidden_states of (B,) rows on ``device``, (B, num_chunks * 77, D) float32."""
        return to_device(self.encoder_hidden_states[rows], device).float()


def read_conditioning(path: Path = ENCODED_CAPTIONS, resident: bool = True) -> Conditioning:
    """Open the store that encode_captions made.

    Args:
        path: of the store.
        resident: load the states into memory; false reads them as they are asked for.

    Raises:
        StageError: if it is absent, incomplete or damaged.
    """
    store = open_store(path, "encode_captions")
    captions = read_array(path, store, "caption", "encode_captions").tolist()
    attributes = attributes_of(store)
    clip_skip = attributes["clip_skip"]
    name = "encoder_hidden_states"
    states = (
        torch.from_numpy(read_array(path, store, name, "encode_captions"))
        if resident
        else StoredRows(path, store, name)
    )
    return Conditioning(
        encoder_hidden_states=states,
        row_of={caption: row for row, caption in enumerate(captions)},
        empty_row=int(attributes["empty_row"]),
        num_chunks=int(attributes["num_chunks"]),
        clip_skip=None if clip_skip is None else int(clip_skip),
        model_fingerprint=str(attributes["model_fingerprint"]),
        fingerprint=str(attributes["fingerprint"]),
    )


def check_text_encoder(conditioning: Conditioning, text_encoder: Path) -> None:
    """Raise StageError if the captions were encoded by another text encoder than this one."""
    check_made_by(
        ENCODED_CAPTIONS, "captions", conditioning.model_fingerprint, text_encoder, "encode_captions"
    )
