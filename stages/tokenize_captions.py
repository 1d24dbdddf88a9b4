"""Tokenize every distinct caption once.

Reads  data/pairs/captions.parquet, data/base/model_index.json, data/base/tokenizer (SDXL: tokenizer_2 too)
Writes data/tokens.zarr (input_ids (U, C * 77) int32, SDXL's second tokenizer's input_ids_2 too,
       caption (U,)), data/truncated_captions.jsonl, data/tokenize_metrics.json
Params tokenize
"""

from __future__ import annotations

import logging

import numpy as np

from stages.lib.core.files import write_json, write_json_lines
from stages.lib.core.paths import BASE, PAIR_CAPTIONS, TOKENIZE_METRICS, TOKENS, TRUNCATED_CAPTIONS
from stages.lib.data.pairs import read_captions
from stages.lib.encoding.windows import token_windows
from stages.lib.frame.params import Params
from stages.lib.frame.run import run_stage
from stages.lib.models.families.chosen import family_of
from stages.lib.models.layout import check_component
from stages.lib.models.loaders import load_tokenizer
from stages.lib.store.zarr_store import ArraySpec, create_store, finish_store, write_rows

logger = logging.getLogger(__name__)


def main(params: Params) -> None:
    num_chunks = params.tokenize.num_chunks
    family = family_of(BASE)
    samples = read_captions(PAIR_CAPTIONS)
    # "" is row 0: what caption dropout and classifier-free guidance use.
    captions = ["", *sorted({caption for sample in samples for caption in sample.captions} - {""})]
    input_ids: dict[str, np.ndarray] = {}  # (U, C * 77) each
    for encoder in family.text_encoders:
        check_component(BASE, encoder.tokenizer)
        tokenizer = load_tokenizer(BASE, encoder.tokenizer)
        kept_tokens = num_chunks * (tokenizer.model_max_length - 2) + 2  # with one start and one end
        # Those of a family differ in padding alone, so that the last one's counts are everyone's.
        windows, token_counts = token_windows(tokenizer, captions, num_chunks)
        input_ids[encoder.input_ids] = windows.reshape(len(captions), -1)

    schema = {name: ArraySpec(ids.shape, np.int32, ("caption", "token")) for name, ids in input_ids.items()}
    schema["caption"] = ArraySpec((len(captions),), str, ("caption",))
    store = create_store(TOKENS, schema, {"empty_row": 0, "num_chunks": num_chunks})
    write_rows(
        store,
        (
            {
                **{name: ids[row] for name, ids in input_ids.items()},
                "caption": np.asarray(caption, np.dtypes.StringDType()),
            }
            for row, caption in enumerate(captions)
        ),
    )
    finish_store(TOKENS, store)

    truncated = [
        {"caption": caption, "num_tokens": count, "kept_tokens": kept_tokens}
        for caption, count in zip(captions, token_counts, strict=True)
        if count > kept_tokens
    ]
    write_json_lines(TRUNCATED_CAPTIONS, truncated)
    if truncated:
        logger.warning(
            "%d captions are cut at %d tokens, see %s", len(truncated), kept_tokens, TRUNCATED_CAPTIONS
        )
    write_json(
        TOKENIZE_METRICS,
        {
            "num_distinct_captions": len(captions) - 1,
            "num_truncated_captions": len(truncated),
            "longest_caption_tokens": max(token_counts),
        },
    )


if __name__ == "__main__":
    run_stage("tokenize", ("tokenize",), main)
