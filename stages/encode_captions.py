"""Encode every distinct caption once with the frozen text encoder.

Reads  data/tokens.zarr, data/base/text_encoder
Writes data/captions.zarr (encoder_hidden_states (U, 77, D) float16, caption (U,)),
       data/encode_captions_metrics.json
Params encode_captions
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from stages.lib.base_model import component_fingerprint, load_text_encoder, read_config
from stages.lib.conditioning import encode_text
from stages.lib.encoding import Encode, encode_missing
from stages.lib.errors import StageError
from stages.lib.params import EncodeCaptions, Params
from stages.lib.stage_run import run_stage, work_root, write_json
from stages.lib.stores import ArraySpec, create_store, finish_store, open_store, read_array, write_rows
from stages.lib.work import Row, WorkStore, environment, fingerprint, source_fingerprint

TOKENS, CAPTIONS, BASE = Path("data/tokens.zarr"), Path("data/captions.zarr"), Path("data/base")


def build_encoder(options: EncodeCaptions, device: str) -> Encode:
    """The text encoder as a function of input_ids (77,) int32 -> encoder_hidden_states (77, D) float16."""
    text_encoder = load_text_encoder(BASE).to(device, getattr(torch, options.dtype))

    @torch.inference_mode()
    def encode(input_ids: Sequence[np.ndarray]) -> list[Row]:
        ids = torch.from_numpy(np.stack(input_ids)).long().to(device)  # (B, 77)
        hidden_states = encode_text(text_encoder, ids, options.clip_skip)  # (B, 77, D)
        return [{"encoder_hidden_states": row} for row in hidden_states.to("cpu", torch.float16).numpy()]

    return encode


def check_clip_skip(options: EncodeCaptions) -> None:
    """Raise StageError if the text encoder has no such layer."""
    num_layers = read_config(BASE / "text_encoder" / "config.json")["num_hidden_layers"]
    if options.clip_skip is not None and options.clip_skip > num_layers:
        raise StageError(
            f"params.yaml: encode_captions.clip_skip is {options.clip_skip}, "
            f"the text encoder has {num_layers} layers"
        )


def main(params: Params) -> None:
    options = params.encode_captions
    check_clip_skip(options)
    tokens = open_store(TOKENS, "tokenize")
    input_ids = read_array(TOKENS, tokens, "input_ids", "tokenize")  # (U, 77)
    captions = read_array(TOKENS, tokens, "caption", "tokenize").tolist()
    recipe = {
        "model": component_fingerprint(BASE / "text_encoder"),
        "clip_skip": options.clip_skip,
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "code": source_fingerprint(build_encoder, encode_text),
        **environment("transformers"),
    }
    store = WorkStore(work_root(), "encode_captions", recipe)
    keys = [fingerprint(ids.tolist()) for ids in input_ids]
    store.damaged(keys)
    items = zip(keys, map(repr, captions), input_ids, strict=True)
    encode_missing(
        store, items, functools.partial(build_encoder, options), options.batch_size, "encode captions"
    )

    width = next(store.rows(keys[:1]))["encoder_hidden_states"].shape[-1]
    schema = {
        "encoder_hidden_states": ArraySpec(
            (*input_ids.shape, width), np.float16, ("caption", "token", "hidden")
        ),
        "caption": ArraySpec((len(captions),), str, ("caption",)),
    }
    attributes = {
        "model_fingerprint": recipe["model"],
        "clip_skip": options.clip_skip,
        "empty_row": tokens.attrs["empty_row"],
    }
    output = create_store(CAPTIONS, schema, attributes)
    texts = (np.asarray(caption, np.dtypes.StringDType()) for caption in captions)
    write_rows(output, ({**row, "caption": text} for row, text in zip(store.rows(keys), texts, strict=True)))
    finish_store(CAPTIONS, output)
    statistics = mean_and_std(row["encoder_hidden_states"] for row in store.rows(keys))
    metrics = {"num_encoded_captions": len(captions), **statistics}
    write_json(Path("data/encode_captions_metrics.json"), metrics)


def mean_and_std(arrays: Iterable[np.ndarray]) -> dict[str, float]:
    """Mean and standard deviation over all values, summed in float64, one array in memory at a time."""
    count, total, squares = 0, 0.0, 0.0
    for array in arrays:
        values = array.astype(np.float64)
        count, total, squares = count + values.size, total + values.sum(), squares + np.square(values).sum()
    mean = total / count
    return {"embedding_mean": mean, "embedding_std": math.sqrt(max(0.0, squares / count - mean**2))}


if __name__ == "__main__":
    run_stage("encode_captions", ("encode_captions",), main)
