"""Encode every distinct caption once with the frozen text encoder.

Reads  data/tokens.zarr, data/base/text_encoder
Writes data/captions.zarr (encoder_hidden_states (U, C * 77, D) float16, caption (U,)),
       data/encode_captions_metrics.json
Params encode_captions
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np

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
from stages.lib.models.layout import check_component, read_config
from stages.lib.models.weights import component_fingerprint
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
    check_component(BASE, "text_encoder")
    check_clip_skip(options)
    tokens = open_store(TOKENS, "tokenize")
    attributes_of_tokens = attributes_of(tokens)
    num_chunks: int = attributes_of_tokens["num_chunks"]
    captions = read_array(TOKENS, tokens, "caption", "tokenize").tolist()
    input_ids = read_array(TOKENS, tokens, "input_ids", "tokenize")  # (U, C * 77)
    windows = input_ids.reshape(len(captions) * num_chunks, -1)  # (U * C, 77)
    keys = [fingerprint(ids.tolist()) for ids in windows]
    recipe = recipe_of(options)
    store = WorkStore(work_root(), "encode_captions", recipe)
    encode(store, captions, windows, keys, options)
    if not processes().is_main_process:
        return

    attributes = {
        "model_fingerprint": recipe["model"],
        "clip_skip": options.clip_skip,
        "empty_row": attributes_of_tokens["empty_row"],
        "num_chunks": num_chunks,
    }
    redone = write_encoded_captions(store, captions, keys, attributes)
    output = verify_store(ENCODED_CAPTIONS, "encode_captions")
    blocks = iter_array(ENCODED_CAPTIONS, output, "encoder_hidden_states", "encode_captions")
    metrics = {
        "num_encoded_captions": len(captions),
        "num_windows_redone_in_float32": len(redone),
        **mean_and_std(row for block in blocks for row in block),
    }
    write_json(ENCODE_CAPTIONS_METRICS, metrics)


def check_clip_skip(options: EncodeCaptions) -> None:
    """Raise StageError if the text encoder has no such layer."""
    num_layers = read_config(BASE / "text_encoder" / "config.json")["num_hidden_layers"]
    if options.clip_skip is not None and options.clip_skip > num_layers:
        raise StageError(
            f"params.yaml: encode_captions.clip_skip is {options.clip_skip}, "
            f"the text encoder has {num_layers} layers"
        )


def recipe_of(options: EncodeCaptions) -> dict[str, Any]:
    """All that determines the bytes of a window's states, but for its token ids."""
    return {
        "model": component_fingerprint(BASE / "text_encoder"),
        "clip_skip": options.clip_skip,
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "code": code_identity(build_caption_encoder, InProcess, compute_with_one_thread),
        **environment("transformers"),
    }


def encode(
    store: WorkStore, captions: list[str], windows: np.ndarray, keys: list[str], options: EncodeCaptions
) -> None:
    """A row of encoder_hidden_states for every window of every caption, in the work store."""
    num_chunks = len(windows) // len(captions)

    def items(missing: set[str]) -> Iterator[Item]:
        for index, (key, input_ids) in enumerate(zip(keys, windows, strict=True)):
            yield Item(key, repr(captions[index // num_chunks]), input_ids)

    build = functools.partial(build_caption_encoder, options.clip_skip)
    # Token ids are their own input: there is nothing to load.
    encoder = Encoder(np.asarray, build, options.batch_size, options.dtype)
    encode_missing(store, keys, items, encoder, "encode captions", "windows")


if __name__ in ("__main__", "__mp_main__"):  # the stage, or a process that it started
    leave_out("peft", "scipy", "sklearn")
if __name__ == "__main__":
    run_stage("encode_captions", ("encode_captions",), main, distributed=True)
