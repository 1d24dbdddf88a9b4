"""The encode stages against diffusers and transformers called directly."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from stages import encode_captions, encode_images, evaluate, prepare, tokenize_captions
from stages.lib.conditioning import read_conditioning
from stages.lib.errors import StageError
from stages.lib.latents import read_latents
from stages.lib.pairs import read_captions
from stages.lib.params import read_params
from stages.lib.stores import open_store, read_array
from stages.lib.text_encoder import encode_text
from tests.conftest import REPOSITORY, content_fingerprint, draw_image, run_encoders, write_params


def read_json(path: str) -> dict:
    return json.loads(Path(path).read_text())


def reference_pixels(path: Path) -> torch.Tensor:
    """Resize the shorter side to 64, crop the centre, scale to [-1, 1], in another way."""
    image = Image.open(path)  # 80 x 72
    image = image.resize((int(64 * 80 / 72), 64), Image.Resampling.LANCZOS)
    array = np.asarray(image, np.float64)
    left = round((array.shape[1] - 64) / 2)
    return torch.from_numpy(array[:, left : left + 64] / 255 * 2 - 1).permute(2, 0, 1).float()


def test_latents_equal_the_vae_called_directly(encoded):
    latents = read_latents()
    (bucket,) = latents.buckets
    vae = AutoencoderKL.from_pretrained("data/base/vae").eval()
    assert latents.scaling_factor == vae.config.scaling_factor == 0.5
    assert bucket.sample_ids == sorted(f"{index:02d}.png" for index in range(12))
    for row, name in enumerate(bucket.sample_ids):
        with torch.no_grad():
            posterior = vae.encode(reference_pixels(Path("images") / name)[None]).latent_dist
        torch.testing.assert_close(bucket.mean[row, 0].float(), posterior.mean[0], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(bucket.logvar[row, 0].float(), posterior.logvar[0], rtol=2e-3, atol=2e-3)


def test_reconstruction_psnr_equals_a_round_trip_of_diffusers(encoded):
    vae = AutoencoderKL.from_pretrained("data/base/vae").eval()
    scores = {}
    for path in sorted(Path("images").glob("*.png")):
        pixels = reference_pixels(path)[None]
        with torch.no_grad():
            decoded = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        scores[path.name] = -10 * np.log10(float(((decoded - pixels) / 2).double().square().mean()))
    params = write_params(encode_images={"num_reconstructions": 12})
    encode_images.main(params)
    metrics = read_json("data/encode_images_metrics.json")
    assert metrics["reconstruction_psnr"] == pytest.approx(np.mean(list(scores.values())), abs=0.01)
    assert metrics["reconstruction_psnr_worst"] == pytest.approx(min(scores.values()), abs=0.01)
    means = read_latents().buckets[0].mean.double()
    assert metrics["latent_std_2"] == pytest.approx(float(means[:, :, 2].std(correction=0)), abs=1e-9)


def test_a_flipped_view_is_the_encoded_flipped_image(encoded):
    encode_images.main(write_params(encode_images={"horizontal_flip": True}))
    (bucket,) = read_latents().buckets
    assert bucket.mean.shape == (12, 2, 4, 16, 16)
    vae = AutoencoderKL.from_pretrained("data/base/vae").eval()
    pixels = reference_pixels(Path("images/03.png")).flip(-1)
    with torch.no_grad():
        mean = vae.encode(pixels[None]).latent_dist.mean[0]
    torch.testing.assert_close(bucket.mean[3, 1].float(), mean, rtol=2e-3, atol=2e-3)


def test_cold_warm_and_incremental_stores_give_the_same_bytes(encoded, monkeypatch):
    first = [content_fingerprint(Path(f"data/{name}.zarr")) for name in ("latents", "captions", "tokens")]
    calls = []
    put = encode_images.WorkStore.put
    monkeypatch.setattr(
        encode_images.WorkStore, "put", lambda self, keys, rows: (calls.append(keys), put(self, keys, rows))
    )
    run_encoders(read_params())
    assert calls == []
    draw_image(99).save("images/zz.png")
    Path("images/zz.txt").write_text("dog")
    run_encoders(read_params())
    encoded_keys = [key for keys in calls for key in keys if "+" in key]
    assert len(encoded_keys) == 1
    Path("images/zz.png").unlink()
    Path("images/zz.txt").unlink()
    run_encoders(read_params())
    assert [
        content_fingerprint(Path(f"data/{name}.zarr")) for name in ("latents", "captions", "tokens")
    ] == first
    shutil.rmtree(".work")
    monkeypatch.setenv("SD_WORKERS", "2")
    run_encoders(read_params())
    assert [
        content_fingerprint(Path(f"data/{name}.zarr")) for name in ("latents", "captions", "tokens")
    ] == first


def test_a_changed_resolution_or_weight_encodes_anew_and_a_return_encodes_nothing(encoded, monkeypatch):
    calls = []
    put = encode_images.WorkStore.put
    monkeypatch.setattr(
        encode_images.WorkStore, "put", lambda self, keys, rows: (calls.append(keys), put(self, keys, rows))
    )
    encode_images.main(write_params(encode_images={"resolution": 32}))
    assert read_latents().buckets[0].mean.shape[-2:] == (8, 8)
    assert sum(map(len, calls)) == 12 + 4
    calls.clear()
    encode_images.main(write_params())
    assert calls == []


def test_stores_of_another_encoder_are_refused_where_the_encoder_is_at_hand(encoded):
    for component, message in [
        ("text_encoder", r"data/captions\.zarr: expected captions encoded by data/base/text_encoder"),
        ("vae", r"data/latents\.zarr: expected latents encoded by data/base/vae"),
    ]:
        (weights,) = Path("data/base", component).glob("*.safetensors")
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(StageError, match=message + r".*run `dvc repro encode_(captions|images)`"):
            evaluate.main(read_params(), "baseline")
        weights.write_bytes(content)


def test_a_changed_vae_weight_encodes_anew_and_an_identical_copy_nothing(encoded, monkeypatch):
    calls = []
    put = encode_images.WorkStore.put
    monkeypatch.setattr(
        encode_images.WorkStore, "put", lambda self, keys, rows: (calls.append(keys), put(self, keys, rows))
    )
    weights = Path("data/base/vae/diffusion_pytorch_model.safetensors")
    shutil.copytree("data/base/vae", "data/renamed")
    shutil.rmtree("data/base/vae")
    Path("data/renamed").rename("data/base/vae")
    encode_images.main(read_params())
    assert calls == []
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # of the last weight
    weights.write_bytes(content)
    encode_images.main(read_params())
    assert sum(map(len, calls)) == 12 + 4


@pytest.mark.parametrize("moment", ["first block", "assembling"])
def test_a_killed_stage_continues_to_the_same_bytes(encoded, moment):
    undisturbed = content_fingerprint(Path("data/latents.zarr"))
    shutil.rmtree(".work")
    shutil.rmtree("data/latents.zarr")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "SD_WORKERS": "2"}
    stage = subprocess.Popen(
        [sys.executable, "-m", "stages.encode_images"], env=environment, stderr=subprocess.DEVNULL
    )
    signs = {"first block": ".work/encode_images/*/*.safetensors", "assembling": "data/latents.zarr/mean/c"}
    while not list(Path().glob(signs[moment])):
        assert stage.poll() is None
        time.sleep(0.005)
    stage.kill()
    stage.wait()
    encode_images.main(read_params())
    assert content_fingerprint(Path("data/latents.zarr")) == undisturbed


def test_non_finite_latents_name_the_sample(encoded, monkeypatch):
    from safetensors.torch import load_file, save_file

    path = Path("data/base/vae/diffusion_pytorch_model.safetensors")
    weights = load_file(path)
    weights["quant_conv.bias"][:] = 1e6  # beyond float16
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(StageError, match=r"non-finite.*00\.png \(centre\)"):
        encode_images.main(read_params())


def test_captions_equal_the_stock_pipeline(encoded):
    pipeline = StableDiffusionPipeline.from_pretrained(
        "data/base", safety_checker=None, torch_dtype=torch.float32
    )
    conditioning = read_conditioning()
    texts = {
        caption
        for sample in read_captions(Path("data/pairs/captions.parquet"))
        for caption in sample.captions
    }
    assert set(conditioning.row_of) == texts | {""}
    for caption, row in conditioning.row_of.items():
        expected, _ = pipeline.encode_prompt(caption, "cpu", 1, False)
        found = conditioning.encoder_hidden_states[row].float()
        torch.testing.assert_close(found, expected[0], rtol=2e-3, atol=2e-3)
    assert conditioning.row_of[""] == conditioning.empty_row


def test_clip_skip_is_an_earlier_layer_through_the_final_norm(encoded):
    pipeline = StableDiffusionPipeline.from_pretrained(
        "data/base", safety_checker=None, torch_dtype=torch.float32
    )
    text_encoder = pipeline.text_encoder
    input_ids = pipeline.tokenizer(["red cat"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        layers = getattr(text_encoder, "text_model", text_encoder)
        hidden = layers.embeddings(input_ids)
        mask = torch.full((77, 77), float("-inf")).triu(1)[None, None]
        hidden = layers.encoder.layers[0](hidden, mask)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        expected = layers.final_layer_norm(hidden)
        torch.testing.assert_close(encode_text(text_encoder, input_ids, 1), expected, rtol=1e-4, atol=1e-5)
    before = content_fingerprint(Path("data/captions.zarr"))
    encode_captions.main(write_params(encode_captions={"clip_skip": 1}))
    assert read_conditioning().clip_skip == 1
    assert content_fingerprint(Path("data/captions.zarr")) != before


def test_a_clip_skip_beyond_the_first_layer_is_refused(encoded):
    encode_captions.main(write_params(encode_captions={"clip_skip": 2}))
    with pytest.raises(StageError, match="clip_skip is 3, the text encoder has 2 layers"):
        encode_captions.main(write_params(encode_captions={"clip_skip": 3}))


def test_caption_statistics(encoded):
    states = read_conditioning().encoder_hidden_states.double()
    metrics = read_json("data/encode_captions_metrics.json")
    assert metrics["embedding_mean"] == pytest.approx(float(states.mean()), abs=1e-9)
    assert metrics["embedding_std"] == pytest.approx(float(states.std(correction=0)), rel=1e-9)


def test_changed_code_encodes_anew(encoded, monkeypatch):
    monkeypatch.setattr(encode_images, "source_fingerprint", lambda *functions: "another")
    encode_images.main(read_params())
    assert len(list(Path(".work/encode_images").iterdir())) == 2


def test_tokens_are_padded_by_the_tokenizer_and_truncation_is_reported(project):
    long = " ".join(["rocket"] * 100)
    Path("images/05.txt").write_text(long)
    params = read_params()
    prepare.main(params)
    tokenize_captions.main(params)
    store = open_store(Path("data/tokens.zarr"), "tokenize")
    captions = read_array(Path("data/tokens.zarr"), store, "caption", "tokenize").tolist()
    input_ids = read_array(Path("data/tokens.zarr"), store, "input_ids", "tokenize")
    assert captions[0] == ""
    assert captions[1:] == sorted(captions[1:])
    assert len(set(captions)) == len(captions) == 6
    pipeline = StableDiffusionPipeline.from_pretrained("data/base", safety_checker=None)
    for caption, ids in zip(captions, input_ids, strict=True):
        expected = pipeline.tokenizer(caption, padding="max_length", truncation=True, max_length=77).input_ids
        assert ids.tolist() == expected
    (truncated,) = (
        json.loads(line) for line in Path("data/truncated_captions.jsonl").read_text().splitlines()
    )
    assert truncated == {"caption": long, "kept_tokens": 77, "num_tokens": 102}
    assert read_json("data/tokenize_metrics.json")["num_truncated_captions"] == 1
