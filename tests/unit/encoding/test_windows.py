"""Captions of any length and number, from the source to what the UNet attends to, against transformers."""

import csv
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from stages import encode_captions, fetch_base, prepare, tokenize_captions
from stages.lib.data.pairs import read_captions
from stages.lib.encoding import windows as captions
from stages.lib.encoding.conditioning import check_text_encoder, read_conditioning
from stages.lib.encoding.windows import token_windows
from stages.lib.evaluation.measuring.rendering import Request, load_renderer, render, settings
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import Params
from stages.lib.models.loaders import load_tokenizer
from stages.lib.store.work_store import WorkStore
from stages.lib.store.zarr_store import open_store
from tests.checkpoints import sd15_like, sd21_like, write_tokenizer
from tests.conftest import draw_image, write_params

TEXTS = [
    "",
    "red cat",
    "A photo of a ROCKET, 24 \N{PILE OF POO} Ærø 猫",
    "dog <|endoftext|> cat",
    " ".join(["cat"] * 75),
    " ".join(["cat"] * 76),
    " ".join(["dog"] * 74 + ["red", "cat", "heart"]),
    " ".join(["rocket"] * 225),
    " ".join(["rocket"] * 226),
]


@pytest.fixture(params=["<|endoftext|>", "!"], ids=["pads with the end, as SD 1", "pads with !, as SD 2"])
def tokenizer(tmp_path, request):
    write_tokenizer(tmp_path / "base" / "tokenizer", 49408, request.param)
    return load_tokenizer(tmp_path / "base")


def run_captions(params: Params) -> None:
    prepare.main(params)
    tokenize_captions.main(params)
    encode_captions.main(params)


def caption_images(*texts: str) -> None:
    """Caption the project's images with ``texts``, the first ones as often as needed."""
    for index in range(12):
        Path(f"images/{index:02d}.txt").write_text(texts[index % len(texts)])


def windows_by_transformers(tokenizer: CLIPTokenizer, text: str, num_chunks: int) -> list[list[int]]:
    """The tokenizer's own windows of a text that does not fit, filled up with that of ""."""
    options = {"padding": "max_length", "truncation": True, "max_length": 77}
    found = tokenizer([text], return_overflowing_tokens=True, **options).input_ids
    return [*found, *[tokenizer("", **options).input_ids] * num_chunks][:num_chunks]


def encode_by_transformers(text: str, num_chunks: int, clip_skip: int | None) -> torch.Tensor:
    """(1, num_chunks * 77, D) float32: data/base called on each window."""
    tokenizer = load_tokenizer(Path("data/base"))
    text_encoder = CLIPTextModel.from_pretrained("data/base/text_encoder", dtype=torch.float32).eval()
    norm = getattr(text_encoder, "text_model", text_encoder).final_layer_norm
    states = []
    for window in windows_by_transformers(tokenizer, text, num_chunks):
        with torch.no_grad():
            output = text_encoder(torch.tensor([window]), output_hidden_states=True)
            states.append(output.last_hidden_state if clip_skip is None else norm(output.hidden_states[-2]))
    return torch.cat(states, dim=1)


def test_one_window_is_what_the_tokenizer_gives(tokenizer):
    windows, num_tokens = token_windows(tokenizer, TEXTS, 1)
    expected = tokenizer(TEXTS, padding="max_length", max_length=77, truncation=True).input_ids
    assert windows.dtype == np.int32
    assert windows[:, 0].tolist() == expected
    assert num_tokens == [len(ids) for ids in tokenizer(TEXTS, verbose=False).input_ids]


@pytest.mark.parametrize("num_chunks", [1, 2, 3])
def test_windows_are_those_that_the_tokenizer_overflows_into(tokenizer, num_chunks, monkeypatch):
    windows, num_tokens = token_windows(tokenizer, TEXTS, num_chunks)
    assert windows.shape == (len(TEXTS), num_chunks, 77)
    for text, found in zip(TEXTS, windows.tolist(), strict=True):
        assert found == windows_by_transformers(tokenizer, text, num_chunks), text
    monkeypatch.setattr(captions, "BLOCK_TEXTS", 2)
    assert np.array_equal(token_windows(tokenizer, TEXTS, num_chunks)[0], windows)
    assert token_windows(tokenizer, TEXTS, num_chunks)[1] == num_tokens


