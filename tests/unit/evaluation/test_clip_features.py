"""Features equal those of transformers, bit for bit whatever else is in the list, and bad CLIPs are named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

from stages.lib.evaluation.measuring import clip_features
from stages.lib.evaluation.measuring.clip_features import image_features, load_clip, text_features
from stages.lib.frame.errors import StageError
from tests.checkpoints import edit_json, write_tokenizer
from tests.conftest import draw_image

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# As the files of openai/clip-vit-base-patch32 have it, but for the size.
PREPROCESSOR = {
    "crop_size": 32,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": MEAN,
    "image_std": STD,
    "resample": 3,
    "size": 32,
}
PICTURES = [draw_image(seed, (70 + seed, 90 - seed)) for seed in range(37)]
TEXTS = ["dog", "a red cat", "rocket", "", "photo of a heart", "a dog of a rocket " * 40] * 6


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip")
    vocab_size = write_tokenizer(path)
    towers = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {"vocab_size": vocab_size, "bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1}
    config = CLIPConfig(
        text_config={**towers, **text, "pad_token_id": vocab_size - 1, "max_position_embeddings": 77},
        vision_config={**towers, "image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        CLIPModel(config).save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return path


@pytest.fixture
def copy(directory, tmp_path):
    return Path(shutil.copytree(directory, tmp_path / "clip"))


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_features_equal_the_embeddings_of_transformers(directory):
    model, processor = CLIPModel.from_pretrained(directory).eval(), CLIPProcessor.from_pretrained(directory)
    inputs = processor(text=TEXTS, images=PICTURES, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs)
    clip = load_clip(directory)
    images, texts = image_features(clip, PICTURES), text_features(clip, TEXTS)
    assert (images.shape, images.dtype) == ((37, 16), torch.float32)
    torch.testing.assert_close(F.normalize(images), expected.image_embeds, rtol=0, atol=2e-6)
    torch.testing.assert_close(F.normalize(texts), expected.text_embeds, rtol=0, atol=2e-6)


def test_pixels_equal_a_computation_by_hand(directory):
    clip = load_clip(directory)
    for picture in PICTURES[:3]:
        width, height = picture.size
        scale = 32 / min(width, height)
        resized = picture.resize((int(width * scale), int(height * scale)), Image.Resampling.BICUBIC)
        left, top = (resized.width - 32) // 2, (resized.height - 32) // 2
        pixels = np.asarray(resized.crop((left, top, left + 32, top + 32)), np.float64) / 255
        expected = ((pixels - MEAN) / STD).transpose(2, 0, 1)
        found = clip.image_processor(picture, return_tensors="np").pixel_values[0]
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_row_does_not_depend_on_its_neighbours(directory, one_thread):
    clip = load_clip(directory)
    images, texts = image_features(clip, PICTURES), text_features(clip, TEXTS)
    assert torch.equal(image_features(clip, iter(PICTURES[::-1])), images.flip(0))
    assert torch.equal(text_features(clip, TEXTS[::-1]), texts.flip(0))
    for row in (0, 31, 36):
        assert torch.equal(image_features(clip, [PICTURES[row]])[0], images[row])
        assert torch.equal(text_features(clip, [TEXTS[row % len(TEXTS)]])[0], texts[row % len(TEXTS)])
    assert len(images.unique(dim=0)) == 37
    assert torch.equal(image_features(load_clip(directory), PICTURES), images)


def test_another_batch_size_changes_rounding_only(directory, monkeypatch):
    clip = load_clip(directory)
    images, texts = image_features(clip, PICTURES), text_features(clip, TEXTS)
    monkeypatch.setattr(clip_features, "BATCH_SIZE", 5)
    torch.testing.assert_close(image_features(clip, PICTURES), images, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(text_features(clip, TEXTS), texts, rtol=1e-4, atol=1e-5)


def test_pictures_are_taken_as_they_are_needed(directory, monkeypatch):
    monkeypatch.setattr(clip_features, "BATCH_SIZE", 4)
    clip = load_clip(directory)
    seen, alive = [], []
    clip.model.vision_model.register_forward_hook(lambda *_: seen.append(len(alive)))

    def pictures():
        for picture in PICTURES[:10]:
            alive.append(picture)
            yield picture

    assert len(image_features(clip, pictures())) == 10
    assert seen == [4, 8, 10]


def test_no_pictures_and_no_texts_have_no_rows(directory):
    clip = load_clip(directory)
    assert image_features(clip, []).shape == text_features(clip, []).shape == (0, 16)


def test_other_picture_modes_are_read_as_rgb(directory):
    clip = load_clip(directory)
    grey = PICTURES[0].convert("L")
    assert torch.equal(image_features(clip, [grey]), image_features(clip, [grey.convert("RGB")]))


def test_half_precision_weights_are_computed_in_float32(copy):
    model = CLIPModel.from_pretrained(copy)
    model.half().save_pretrained(copy)
    clip = load_clip(copy)
    assert {parameter.dtype for parameter in clip.model.parameters()} == {torch.float32}
    assert not clip.model.training


def without(name):
    return lambda path: (path / name).unlink()


def drop_image_tower(path):
    import safetensors.torch

    tensors = safetensors.torch.load_file(path / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("visual_projection")}
    safetensors.torch.save_file(kept, path / "model.safetensors", {"format": "pt"})


def pickled(path):
    weights = CLIPModel.from_pretrained(path).state_dict()
    (path / "model.safetensors").unlink()
    torch.save(weights, path / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "no such directory"),
        (without("config.json"), "config.json: not found"),
        (without("vocab.json"), "expected tokenizer.json, or vocab.json and merges.txt, found neither"),
        (without("preprocessor_config.json"), "preprocessor_config.json"),
        (without("model.safetensors"), "with safetensors"),
        (pickled, "with safetensors"),
        (drop_image_tower, "lack 1 of the tensors that config.json calls for, e.g. visual_projection.weight"),
        (
            lambda path: edit_json(path / "config.json", model_type="siglip"),
            "expected model_type 'clip', got 'siglip'",
        ),
        (
            lambda path: edit_json(path / "preprocessor_config.json", crop_size=40, size=40),
            "expected pictures of 32 x 32, the model's image_size, got 40 x 40",
        ),
        (lambda path: write_tokenizer(path, 600), "tokens, the model's vocab_size, got 600"),
    ],
)
def test_a_clip_that_cannot_be_used_is_named_with_its_fault(copy, damage, message):
    damage(copy)
    with pytest.raises(StageError) as error:
        load_clip(copy)
    assert message in str(error.value)
    assert str(copy) in str(error.value)
