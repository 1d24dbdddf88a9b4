"""The files that other tools load learned embeddings from.

diffusers' ``load_textual_inversion`` takes one tensor under the placeholder's name. A1111's web UI, Forge and
ComfyUI take ``emb_params``, and call the word by the name of the file, which is to be renamed to it.
"""

from __future__ import annotations

from collections.abc import Mapping

from stages.lib.core.paths import A1111_EMBEDDINGS, EMBEDDINGS, LEARNED_EMBEDDINGS
from stages.lib.core.sums import write_sums
from stages.lib.core.tensors import write_checked
from stages.lib.inversion.placeholder import Placeholder


def write_placeholder(placeholder: Placeholder, lineage: Mapping[str, str]) -> None:
    """Write both files and SHA256SUMS into data/embeddings; the same vectors give the same bytes."""
    vectors = placeholder.vectors.float().contiguous()  # (V, D)
    write_checked(LEARNED_EMBEDDINGS, {placeholder.word: vectors}, lineage)
    write_checked(A1111_EMBEDDINGS, {"emb_params": vectors}, {**lineage, "name": placeholder.word})
    write_sums(EMBEDDINGS)