def test_windows_by_hand(tokenizer):
    start, end, pad = 49406, 49407, tokenizer.pad_token_id
    assert pad == (0 if tokenizer.pad_token == "!" else end)
    cat, dog = (tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("cat", "dog"))
    windows, num_tokens = token_windows(tokenizer, ["cat " * 75 + "dog"], 3)
    assert num_tokens == [78]
    assert windows[0].tolist() == [
        [start, *[cat] * 75, end],
        [start, dog, end, *[pad] * 74],
        [start, end, *[pad] * 75],
    ]


def test_what_does_not_fit_is_counted_and_listed(project):
    caption_images("cat", TEXTS[-2], TEXTS[-1])
    params = write_params(tokenize={"num_chunks": 3})
    prepare.main(params)
    tokenize_captions.main(params)
    store = open_store(Path("data/tokens.zarr"), "tokenize")
    assert store["input_ids"].shape == (4, 3 * 77)
    assert store["input_ids"].dtype == np.int32
    assert store.attrs["num_chunks"] == 3
    (listed,) = map(json.loads, Path("data/truncated_captions.jsonl").read_text().splitlines())
    assert listed == {"caption": TEXTS[-1], "kept_tokens": 227, "num_tokens": 228}
    metrics = json.loads(Path("data/tokenize_metrics.json").read_text())
    assert metrics == {
        "num_distinct_captions": 3,
        "num_truncated_captions": 1,
        "longest_caption_tokens": 228,
    }


@pytest.mark.parametrize(("build", "clip_skip"), [(sd15_like, 1), (sd21_like, None)])
def test_each_window_is_encoded_on_its_own(project, build, clip_skip):
    build(project / "sd", width_divisor=8)
    caption_images(*TEXTS[1:3], TEXTS[6])
    params = write_params(
        fetch_base={"directory": "sd"}, tokenize={"num_chunks": 3}, encode_captions={"clip_skip": clip_skip}
    )
    fetch_base.main(params)
    run_captions(params)
    conditioning = read_conditioning()
    assert conditioning.encoder_hidden_states.shape[:2] == (4, 3 * 77)
    assert conditioning.num_chunks == 3
    for text, row in conditioning.row_of.items():
        found = conditioning.encoder_hidden_states[row].float()
        expected = encode_by_transformers(text, 3, clip_skip)[0]
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)


def test_a_second_window_changes_nothing_before_it_and_is_shared(project, monkeypatch):
    caption_images("red cat", "dog")
    run_captions(write_params())
    one = read_conditioning()
    put, encoded = WorkStore.put, []
    monkeypatch.setattr(
        WorkStore, "put", lambda self, keys, rows: (encoded.extend(keys), put(self, keys, rows))
    )
    run_captions(write_params(tokenize={"num_chunks": 2}))
    two = read_conditioning()
    assert encoded == []  # the windows of "red cat", "dog" and "" were there
    assert two.row_of == one.row_of
    assert torch.equal(two.encoder_hidden_states[:, :77], one.encoder_hidden_states)
    empty = one.encoder_hidden_states[one.empty_row]
    for row in two.row_of.values():
        assert torch.equal(two.encoder_hidden_states[row, 77:], empty)


