"""The encode stages against diffusers and transformers called directly."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from PIL import Image

from stages import baseline, encode_captions, encode_images, prepare, tokenize_captions
from stages.lib.core.fingerprints import code_identity
from stages.lib.data.pairs import read_captions
from stages.lib.encoding import autoencoder, captions_output, latents_output, text_encoder
from stages.lib.encoding import engine as encoding
from stages.lib.encoding.batches import InProcess, compute_with_one_thread
from stages.lib.encoding.conditioning import read_conditioning
from stages.lib.encoding.framing import Framing, Size
from stages.lib.encoding.latents import read_latents
from stages.lib.encoding.report import Reconstruction, worst
from stages.lib.encoding.text_encoder import encode_text
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import read_params
from stages.lib.store.blocks import Block
from stages.lib.store.work_store import WorkStore
from stages.lib.store.zarr_store import open_store, read_array
from tests.checkpoints import edit_json
from tests.conftest import (
    REPOSITORY,
    changed,
    content_fingerprint,
    draw_image,
    reseal,
    run_encoders,
    run_train,
    write_params,
)

STOPPED = """
import sys, time
from pathlib import Path
from stages import encode_images
from stages.lib.store import zarr_store as stores
from stages.lib.frame.run import run_stage

def stop_after(owner, name):
    function = getattr(owner, name)

    def stopping(*arguments):
        function(*arguments)
        Path("stopped").touch()
        time.sleep(600)

    setattr(owner, name, stopping)

if __name__ == "__main__":
    if sys.argv[1] == "first block":
        stop_after(encode_images.WorkStore, "put")
    else:
        stop_after(stores, "_flush")
    run_stage("encode_images", ("encode_images",), encode_images.main)
