"""conversion: each tensor of a single file arrives bit for bit, as diffusers reads it too."""

from __future__ import annotations

import json
from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import torch
import transformers

from stages.lib.frame.errors import StageError
from stages.lib.models.single_files.configs import published_configs
from stages.lib.models.single_files.conversion import _empty, convert_checkpoint, convert_vae
from stages.lib.models.single_files.kinds import Kind
from tests.checkpoints import CLIP_VOCAB_SIZE, sd15_like, sd21_like, write_tokenizer
from tests.single_files import Tensors, random_components, small_configs, write_checkpoint

__all__ = ["small_configs"]
KINDS: tuple[Kind, ...] = ("sd1", "sd2", "sdxl")
PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
}


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path / "vocabulary", CLIP_VOCAB_SIZE)
    return tmp_path / "vocabulary"


def equal(found: Tensors, expected: Tensors) -> bool:
    return found.keys() == expected.keys() and all(
        tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name])
        for name, tensor in found.items()
    )


def weights(directory: Path) -> Tensors:
    (path,) = directory.glob("*.safetensors")
    return safetensors.torch.load_file(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_arrives(
    small_configs: None, tmp_path: Path, vocabulary: Path, kind: Kind, dtype: torch.dtype
) -> None:
    components = write_checkpoint(tmp_path / "model.safetensors", kind, dtype)
    target = tmp_path / "converted"
    assert convert_checkpoint(tmp_path / "model.safetensors", vocabulary, "epsilon", target) == kind
    for component, tensors in components.items():
        assert equal(weights(target / component), tensors), component
    assert ("text_encoder_2" in components) == (kind == "sdxl") == (target / "tokenizer_2").exists()
    if dtype == torch.float32:
        pipeline = getattr(diffusers, PIPELINES[kind]).from_pretrained(target, local_files_only=True)
        expected = {
            name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)
        }
        assert expected.keys() == components.keys()
        assert pipeline.tokenizer.pad_token_id == (0 if kind == "sd2" else 49407)


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_reads_the_same_from_the_file(
    small_configs: None, tmp_path: Path, vocabulary: Path, kind: Kind
) -> None:
    path, target = tmp_path / "model.safetensors", tmp_path / "converted"
    write_checkpoint(path, kind)
    convert_checkpoint(path, vocabulary, "epsilon", target)
    reference = getattr(diffusers, PIPELINES[kind]).from_single_file(
        str(path), config=str(target), local_files_only=True
    )
    pipeline = getattr(diffusers, PIPELINES[kind]).from_pretrained(target, local_files_only=True)
    for name, part in reference.components.items():
        if isinstance(part, torch.nn.Module):
            assert equal(pipeline.components[name].state_dict(), part.state_dict()), name


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        # Parameters as published: of SD 1.x, 2.x and XL, and of their text encoders.
        ("sd1", {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480}),
        ("sd2", {"unet": 865_910_724, "vae": 83_653_863, "text_encoder": 340_387_840}),
        (
            "sdxl",
            {
                "unet": 2_567_463_684,
                "vae": 83_653_863,
                "text_encoder": 123_060_480,
                "text_encoder_2": 694_659_840,
            },
        ),
    ],
)
def test_the_configs_make_models_of_the_published_sizes(kind: Kind, sizes: dict[str, int]) -> None:
    found = published_configs(kind, "epsilon")
    for component, size in sizes.items():
        model = _empty(component, found[component])
        assert sum(each.numel() for each in model.parameters()) == size, component


@pytest.mark.parametrize(("kind", "build", "predicts"), [
    ("sd1", sd15_like, "epsilon"), ("sd2", sd21_like, "v_prediction"),
])  # fmt: skip
def test_the_configs_are_the_published_ones(tmp_path: Path, kind: Kind, build, predicts: str) -> None:
    build(tmp_path)
    found = published_configs(kind, predicts)
    wide = (
        "block_out_channels",
        "cross_attention_dim",
        "norm_num_groups",
        "hidden_size",
        "intermediate_size",
    )
    for component in ("unet", "text_encoder", "vae"):
        published = json.loads((tmp_path / component / "config.json").read_text())
        for key in found[component].keys() & published.keys() - {*wide, "projection_dim"}:
            assert found[component][key] == published[key], (component, key)
    scheduler = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())
    assert found["scheduler"] == {
        "prediction_type": "epsilon", **{k: v for k, v in scheduler.items() if k != "_diffusers_version"}
    }  # fmt: skip


