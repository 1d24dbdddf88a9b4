"""published_names: text encoders written by transformers 5 get the names that every reader knows."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from stages.lib.frame.errors import StageError
from stages.lib.models.published_names import published_name, write_published_names
from stages.lib.models.weights import component_fingerprint
from tests.checkpoints import reshard

CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "projection_dim": 8,
    "vocab_size": 99,
}


@pytest.fixture
def component(tmp_path: Path) -> Path:
    """As transformers writes it, with and without a prefix."""
    torch.manual_seed(0)
    CLIPTextModel(CLIPTextConfig(**CONFIG)).save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    short = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(short, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def test_the_names_are_those_of_the_model_with_projection(component: Path, tmp_path: Path) -> None:
    # transformers kept the published names in this class.
    published = set(CLIPTextModelWithProjection(CLIPTextConfig(**CONFIG)).state_dict())
    published -= {name for name in published if name.endswith("position_ids")}
    before = safetensors.torch.load_file(component / "model.safetensors")
    fingerprint = component_fingerprint(component)
    write_published_names(component)
    after = safetensors.torch.load_file(component / "model.safetensors")
    assert after.keys() == published - {"text_projection.weight"}
    assert all(torch.equal(after[f"text_model.{name}"], tensor) for name, tensor in before.items())
    assert component_fingerprint(component) == fingerprint
    with safetensors.safe_open(component / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    content = (component / "model.safetensors").read_bytes()
    write_published_names(component)
    assert (component / "model.safetensors").read_bytes() == content


def test_the_fingerprint_is_that_of_the_short_names(component: Path) -> None:
    short = component_fingerprint(component)
    tensors = safetensors.torch.load_file(component / "model.safetensors")
    tensors["final_layer_norm.bias"] += 1
    safetensors.torch.save_file(tensors, component / "model.safetensors")
    assert component_fingerprint(component) != short


def test_shards_and_their_index_are_renamed(component: Path) -> None:
    before = safetensors.torch.load_file(component / "model.safetensors")
    reshard(component, 2)
    write_published_names(component)
    loaded, loading = CLIPTextModel.from_pretrained(component, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    state = {name.removeprefix("text_model."): value for name, value in loaded.state_dict().items()}
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_other_names_stay(component: Path) -> None:
    for name in ("text_projection.weight", "text_model.encoder.x", "logit_scale", "vision_model.encoder.x"):
        assert published_name(name) == name


def test_two_tensors_that_would_be_one_are_refused(component: Path) -> None:
    tensors = safetensors.torch.load_file(component / "model.safetensors")
    twice = {"text_model.final_layer_norm.bias": tensors["final_layer_norm.bias"].clone()}
    safetensors.torch.save_file(tensors | twice, component / "model.safetensors")
    with pytest.raises(StageError, match=r"got text_model\.final_layer_norm\.bias with and without"):
        write_published_names(component)
