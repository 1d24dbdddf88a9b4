"""Encoded captions in memory: what the UNet attends to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from stages.lib.core.devices import to_device
from stages.lib.core.paths import ENCODED_CAPTIONS
from stages.lib.frame.errors import StageError
from stages.lib.models.families.chosen import family_named, family_of
from stages.lib.models.families.family import STATES, Family
from stages.lib.models.families.sd import SD
from stages.lib.models.weights import check_same_model, fingerprint_of_text_encoders
from stages.lib.store.stored_rows import StoredRows
from stages.lib.store.zarr_store import attributes_of, open_store, read_array


@dataclass(frozen=True)
class Conditioning:
    """All distinct captions of a data set.

    Attributes:
        encoder_hidden_states: (U, num_chunks * 77, D) float16; in memory, or read when asked for.
        others: further conditions of the base's family, by name, e.g. text_embeds (U, P) float16.
        row_of: caption text -> row.
        empty_row: row of "", the unconditional input.
        num_chunks: windows a caption, each of 77 tokens.
        clip_skip: the text encoder's layers left out, None for none.
        model_fingerprint: of the text encoder.
        fingerprint: of the store's content.
        family: of the base.
        zeros_for_no_caption: whether the row of "" is zeros, as the base may have been trained.
    """

    encoder_hidden_states: torch.Tensor | StoredRows
    row_of: dict[str, int]
    empty_row: int
    num_chunks: int
    clip_skip: int | None
    model_fingerprint: str
    fingerprint: str
    others: Mapping[str, torch.Tensor | StoredRows] = field(default_factory=dict)
    family: Family = SD
    zeros_for_no_caption: bool = False

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

    def conditions(self, rows: torch.Tensor, device: torch.device) -> dict[str, torch.Tensor]:
        """All conditions of (B,) rows on ``device`` by name, float32."""
        others = {name: to_device(values[rows], device).float() for name, values in self.others.items()}
        return {STATES: self.states(rows, device), **others}


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
    family = family_named(attributes.get("family", SD.name), path)

    def array(name: str) -> torch.Tensor | StoredRows:
        if not resident:
            return StoredRows(path, store, name)
        return torch.from_numpy(read_array(path, store, name, "encode_captions"))

    return Conditioning(
        encoder_hidden_states=array(STATES),
        row_of={caption: row for row, caption in enumerate(captions)},
        empty_row=int(attributes["empty_row"]),
        num_chunks=int(attributes["num_chunks"]),
        clip_skip=None if clip_skip is None else int(clip_skip),
        model_fingerprint=str(attributes["model_fingerprint"]),
        fingerprint=str(attributes["fingerprint"]),
        others={name: array(name) for name in family.of_caption if name != STATES},
        family=family,
        zeros_for_no_caption=attributes.get("no_caption") == "zeros",
    )


def check_text_encoder(conditioning: Conditioning, base: Path) -> None:
    """Raise StageError if the captions were encoded by other text encoders than those of ``base``."""
    family = family_of(base)
    check_same_model(
        ENCODED_CAPTIONS, "captions", conditioning.model_fingerprint, base / family.text_encoders[0].folder,
        fingerprint_of_text_encoders(base, family), "encode_captions",
    )  # fmt: skip
