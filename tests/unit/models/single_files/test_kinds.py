"""kinds: a file is called what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch

from stages.lib.frame.errors import StageError
from stages.lib.models.single_files.kinds import checked_vae, checkpoint_kind, open_single_file

CONV = "model.diffusion_model.input_blocks.0.0.weight"
VAE = "first_stage_model.decoder.conv_in.weight"
CLIP = "cond_stage_model.transformer.text_model.final_layer_norm.weight"


def write(path: Path, *names: str, channels: int = 4) -> Path:
    tensors = {name: torch.zeros(1, channels, 1, 1) for name in names}
    safetensors.torch.save_file(tensors, path)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(StageError) as caught:
        checkpoint_kind(path, open_single_file(path))
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["lora_unet_down_blocks_0.lora_up.weight"], "a LoRA"),
        (["unet.down_blocks.0.attn.to_q.lora_A.weight"], "a LoRA"),
        (["control_model.time_embed.0.weight"], "a ControlNet"),
        (["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.x"], "a ControlNet"),
        (["model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight"], "Stable Diffusion 3"),
        (["double_blocks.0.img_attn.norm.key_norm.scale"], "Flux"),
        (["emb_params"], "a textual inversion embedding"),
        (["clip_l", "clip_g"], "a textual inversion embedding"),
        (["conv_first.weight", "RRDB_trunk.0.x"], "an upscaler"),
        (["decoder.conv_in.weight", "encoder.conv_in.weight"], "a VAE; use vae_source: file"),
        (["text_model.final_layer_norm.weight"], "a text encoder"),
        (["text_model.x", "vision_model.x"], "a CLIP model"),
        (["down_blocks.0.resnets.0.conv1.weight"], "a UNet in diffusers layout"),
        (["something.else"], "unknown tensors, e.g. something.else"),
        ([CONV, CLIP], "without its VAE"),
        ([CONV, VAE], "without its text encoder"),
        ([CONV, VAE, "conditioner.embedders.0.model.text_projection"], "the Stable Diffusion XL refiner"),
        ([CONV, VAE, "conditioner.embedders.1.model.ln_final.bias"], "without its first text encoder"),
        ([CONV, VAE, CLIP, "control_model.time_embed.0.weight"], "a ControlNet with its base"),
        (
            [CONV, VAE, "cond_stage_model.model.ln_final.bias", "model.diffusion_model.label_emb.0.0.weight"],
            "unCLIP",
        ),
    ],
)
def test_other_files_are_called_what_they_are(tmp_path: Path, names: list[str], expected: str) -> None:
    assert expected in refusal(write(tmp_path / "a.safetensors", *names))


@pytest.mark.parametrize(
    ("channels", "task"), [(9, "inpainting"), (8, "InstructPix2Pix"), (5, "depth"), (7, "upscaler"), (6, "6")]
)
def test_a_unet_of_another_task_is_named(tmp_path: Path, channels: int, task: str) -> None:
    assert task in refusal(write(tmp_path / "a.safetensors", CONV, VAE, CLIP, channels=channels))


def test_pickles_directories_and_damaged_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.ckpt").write_bytes(b"x")
    assert "a pickle" in refusal(tmp_path / "a.ckpt")
    assert "a directory; use source: directory" in refusal(tmp_path)
    assert "got nothing" in refusal(tmp_path / "none.safetensors")
    path = write(tmp_path / "b.safetensors", CONV)
    path.write_bytes(path.read_bytes()[:-1])
    assert "cut short" in refusal(path)


def test_what_is_no_vae_is_refused_as_one(tmp_path: Path) -> None:
    for names, expected in (([CONV], "a UNet alone"), (["x.lora_up.weight"], "a LoRA")):
        path = write(tmp_path / "a.safetensors", *names)
        with pytest.raises(StageError, match=f"expected a VAE of Stable Diffusion, got {expected}"):
            checked_vae(path, open_single_file(path))