"""


@pytest.fixture
def written(monkeypatch) -> list[str]:
    """Keys of the rows that are put into any work store."""
    keys_written: list[str] = []
    put = WorkStore.put
    monkeypatch.setattr(
        WorkStore, "put", lambda self, keys, rows: (keys_written.extend(keys), put(self, keys, rows))
    )
    return keys_written


def read_json(path: str) -> dict:
    return json.loads(Path(path).read_text())


def reference_pixels(path: Path, resampling: Image.Resampling = Image.Resampling.LANCZOS) -> torch.Tensor:
    """Resize the shorter side to 64, crop the centre, scale to [-1, 1], in another way."""
    image = Image.open(path)  # 80 x 72
    image = image.resize((int(64 * 80 / 72), 64), resampling)
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


@pytest.mark.parametrize("base", ["a random VAE", "the bundled VAE"])
def test_reconstruction_psnr_equals_a_round_trip_of_diffusers(encoded, base):
    if base == "the bundled VAE":
        shutil.rmtree("data/base/vae")
        shutil.copytree(REPOSITORY / "data" / "tiny" / "vae", "data/base/vae")
        reseal()
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


def test_the_worst_reconstructions_come_first():
    picture = np.zeros((8, 8, 3), np.uint8)
    found = worst([Reconstruction(f"{row}.png", float(row * 7 % 12), 0.5, picture) for row in range(12)])
    assert [each.psnr for each in found] == [0, 1, 2, 3, 4, 5, 6, 7]


def test_the_store_names_scale_and_shift_of_its_vae(encoded):
    edit_json(Path("data/base/vae/config.json"), scaling_factor=0.3, shift_factor=0.25)
    reseal()
    encode_images.main(read_params())
    latents = read_latents()
    assert (latents.scaling_factor, latents.shift_factor) == (0.3, 0.25)


@pytest.mark.parametrize(
    ("stage", "outputs", "array"),
    [
        (encode_images, latents_output, "data/latents.zarr/mean"),
        (encode_captions, captions_output, "data/captions.zarr/encoder_hidden_states"),
    ],
)
def test_a_stage_verifies_what_it_wrote(encoded, monkeypatch, stage, outputs, array):
    finish_store = outputs.finish_store

    def damaging(path, group):
        finish_store(path, group)
        (chunk,) = (file for file in Path(array, "c").rglob("*") if file.is_file())
        content = bytearray(chunk.read_bytes())
        content[0] ^= 1
        chunk.write_bytes(content)

    monkeypatch.setattr(outputs, "finish_store", damaging)
    with pytest.raises(StageError, match="damaged, changed "):
        stage.main(read_params())


@pytest.mark.parametrize(
    ("stage", "roots", "packages"),
    [
        (
            "encode_images",
            [autoencoder.build_image_encoder, encode_images.load_view],
            ["torch", "diffusers", "pillow"],
        ),
        ("encode_captions", [text_encoder.build_caption_encoder], ["torch", "transformers"]),
    ],
)
def test_rows_lie_under_the_code_and_the_libraries_that_made_them(encoded, stage, roots, packages):
    (recipe,) = (read_json(path) for path in Path(".work", stage).glob("*/recipe.json"))
    assert recipe["code"] == code_identity(*roots, InProcess, compute_with_one_thread)
    assert {package: recipe[package] for package in packages} == {name: version(name) for name in packages}
    assert recipe["capability"] == torch.backends.cpu.get_cpu_capability()


def test_a_flipped_view_is_the_encoded_flipped_image(encoded):
    encode_images.main(write_params(encode_images={"horizontal_flip": True}))
    (bucket,) = read_latents().buckets
    assert bucket.mean.shape == (12, 2, 4, 16, 16)
    vae = AutoencoderKL.from_pretrained("data/base/vae").eval()
    pixels = reference_pixels(Path("images/03.png")).flip(-1)
    with torch.no_grad():
        mean = vae.encode(pixels[None]).latent_dist.mean[0]
    torch.testing.assert_close(bucket.mean[3, 1].float(), mean, rtol=2e-3, atol=2e-3)


def test_cold_warm_and_incremental_stores_give_the_same_bytes(encoded, monkeypatch, written):
    first = [content_fingerprint(Path(f"data/{name}.zarr")) for name in ("latents", "captions", "tokens")]
    run_encoders(read_params())
    assert written == []
    draw_image(99).save("images/zz.png")
    Path("images/zz.txt").write_text("dog")
    run_encoders(read_params())
    assert len(written) == 1
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


def test_worker_processes_write_the_bytes_of_one_process(encoded, monkeypatch):
    alone = content_fingerprint(Path("data/latents.zarr"))
    monkeypatch.setattr(encoding, "IN_PROCESS_ROWS", 0)
    monkeypatch.setattr(encoding, "_map_in_threads", lambda *_: pytest.fail("encoded in this process"))
    monkeypatch.setenv("SD_WORKERS", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    shutil.rmtree(".work/encode_images")
    encode_images.main(read_params())
    assert content_fingerprint(Path("data/latents.zarr")) == alone


def test_a_changed_resolution_encodes_anew_and_a_return_encodes_nothing(encoded, written):
    encode_images.main(write_params(encode_images={"resolution": 32}))
    assert read_latents().buckets[0].mean.shape[-2:] == (8, 8)
    assert len(written) == 12 + 4
    written.clear()
    encode_images.main(write_params())
    assert written == []


@pytest.mark.parametrize(
    "change", [{"interpolation": "box"}, {"jpeg_draft": True}, {"dtype": "bfloat16"}, {"batch_size": 2}]
)
def test_what_changes_a_row_encodes_it_anew(encoded, written, change):
    encode_images.main(write_params(encode_images=change))
    assert len(written) == 12 + 4


def test_images_are_resized_as_the_params_say(encoded):
    encode_images.main(write_params(encode_images={"interpolation": "box"}))
    vae = AutoencoderKL.from_pretrained("data/base/vae").eval()
    pixels = reference_pixels(Path("images/03.png"), Image.Resampling.BOX)
    with torch.no_grad():
        mean = vae.encode(pixels[None]).latent_dist.mean[0]
    torch.testing.assert_close(read_latents().buckets[0].mean[3, 0].float(), mean, rtol=2e-3, atol=2e-3)


def test_jpegs_are_decoded_as_the_params_say(project):
    jpeg = io.BytesIO()
    draw_image(0, (512, 512)).save(jpeg, "JPEG", subsampling=0)
    framing = Framing(Size(64, 64), 0, 0, Size(64, 64), False)
    plain = changed(read_params().encode_images, jpeg_draft=False)
    image, draft = Image.open(jpeg), Image.open(jpeg)
    draft.draft("RGB", (64, 64))
    assert draft.size == (64, 64)
    for options, expected in [
        (plain, image.resize((64, 64), Image.Resampling.LANCZOS)),
        (changed(plain, jpeg_draft=True), draft),
    ]:
        found = encode_images.load_view(options, (jpeg.getvalue(), framing))
        assert np.array_equal(found, np.asarray(expected))


def test_stores_of_another_encoder_are_refused_where_the_encoder_is_at_hand(encoded):
    for component, message in [
        ("text_encoder", r"data/captions\.zarr: expected captions encoded by data/base/text_encoder"),
        ("vae", r"data/latents\.zarr: expected latents encoded by data/base/vae"),
    ]:
        (weights,) = Path("data/base", component).glob("*.safetensors")
        content = weights.read_bytes()
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        reseal()
        with pytest.raises(StageError, match=message + r".*run `dvc repro encode_(captions|images)`"):
            baseline.main(read_params())
        weights.write_bytes(content)


def test_a_changed_vae_weight_encodes_anew_and_the_same_in_another_file_nothing(encoded, written):
    weights = Path("data/base/vae/diffusion_pytorch_model.safetensors")
    renamed = weights.rename(weights.with_name("model.safetensors"))
    reseal()
    encode_images.main(read_params())
    assert written == []
    renamed.rename(weights)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # of the last weight
    weights.write_bytes(content)
    reseal()
    encode_images.main(read_params())
    assert len(written) == 12 + 4


@pytest.mark.parametrize(("moment", "num_kept"), [("first block", 48), ("assembling", 100)])
def test_a_killed_stage_continues_to_the_same_bytes(project, monkeypatch, written, moment, num_kept):
    """Its worker processes hold rows when it is killed, or a part of the store is written."""
    for seed in range(12, 100):
        draw_image(seed).save(f"images/{seed:02d}.png")
        Path(f"images/{seed:02d}.txt").write_text("dog")
    params = write_params(encode_images={"resolution": 32, "num_reconstructions": 1})
    prepare.main(params)
    monkeypatch.setattr(encoding, "IN_PROCESS_ROWS", 100)
    encode_images.main(params)
    undisturbed = content_fingerprint(Path("data/latents.zarr"))
    shutil.rmtree(".work")
    shutil.rmtree("data/latents.zarr")
    written.clear()

    Path("stopped.py").write_text(STOPPED)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "SD_WORKERS": "2"}
    stage = subprocess.Popen([sys.executable, "stopped.py", moment], env=environment)
    while not Path("stopped").exists():
        assert stage.poll() is None
        time.sleep(0.01)
    stage.kill()
    stage.wait()
    kept = 0
    for path in Path(".work/encode_images").rglob("*.safetensors"):
        with Block(path) as block:
            kept += len(block.keys)
    assert kept == num_kept
    assert Path("data/latents.zarr/mean/c").exists() == (moment == "assembling")
    encode_images.main(params)
    assert len(written) == 100 - num_kept + (moment == "first block")  # and the reconstruction
    assert content_fingerprint(Path("data/latents.zarr")) == undisturbed


def test_a_damaged_block_is_encoded_anew_to_the_same_bytes(encoded, written):
    before = content_fingerprint(Path("data/latents.zarr"))
    (block,) = Path(".work/encode_images").rglob("*.safetensors")
    content = bytearray(block.read_bytes())
    content[-100] ^= 4
    block.write_bytes(content)
    encode_images.main(read_params())
    assert len(written) == 12
    assert content_fingerprint(Path("data/latents.zarr")) == before


def test_views_that_overflow_are_encoded_in_float32_and_counted(encoded, monkeypatch):
    """The encoder overflows below float32 where a picture is red, and is that of float32 elsewhere."""
    before = content_fingerprint(Path("data/latents.zarr"))
    overflowed: set[bytes] = set()

    def build_encoder(device, dtype):
        encode = autoencoder.build_image_encoder(device, "float32")

        def overflowing(pictures):
            rows = encode(pictures)
            for picture, row in zip(pictures, rows, strict=True):
                if dtype != "float32" and picture[..., 0].mean() > 128:
                    overflowed.add(picture.tobytes())
                    row["mean"][0, 0, 0] = np.inf
            return rows

        return overflowing

    monkeypatch.setattr(encode_images, "build_image_encoder", build_encoder)
    for _ in ("encoded", "kept"):
        encode_images.main(write_params(encode_images={"dtype": "bfloat16"}))
        assert 0 < len(overflowed) < 12
        assert read_json("data/encode_images_metrics.json")["num_redone_in_float32"] == len(overflowed)
        assert content_fingerprint(Path("data/latents.zarr")) == before


def test_windows_that_overflow_are_encoded_in_float32_and_counted(encoded, monkeypatch):
    before = content_fingerprint(Path("data/captions.zarr"))

    def build_encoder(family_name, clip_skip, device, dtype):
        encode = text_encoder.build_caption_encoder(family_name, clip_skip, device, "float32")

        def overflowing(input_ids):
            rows = encode(input_ids)
            for ids, row in zip(input_ids, rows, strict=True):
                if dtype != "float32" and len(set(ids[0].tolist())) > 3:  # "red cat", "photo of a heart"
                    row["encoder_hidden_states"][1, 1] = np.nan
            return rows

        return overflowing

    monkeypatch.setattr(encode_captions, "build_caption_encoder", build_encoder)
    for _ in ("encoded", "kept"):
        encode_captions.main(write_params(encode_captions={"dtype": "bfloat16"}))
        assert read_json("data/encode_captions_metrics.json")["num_windows_redone_in_float32"] == 2
        assert content_fingerprint(Path("data/captions.zarr")) == before


def test_non_finite_latents_name_the_sample(encoded, monkeypatch):
    from safetensors.torch import load_file, save_file

    path = Path("data/base/vae/diffusion_pytorch_model.safetensors")
    weights = load_file(path)
    weights["quant_conv.bias"][:] = 1e6  # beyond float16
    save_file(weights, path, {"format": "pt"})
    reseal()
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
    encode_captions.main(write_params(encode_captions={"clip_skip": 1}))
    conditioning = read_conditioning()
    assert conditioning.clip_skip == 1
    found = conditioning.encoder_hidden_states[conditioning.row_of["red cat"]]
    torch.testing.assert_close(found.float(), expected[0], rtol=2e-3, atol=2e-3)


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
    monkeypatch.setattr(encode_images, "code_identity", lambda *functions: "another")
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


def test_stores_of_other_pairs_are_refused(encoded, tmp_path):
    """Whole files of an earlier run, which a stage run by hand would take for those of this one."""
    earlier = {name: tmp_path / f"earlier-{name}" for name in ("latents.zarr", "captions.zarr")}
    for name, copy in earlier.items():
        shutil.copytree(Path("data") / name, copy)
    draw_image(99).save("images/03.png")
    Path("images/05.txt").write_text("another caption")
    run_encoders(read_params())
    for name, message in (
        ("latents.zarr", r"expected those of the images that data/pairs/captions\.parquet was written with"),
        ("captions.zarr", r"expected the captions of data/pairs/captions\.parquet, got 1 others"),
    ):
        current = Path("data") / name
        current.rename(tmp_path / "current")
        shutil.copytree(earlier[name], current)
        with pytest.raises(StageError, match=message):
            run_train()
        shutil.rmtree(current)
        (tmp_path / "current").rename(current)
    run_train(max_train_steps=1, lr_warmup_steps=0)


def test_rows_of_another_recipe_are_encoded_anew(encoded, written):
    """A block of another VAE has rows of the same keys."""
    (block,) = Path(".work/encode_images").rglob("*.safetensors")
    whole, store = block.read_bytes(), content_fingerprint(Path("data/latents.zarr"))
    weights = Path("data/base/vae/diffusion_pytorch_model.safetensors")
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    reseal()
    encode_images.main(read_params())
    weights.write_bytes(original)
    reseal()
    (other,) = set(Path(".work/encode_images").rglob("*.safetensors")) - {block}
    block.write_bytes(other.read_bytes())
    encode_images.main(read_params())
    assert content_fingerprint(Path("data/latents.zarr")) == store
    assert block.read_bytes() == whole
