"""Encoded captions in memory: what the UNet attends to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from stages.lib.base_model import component_fingerprint
from stages.lib.errors import StageError
from stages.lib.stores import open_store, read_array

CAPTIONS = Path("data/captions.zarr")


@dataclass(frozen=True)
class Conditioning:
    """All distinct captions of a data set.

    Attributes:
        encoder_hidden_states: (U, num_chunks * 77, D) float16.
        row_of: caption text -> row.
        empty_row: row of "", the unconditional input.
        num_chunks: windows a caption, each of 77 tokens.
        clip_skip: the text encoder's layers left out, None for none.
        model_fingerprint: of the text encoder.
        fingerprint: of the store's content.
    """

    encoder_hidden_states: torch.Tensor
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
                f"{CAPTIONS}: caption {error} is not encoded; run `dvc repro encode_captions`"
            ) from error

    def states(self, rows: torch.Tensor, device: torch.device) -> torch.Tensor:
        """encoder_hidden_states of (B,) rows on ``device``, (B, num_chunks * 77, D) float32."""
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
        num_chunks=int(store.attrs["num_chunks"]),
        clip_skip=None if clip_skip is None else int(clip_skip),
        model_fingerprint=str(store.attrs["model_fingerprint"]),
        fingerprint=str(store.attrs["fingerprint"]),
    )


def check_text_encoder(conditioning: Conditioning, text_encoder: Path) -> None:
    """Raise StageError if the captions were encoded by another text encoder than this one."""
    expected = component_fingerprint(text_encoder)
    if conditioning.model_fingerprint != expected:
        raise StageError(
            f"{CAPTIONS}: expected captions encoded by {text_encoder} ({expected[:12]}), "
            f"got those of another ({conditioning.model_fingerprint[:12]}); run `dvc repro encode_captions`"
        )