def test_what_sd2_predicts_is_given_or_told_by_the_file(
    small_configs: None, tmp_path: Path, vocabulary: Path
) -> None:
    path, target = tmp_path / "model.safetensors", tmp_path / "converted"
    write_checkpoint(path, "sd2")
    with pytest.raises(StageError, match=r"set fetch_base\.prediction_type to v_prediction"):
        convert_checkpoint(path, vocabulary, None, target)
    tensors = safetensors.torch.load_file(path)
    for metadata, marker, given, expected in (
        ({}, {}, "v_prediction", "v_prediction"),
        ({"modelspec.prediction_type": "v"}, {}, None, "v_prediction"),
        ({"modelspec.predict_key": "epsilon"}, {}, None, "epsilon"),
        ({}, {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}, None, "v_prediction"),
    ):
        safetensors.torch.save_file(tensors | marker, path, metadata)
        convert_checkpoint(path, vocabulary, given, target)
        scheduler = json.loads((target / "scheduler/scheduler_config.json").read_text())
        assert scheduler["prediction_type"] == expected
        assert scheduler.get("rescale_betas_zero_snr", False) == bool(marker)


def test_another_form_is_refused_with_a_tensor(tmp_path: Path, vocabulary: Path) -> None:
    write_checkpoint(tmp_path / "small.safetensors", "sd1")
    with pytest.raises(StageError, match=r"unet of a published model.*\(40.* and not \(320"):
        convert_checkpoint(tmp_path / "small.safetensors", vocabulary, None, tmp_path / "converted")


def test_a_vocabulary_of_another_size_is_refused(small_configs: None, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model.safetensors", "sd1")
    write_tokenizer(tmp_path / "few")
    with pytest.raises(StageError, match="vocabulary of 49408 tokens, got one of"):
        convert_checkpoint(tmp_path / "model.safetensors", tmp_path / "few", None, tmp_path / "converted")


def test_a_vocabulary_in_one_file_is_the_same(small_configs: None, tmp_path: Path, vocabulary: Path) -> None:
    write_checkpoint(tmp_path / "model.safetensors", "sd1")
    transformers.CLIPTokenizer.from_pretrained(vocabulary).save_pretrained(tmp_path / "one")
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / "one" / name).unlink(missing_ok=True)
    targets = tmp_path / "converted", tmp_path / "other"
    for source, target in zip((vocabulary, tmp_path / "one"), targets, strict=True):
        convert_checkpoint(tmp_path / "model.safetensors", source, None, target)
    for name in ("vocab.json", "merges.txt"):
        assert (targets[0] / "tokenizer" / name).read_bytes() == (
            targets[1] / "tokenizer" / name
        ).read_bytes()


@pytest.mark.parametrize("layout", ["original", "bare", "whole", "diffusers", "diffusers of 2022"])
def test_a_vae_in_any_layout(small_configs: None, tmp_path: Path, layout: str) -> None:
    from stages.lib.export.ldm_keys import vae_tensors
    from tests.checkpoints import _deprecated_name
    from tests.single_files import divided, original

    components = random_components("sd1", torch.float16, seed=3)
    vae = components["vae"]
    named = vae_tensors(vae)
    stored = {
        "original": named,
        "bare": {name.removeprefix("first_stage_model."): tensor for name, tensor in named.items()},
        "whole": original("sd1", components),
        "diffusers": vae,
        "diffusers of 2022": {_deprecated_name(name): tensor for name, tensor in vae.items()},
    }[layout]
    safetensors.torch.save_file({n: t.contiguous() for n, t in stored.items()}, tmp_path / "vae.safetensors")
    config = divided("sdxl", "epsilon")["vae"]
    convert_vae(tmp_path / "vae.safetensors", config, tmp_path / "vae")
    assert equal(weights(tmp_path / "vae"), vae)
    assert json.loads((tmp_path / "vae/config.json").read_text())["scaling_factor"] == 0.13025
