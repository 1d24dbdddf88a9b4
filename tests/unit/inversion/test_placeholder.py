"""A placeholder in tokenizer and encoder is diffusers' own, and the old words stay what they are."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from stages.lib.encoding.windows import token_windows
from stages.lib.frame.errors import StageError
from stages.lib.inversion.placeholder import Placeholder, add_tokens, initial_vectors, install
from stages.lib.models.loaders import load_text_encoder, load_tokenizer

BASE = Path("data/base")
TEXTS = ["a photo of <emoji>", "<emoji>", "dog", "", "<emoji> of a <emoji>s"]


@pytest.mark.parametrize("num_vectors", [1, 3])
def test_states_are_those_of_a_stock_pipeline_with_the_vectors_loaded(project, num_vectors):
    vectors = torch.randn(num_vectors, 32, generator=torch.Generator().manual_seed(0))
    stock = StableDiffusionPipeline.from_pretrained(BASE, safety_checker=None)
    stock.load_textual_inversion({"<emoji>": vectors}, token="<emoji>")
    placeholder = Placeholder("<emoji>", vectors)
    tokenizer, text_encoder = load_tokenizer(BASE), load_text_encoder(BASE)
    install(tokenizer, text_encoder, placeholder)
    windows, _ = token_windows(tokenizer, [placeholder.spelled(text) for text in TEXTS], 1)
    with torch.no_grad():
        for text, ids in zip(TEXTS, torch.from_numpy(windows).long(), strict=True):
            expected, _ = stock.encode_prompt(text, "cpu", 1, False)
            assert torch.equal(text_encoder(ids).last_hidden_state, expected), text


def test_the_gradient_is_that_of_the_rows_of_a_longer_table_and_reaches_no_other(project):
    vectors = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    tokenizer, text_encoder = load_tokenizer(BASE), load_text_encoder(BASE)
    before = text_encoder.get_input_embeddings().weight.detach().clone()
    text_encoder.requires_grad_(False)
    embedding = install(tokenizer, text_encoder, Placeholder("<emoji>", vectors))
    ids = torch.tensor([[embedding.first_id, 3, embedding.first_id + 1, embedding.first_id]])
    embedding(ids).square().sum().backward()

    longer = torch.cat([before, vectors]).requires_grad_()
    rows = torch.where(ids >= embedding.first_id, ids - embedding.first_id + len(before), ids)
    torch.nn.functional.embedding(rows, longer).square().sum().backward()
    assert torch.equal(embedding.vectors.grad, longer.grad[len(before) :])
    assert embedding.table.weight.grad is None and torch.equal(embedding.table.weight, before)


@pytest.mark.parametrize("word", ["cat", "dog</w>", "<taken>"])
def test_a_word_that_the_tokenizer_knows_is_refused(project, word):
    tokenizer = load_tokenizer(BASE)
    tokenizer.add_tokens(["<taken>_1"])
    with pytest.raises(StageError, match=r"invert\.placeholder: expected a word that .* does not know"):
        add_tokens(tokenizer, word, 2)


def test_fewer_words_repeat_in_turn_and_more_are_averaged_in_groups(project):
    tokenizer = load_tokenizer(BASE)
    table = load_text_encoder(BASE).get_input_embeddings()
    ids = tokenizer("red cat dog", add_special_tokens=False)["input_ids"]
    assert len(ids) == 3
    red, cat, dog = table.weight.detach()[ids]
    assert torch.equal(
        initial_vectors(tokenizer, table, "red cat dog", 5), torch.stack([red, cat, dog, red, cat])
    )
    assert torch.allclose(
        initial_vectors(tokenizer, table, "red cat dog", 2), torch.stack([(red + cat) / 2, dog])
    )
    with pytest.raises(StageError, match=r"invert\.initializer: expected one word or more"):
        initial_vectors(tokenizer, table, " ", 2)
