"""A placeholder token in the base's tokenizer and text encoder: its tokens, its vectors, where they lie.

One word stands for several tokens, ``<cat>``, ``<cat>_1``, ..., as diffusers' ``load_textual_inversion`` and
``maybe_convert_prompt`` have them. The base's own embeddings stay in their table, untouched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from stages.lib.core.paths import BASE, EMBEDDINGS, LEARNED_EMBEDDINGS
from stages.lib.core.sums import check_sums, remedy
from stages.lib.core.tensors import read_checked
from stages.lib.frame.errors import StageError
from stages.lib.models.weights import component_fingerprint

if TYPE_CHECKING:
    from transformers import CLIPTokenizer


@dataclass(frozen=True)
class Placeholder:
    """A word and what was learned of it.

    Attributes:
        word: the placeholder, e.g. ``<cat>``.
        vectors: (V, D) float32, one for each of its tokens.
    """

    word: str
    vectors: torch.Tensor

    @property
    def tokens(self) -> list[str]:
        return tokens_of(self.word, len(self.vectors))

    def spelled(self, text: str) -> str:
        """``text`` with the word as all of its tokens, as diffusers' ``maybe_convert_prompt`` writes it."""
        return text.replace(self.word, " ".join(self.tokens))


class PlaceholderEmbedding(torch.nn.Module):
    """Token embeddings with the placeholder's vectors behind the base's table, which gets no gradient.

    Args:
        table: of the base.
        vectors: (V, D), trained where they are a parameter.
        first_id: token id of the first of them.
    """

    def __init__(self, table: torch.nn.Embedding, vectors: torch.nn.Parameter, first_id: int) -> None:
        super().__init__()
        self.table, self.vectors, self.first_id = table, vectors, first_id

    @property
    def weight(self) -> torch.Tensor:
        """The base's table, for those that ask an embedding for its dtype or device."""
        return self.table.weight

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token ids (B, 77) -> embeddings (B, 77, D)."""
        is_new = input_ids >= self.first_id
        old = self.table(input_ids.masked_fill(is_new, 0))
        new = F.embedding((input_ids - self.first_id).clamp(min=0), self.vectors).to(old.dtype)
        return torch.where(is_new[..., None], new, old)  # (B, 77, D)


def tokens_of(word: str, num_vectors: int) -> list[str]:
    """The names of a placeholder's tokens."""
    return [word, *(f"{word}_{index}" for index in range(1, num_vectors))]


def add_tokens(tokenizer: CLIPTokenizer, word: str, num_vectors: int) -> int:
    """Add a placeholder's tokens to a tokenizer; the id of the first.

    Raises:
        StageError: if the tokenizer has one of them already, or reads the word as one token.
    """
    tokens, known = tokens_of(word, num_vectors), tokenizer.get_vocab()
    taken = [token for token in tokens if token in known or len(_ids(tokenizer, token)) == 1]
    if taken:
        raise StageError(
            f"params.yaml: invert.placeholder: expected a word that {BASE / 'tokenizer'} does not know, got "
            f"{taken[0]!r}, which is one of its tokens; choose another, such as <{word.strip('<>')}-1>"
        )
    tokenizer.add_tokens(tokens)
    return int(tokenizer.convert_tokens_to_ids(word))


def install(tokenizer: CLIPTokenizer, text_encoder: Any, placeholder: Placeholder) -> PlaceholderEmbedding:
    """Make a tokenizer and a text encoder know the placeholder, in place.

    Raises:
        StageError: if the tokenizer knows it already, or its vectors are of another text encoder's width.
    """
    table = text_encoder.get_input_embeddings()
    if placeholder.vectors.shape[1:] != table.weight.shape[1:]:
        raise StageError(
            f"{LEARNED_EMBEDDINGS}: expected vectors of width {table.weight.shape[1]}, got "
            f"{tuple(placeholder.vectors.shape)}; {remedy('invert')}"
        )
    first_id = add_tokens(tokenizer, placeholder.word, len(placeholder.vectors))
    vectors = torch.nn.Parameter(placeholder.vectors.detach().clone().to(table.weight.device))
    embedding = PlaceholderEmbedding(table, vectors, first_id)
    text_encoder.set_input_embeddings(embedding)
    return embedding


def initial_vectors(
    tokenizer: CLIPTokenizer, table: torch.nn.Embedding, initializer: str, num_vectors: int
) -> torch.Tensor:
    """(V, D) float32 to begin with: the embeddings of the initializer's K tokens.

    With K < V they repeat in turn; with K > V each vector is the mean of one of V consecutive groups.

    Raises:
        StageError: if the initializer has no token.
    """
    ids = _ids(tokenizer, initializer)
    if not ids:
        raise StageError(
            "params.yaml: invert.initializer: expected one word or more, got "
            f"{initializer!r}, which has no token; name what the new word is most like"
        )
    found = table.weight.detach()[torch.tensor(ids)].float()  # (K, D)
    if len(ids) <= num_vectors:
        return found[torch.arange(num_vectors) % len(ids)].clone()
    return torch.stack([group.mean(dim=0) for group in found.tensor_split(num_vectors)])


def read_placeholder(directory: Path = EMBEDDINGS, base: Path = BASE) -> Placeholder | None:
    """What invert has learned, None where it was asked for nothing.

    Raises:
        StageError: if it is missing, damaged, or of another text encoder than the base's.
    """
    check_sums(directory, "invert")
    path = directory / LEARNED_EMBEDDINGS.name
    if not path.exists():
        return None
    try:
        tensors, metadata = read_checked(path)
        ((word, vectors),) = tensors.items()
        made_by = metadata["base_text_encoder"]
    except (OSError, ValueError, KeyError) as error:
        raise StageError(f"{path}: expected learned embeddings, got {error!r}; {remedy('invert')}") from error
    if made_by != component_fingerprint(base / "text_encoder"):
        raise StageError(
            f"{path}: expected embeddings of {base / 'text_encoder'}, got those of another text encoder; "
            "run `dvc repro invert`"
        )
    return Placeholder(word, vectors.float())


def holding(texts: Sequence[str], word: str) -> list[str]:
    """Those of ``texts`` that hold the placeholder."""
    return [text for text in texts if word in text]


def _ids(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
