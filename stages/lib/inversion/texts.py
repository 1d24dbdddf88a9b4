"""What a placeholder is learned from: the samples, with the texts that hold it, as token ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from stages.lib.core.paths import PAIR_CAPTIONS
from stages.lib.data.pairs import SampleCaptions
from stages.lib.encoding.conditioning import Conditioning
from stages.lib.encoding.latents import Latents
from stages.lib.frame.errors import StageError
from stages.lib.frame.sections.invert import Invert
from stages.lib.inversion.placeholder import holding
from stages.lib.training.batches import TrainingSet, training_set


def samples_holding(samples: Sequence[SampleCaptions], options: Invert) -> list[SampleCaptions]:
    """The samples with the texts that hold the placeholder in the place of their captions.

    With templates all samples, each with every template; with own captions those that have such a one.

    Raises:
        StageError: if no sample to train on has one.
    """
    word = options.placeholder or ""
    if options.uses_own_captions:
        texts_of = [tuple(holding(sample.captions, word)) for sample in samples]
    else:
        texts_of = [tuple(template.replace("{}", word) for template in options.captions)] * len(samples)
    found = [
        dataclasses.replace(sample, captions=texts)
        for sample, texts in zip(samples, texts_of, strict=True)
        if texts
    ]
    if not any(sample.split == "train" for sample in found):
        raise StageError(
            f"{PAIR_CAPTIONS}: expected captions to train on that hold {word!r}, got none; "
            "write the word into captions, or let invert.captions be templates"
        )
    return found


def texts_of_samples(samples: Sequence[SampleCaptions]) -> list[str]:
    """Their distinct texts, sorted, behind "", which is row 0."""
    return ["", *sorted({text for sample in samples for text in sample.captions})]


def with_states(
    conditioning: Conditioning, texts: Sequence[str], states: torch.Tensor | None = None
) -> Conditioning:
    """A conditioning of other texts, encoded as the data set's are; without ``states`` for its rows alone.

    Args:
        conditioning: of the data set.
        texts: the first is "".
        states: (U, num_chunks * 77, D) of the texts.
    """
    row_of = {text: row for row, text in enumerate(texts)}
    held = torch.empty(0) if states is None else states
    return dataclasses.replace(conditioning, encoder_hidden_states=held, row_of=row_of, empty_row=0)


def set_to_learn_from(
    samples: list[SampleCaptions], texts: Sequence[str], latents: Latents, conditioning: Conditioning
) -> TrainingSet:
    """The samples of the training split; ``caption_rows`` are places in ``texts``."""
    return training_set(samples, latents, with_states(conditioning, texts))