@pytest.mark.parametrize("form", ["data.csv", "metadata.csv", "jsonl", "jsonl lists", "parquet lists"])
def test_an_image_has_as_many_captions_as_its_source_gives(project, form, monkeypatch):
    shutil.rmtree("images")
    Path("images").mkdir()
    captions_of = {
        "a.png": ["red cat", "dog", "rocket"],
        "b.png": ["dog"],
        "c.png": ["photo of a heart", "dog"],
    }
    for seed, name in enumerate(captions_of):
        draw_image(seed).save(f"images/{name}")
    pairs = [(name, caption) for name, texts in captions_of.items() for caption in texts]
    if form.endswith("csv"):
        header = ["image_path", "caption"] if form == "data.csv" else ["file_name", "text"]
        with open(f"images/{form}", "w", newline="") as handle:
            csv.writer(handle).writerows([header, *pairs])
    elif form == "parquet lists":
        table = {"file_name": list(captions_of), "text": list(captions_of.values())}
        pq.write_table(pa.table(table), "images/metadata.parquet")
    else:
        rows = captions_of.items() if form == "jsonl lists" else pairs
        lines = (json.dumps({"file_name": name, "text": text}) + "\n" for name, text in rows)
        Path("images/metadata.jsonl").write_text("".join(lines))

    put, encoded = WorkStore.put, Counter()
    monkeypatch.setattr(
        WorkStore, "put", lambda self, keys, rows: (encoded.update(keys), put(self, keys, rows))
    )
    run_captions(write_params())
    samples = read_captions(Path("data/pairs/captions.parquet"))
    assert {sample.sample_id: list(sample.captions) for sample in samples} == captions_of
    conditioning = read_conditioning()
    assert set(conditioning.row_of) == {"", "red cat", "dog", "rocket", "photo of a heart"}
    assert len(set(conditioning.rows(captions_of["a.png"]).tolist())) == 3
    assert sorted(encoded.values()) == [1] * 5  # "dog" too


@pytest.mark.parametrize(("num_chunks", "clip_skip"), [(1, None), (3, 1)])
def test_prompts_are_embedded_as_captions_are(project, num_chunks, clip_skip):
    prompt, negative_prompt = TEXTS[6], TEXTS[5]
    params = write_params(
        tokenize={"num_chunks": num_chunks},
        encode_captions={"clip_skip": clip_skip},
        evaluate={"prompts": [prompt], "negative_prompt": negative_prompt, "batch_size": 1},
    )
    run_captions(params)
    conditioning = read_conditioning()
    base = Path("data/base")
    renderer = load_renderer(
        base, base / "unet", params.evaluate, [prompt], 64, conditioning.clip_skip, conditioning.num_chunks
    )
    (setting,) = settings(params.evaluate)
    (rendered,) = render(renderer, setting, [Request(prompt, 3)], "pictures")
    stock = StableDiffusionPipeline.from_pretrained("data/base", safety_checker=None)
    picture = stock(
        prompt_embeds=encode_by_transformers(prompt, num_chunks, clip_skip),
        negative_prompt_embeds=encode_by_transformers(negative_prompt, num_chunks, clip_skip),
        generator=torch.Generator().manual_seed(3),
        guidance_scale=3.0,
        num_inference_steps=2,
        height=64,
        width=64,
    ).images[0]
    assert np.abs(np.asarray(picture, int) - np.asarray(rendered.picture, int)).max() <= 1


def test_captions_of_another_text_encoder_are_refused(project):
    run_captions(write_params())
    conditioning = read_conditioning()
    check_text_encoder(conditioning, Path("data/base"))
    path = Path("data/base/text_encoder/model.safetensors")
    weights = load_file(path)
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(StageError, match=r"captions\.zarr: expected captions encoded by data/base/text_enc"):
        check_text_encoder(conditioning, Path("data/base"))


def test_captions_are_verified_before_use(project):
    run_captions(write_params())
    fingerprint = open_store(Path("data/captions.zarr"), "encode_captions").attrs["fingerprint"]
    assert read_conditioning().fingerprint == fingerprint
    chunk = Path("data/captions.zarr/encoder_hidden_states/c/0/0/0")
    content = bytearray(chunk.read_bytes())
    content[1000] ^= 1
    chunk.write_bytes(content)
    remedy = "run `dvc repro -f -s encode_captions`"
    with pytest.raises(StageError, match=f"changed encoder_hidden_states/c/0/0/0; {remedy}"):
        read_conditioning()
