"""Encode every distinct caption once with the frozen text encoder, or with the two of SDXL.

Reads  data/tokens.zarr, data/base/model_index.json, data/base/text_encoder (SDXL: text_encoder_2 too)
Writes data/captions.zarr (encoder_hidden_states (U, C * 77, D) float16, SDXL's text_embeds (U, P) too,
       caption (U,)), data/encode_captions_metrics.json
Params encode_captions
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import zarr

from stages.lib.core.files import write_json
from stages.lib.core.fingerprints import code_identity, environment, fingerprint
from stages.lib.core.paths import BASE, ENCODE_CAPTIONS_METRICS, ENCODED_CAPTIONS, TOKENS
from stages.lib.encoding.batches import Encoder, InProcess, compute_with_one_thread
from stages.lib.encoding.captions_output import mean_and_std, write_encoded_captions
from stages.lib.encoding.engine import Item, encode_missing, processes
from stages.lib.encoding.text_encoder import build_caption_encoder
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import EncodeCaptions, Params
from stages.lib.frame.run import run_stage
from stages.lib.frame.start_up import leave_out
from stages.lib.frame.work_directory import work_root
from stages.lib.models.families.chosen import family_attributes, family_of, zeros_for_no_caption
from stages.lib.models.families.family import Family, TextEncoder
from stages.lib.models.layout import check_component, read_config
from stages.lib.models.weights import fingerprint_of_text_encoders
from stages.lib.store.work_store import WorkStore
from stages.lib.store.zarr_store import (
    attributes_of,
    iter_array,
    open_store,
    read_array,
    verify_store,
)


def main(params: Params) -> None:
    options = params.encode_captions
    family = family_of(BASE)
    for encoder in family.text_encoders:
        check_component(BASE, encoder.folder)
        check_clip_skip(options, encoder)
    tokens = open_store(TOKENS, "tokenize")
    attributes_of_tokens = attributes_of(tokens)
    num_chunks: int = attributes_of_tokens["num_chunks"]
    captions = read_array(TOKENS, tokens, "caption", "tokenize").tolist()
    windows = read_windows(tokens, family, len(captions) * num_chunks)  # (U * C, E, 77)
    keys = [fingerprint(ids[0].tolist() if len(ids) == 1 else ids.tolist()) for ids in windows]
    recipe = recipe_of(options, family)
    store = WorkStore(work_root(), "encode_captions", recipe)
    encode(store, captions, windows, keys, options, family)
    if not processes().is_main_process:
        return

    attributes = {
        "model_fingerprint": recipe["model"],
        "clip_skip": options.clip_skip,
        "empty_row": attributes_of_tokens["empty_row"],
        "num_chunks": num_chunks,
        **family_attributes(family, zeros_for_no_caption(BASE)),
    }
    redone = write_encoded_captions(store, captions, keys, attributes, family.of_caption)
    output = verify_store(ENCODED_CAPTIONS, "encode_captions")
    blocks = iter_array(ENCODED_CAPTIONS, output, "encoder_hidden_states", "encode_captions")
    metrics = {
        "num_encoded_captions": len(captions),
        "num_windows_redone_in_float32": len(redone),
        **mean_and_std(row for block in blocks for row in block),
    }
    write_json(ENCODE_CAPTIONS_METRICS, metrics)


def read_windows(tokens: zarr.Group, family: Family, num_windows: int) -> np.ndarray:
    """Token ids of every window for every text encoder, (num_windows, E, 77) int32.

    Raises:
        StageError: if the store has not those of this family.
    """
    names = [encoder.input_ids for encoder in family.text_encoders]
    if (found := sorted(name for name in tokens.array_keys() if name != "caption")) != sorted(names):
        raise StageError(
            f"{TOKENS}: expected {' and '.join(names)}, of the tokenizers of {BASE}, got "
            f"{' and '.join(found)}; run `dvc repro tokenize`"
        )
    arrays = [read_array(TOKENS, tokens, name, "tokenize") for name in names]  # (U, C * 77) each
    return np.stack([input_ids.reshape(num_windows, -1) for input_ids in arrays], axis=1)


def check_clip_skip(options: EncodeCaptions, encoder: TextEncoder) -> None:
    """Raise StageError if the text encoder has no such layer."""
    num_layers = read_config(BASE / encoder.folder / "config.json")["num_hidden_layers"]
    if options.clip_skip is not None and options.clip_skip > num_layers - encoder.layers_left_out:
        left = f", of which {encoder.layers_left_out} is not used" if encoder.layers_left_out else ""
        raise StageError(
            f"params.yaml: encode_captions.clip_skip is {options.clip_skip}, "
            f"the {encoder.folder.replace('_', ' ')} has {num_layers} layers{left}"
        )


def recipe_of(options: EncodeCaptions, family: Family) -> dict[str, Any]:
    """All that determines the bytes of a window's states, but for its token ids."""
    return {
        "model": fingerprint_of_text_encoders(BASE, family),
        "clip_skip": options.clip_skip,
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "code": code_identity(build_caption_encoder, InProcess, compute_with_one_thread),
        **environment("transformers"),
    }


def encode(
    store: WorkStore,
    captions: list[str],
    windows: np.ndarray,
    keys: list[str],
    options: EncodeCaptions,
    family: Family,
) -> None:
    """A row of conditions for every window of every caption, in the work store."""
    num_chunks = len(windows) // len(captions)

    def items(missing: set[str]) -> Iterator[Item]:
        for index, (key, input_ids) in enumerate(zip(keys, windows, strict=True)):
            yield Item(key, repr(captions[index // num_chunks]), input_ids)

    build = functools.partial(build_caption_encoder, family.name, options.clip_skip)
    # Token ids are their own input: there is nothing to load.
    encoder = Encoder(np.asarray, build, options.batch_size, options.dtype)
    encode_missing(store, keys, items, encoder, "encode captions", "windows")


if __name__ in ("__main__", "__mp_main__"):  # the stage, or a process that it started
    leave_out("peft", "scipy", "sklearn")
if __name__ == "__main__":
    run_stage("encode_captions", ("encode_captions",), main, distributed=True)
