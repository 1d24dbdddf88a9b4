"""Captions and prompts as windows of token ids; the stage tokenize and evaluation both cut texts here.

A text encoder sees 77 tokens: a start, 75 of the text and an end. A longer text fills several
windows, which are encoded one by one, and the UNet attends to all of them side by side. That is the
convention of the A1111 web UI, without its search for a comma near a cut and without its weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

BLOCK_TEXTS = 1000  # tokenized at once, 20 KB each meanwhile


def token_windows(
    tokenizer: CLIPTokenizer, texts: list[str], num_chunks: int
) -> tuple[np.ndarray, list[int]]:
    """Each text as exactly ``num_chunks`` windows, so that all of them batch; what does not fit is cut.

    Args:
        tokenizer: of the base, which gives the start, the end and the padding.
        texts: captions or prompts.
        num_chunks: windows a text. Those it does not fill are windows of "".

    Returns:
        Token ids (P, num_chunks, 77) int32, and how many tokens each whole text has, with a start
        and an end.
    """
    size = tokenizer.model_max_length - 2
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    windows = np.full((len(texts), num_chunks, size + 2), tokenizer.pad_token_id, np.int32)
    num_tokens = []
    for first in range(0, len(texts), BLOCK_TEXTS):
        block = tokenizer(texts[first : first + BLOCK_TEXTS], add_special_tokens=False, verbose=False)
        for index, ids in enumerate(block["input_ids"], first):
            for chunk in range(num_chunks):
                part = ids[chunk * size : (chunk + 1) * size]
                windows[index, chunk, : len(part) + 2] = [start, *part, end]
            num_tokens.append(len(ids) + 2)
    return windows, num_tokens
