"""Small, randomly initialised checkpoints in diffusers layout, for every test that needs a base model.

`sd15_like` and `sd21_like` carry the configs of Stable Diffusion 1.5 and 2.1 as they are published,
written key by key, with the tensor names of those years; only widths are divided.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

CLIP_VOCAB_SIZE = 49408
_WORDS = ("cat", "dog", "red", "heart", "rocket", "a", "of", "photo")
_SPECIAL = ("<|startoftext|>", "<|endoftext|>")
_DEPRECATED_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
_SCHEDULER = {
    "_diffusers_version": "0.8.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}


def tiny_pipeline(directory: Path, seed: int = 0) -> Path:
    """A generic SD-like pipeline: 64 x 64 images, (4, 16, 16) latents, (77, 32) text; built in 0.1 s."""
    vocab_size = write_tokenizer(directory / "tokenizer")
    text_encoder = {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": vocab_size - 2,
        "eos_token_id": vocab_size - 1,
        "hidden_act": "quick_gelu",
        "hidden_size": 32,
        "intermediate_size": 64,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "pad_token_id": vocab_size - 1,
        "vocab_size": vocab_size,
    }
    vae = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [8, 16, 16],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "out_channels": 3,
        "sample_size": 64,
        "scaling_factor": 0.5,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
    }
    unet = {
        "_class_name": "UNet2DConditionModel",
        "attention_head_dim": 2,
        "block_out_channels": [16, 32],
        "cross_attention_dim": 32,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "in_channels": 4,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "out_channels": 4,
        "sample_size": 16,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }
    scheduler = {**_SCHEDULER, "_class_name": "DDIMScheduler", "prediction_type": "epsilon"}
    return _write_pipeline(directory, seed, text_encoder, vae, unet, scheduler)


def sd15_like(directory: Path, width_divisor: int = 8, seed: int = 0) -> Path:
    """Stable Diffusion 1.5, widths over ``width_divisor`` (1, 2, 4 or 8): epsilon, PNDM."""
    write_tokenizer(directory / "tokenizer", CLIP_VOCAB_SIZE)
    text_encoder = _text_encoder(768, 12, 12, "quick_gelu", width_divisor)
    unet = _unet(768, 64, width_divisor) | {"_diffusers_version": "0.6.0", "attention_head_dim": 8}
    vae = _vae(512, width_divisor) | {"_diffusers_version": "0.6.0"}
    scheduler = {**_SCHEDULER, "_class_name": "PNDMScheduler", "_diffusers_version": "0.6.0"}
    return _write_pipeline(directory, seed, text_encoder, vae, unet, scheduler, as_published=True)


def sd21_like(directory: Path, width_divisor: int = 8, seed: int = 0) -> Path:
    """Stable Diffusion 2.1, widths over ``width_divisor`` (1, 2, 4 or 8): v-prediction, DDIM, "!" pads."""
    write_tokenizer(directory / "tokenizer", CLIP_VOCAB_SIZE, pad_token="!")
    text_encoder = _text_encoder(1024, 23, 16, "gelu", width_divisor) | {"projection_dim": 512}
    unet = _unet(1024, 96, width_divisor) | {
        "_diffusers_version": "0.10.0.dev0",
        "attention_head_dim": [5, 10, 20, 20],
        "dual_cross_attention": False,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "upcast_attention": True,
        "use_linear_projection": True,
    }
    vae = _vae(768, width_divisor) | {"_diffusers_version": "0.10.0.dev0"}
    scheduler = {**_SCHEDULER, "_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}
    return _write_pipeline(directory, seed, text_encoder, vae, unet, scheduler, as_published=True)


def write_tokenizer(directory: Path, vocab_size: int | None = None, pad_token: str = _SPECIAL[1]) -> int:
    """CLIP's byte-level BPE with the merges of a few words, in the files CLIP's own tokenizer has.

    Args:
        directory: is created.
        vocab_size: of the vocabulary; unused tokens fill it up to the two special ones, which come
            last as in CLIP. None takes what is needed.
        pad_token: as in ``special_tokens_map.json``. ``tokenizer_config.json`` names EOS in any
            case, as the published files of SD 2.1 do.

    Returns:
        The size of the vocabulary.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [*map(chr, printable), *(chr(0x100 + offset) for offset in range(256 - len(printable)))]
    merges: list[tuple[str, str]] = []
    for word in _WORDS:
        left, *rest = [*word[:-1], word[-1] + "</w>"]
        for right in rest:
            merges.append((left, right))
            left += right
    merges = list(dict.fromkeys(merges))
    tokens = [*letters, *(letter + "</w>" for letter in letters), *map("".join, merges)]
    if vocab_size is not None:
        tokens += [f"<unused-{number}>" for number in range(vocab_size - len(tokens) - len(_SPECIAL))]
    tokens += _SPECIAL
    start, end = ({"content": token, "normalized": True} for token in _SPECIAL)
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "vocab.json", {token: number for number, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    typed = {"__type": "AddedToken", "lstrip": False, "rstrip": False, "single_word": False}
    config = {
        "add_prefix_space": False,
        "bos_token": typed | start,
        "do_lower_case": True,
        "eos_token": typed | end,
        "errors": "replace",
        "model_max_length": 77,
        "pad_token": _SPECIAL[1],
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": typed | end,
    }
    _write_json(directory / "tokenizer_config.json", config)
    plain = {"lstrip": False, "rstrip": False, "single_word": False}
    special = {"bos_token": plain | start, "eos_token": plain | end, "unk_token": plain | end}
    _write_json(directory / "special_tokens_map.json", special | {"pad_token": pad_token})
    return len(tokens)


def edit_json(path: Path, **changes: Any) -> None:
    """Replace keys of a JSON file; None as a value writes null."""
    _write_json(path, json.loads(path.read_text(encoding="utf-8")) | changes)


def reshard(component: Path, num_shards: int = 2) -> None:
    """Split a component's weights into shards with an index, as large checkpoints come."""
    (single,) = component.glob("*.safetensors")
    tensors = safetensors.torch.load_file(single)
    single.unlink()
    weight_map: dict[str, str] = {}
    for number in range(num_shards):
        shard = f"{single.stem}-{number + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::num_shards]}
        safetensors.torch.save_file(part, component / shard, {"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    _write_json(component / f"{single.name}.index.json", index)


def _text_encoder(
    width: int, num_layers: int, num_heads: int, hidden_act: str, divisor: int
) -> dict[str, Any]:
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": hidden_act,
        "hidden_size": _divided(width, divisor),
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": _divided(4 * width, divisor),
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": num_heads,
        "num_hidden_layers": num_layers,
        "pad_token_id": 1,
        "projection_dim": 768,
        "torch_dtype": "float32",
        "transformers_version": "4.22.0.dev0",
        "vocab_size": CLIP_VOCAB_SIZE,
    }


def _vae(sample_size: int, divisor: int) -> dict[str, Any]:
    # The published configs have no scaling_factor.
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [_divided(width, divisor) for width in (128, 256, 512, 512)],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": _divided(32, divisor),
        "out_channels": 3,
        "sample_size": sample_size,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }


def _unet(cross_attention_dim: int, sample_size: int, divisor: int) -> dict[str, Any]:
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "block_out_channels": [_divided(width, divisor) for width in (320, 640, 1280, 1280)],
        "center_input_sample": False,
        "cross_attention_dim": _divided(cross_attention_dim, divisor),
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": _divided(32, divisor),
        "out_channels": 4,
        "sample_size": sample_size,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }


def _divided(width: int, divisor: int) -> int:
    if width % divisor:
        raise ValueError(f"width {width} is no multiple of {divisor}")
    return width // divisor


def _write_pipeline(
    directory: Path,
    seed: int,
    text_encoder: dict[str, Any],
    vae: dict[str, Any],
    unet: dict[str, Any],
    scheduler: dict[str, Any],
    as_published: bool = False,
) -> Path:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        text_tensors = CLIPTextModel(CLIPTextConfig(**text_encoder)).state_dict()
        vae_tensors = AutoencoderKL.from_config(vae).state_dict()
        unet_tensors = UNet2DConditionModel.from_config(unet).state_dict()
    if as_published:
        text_tensors = {f"text_model.{name}": tensor for name, tensor in text_tensors.items()}
        text_tensors["text_model.embeddings.position_ids"] = torch.arange(77).unsqueeze(0)
        vae_tensors = {_deprecated_name(name): tensor for name, tensor in vae_tensors.items()}
    _write_component(directory / "text_encoder", "model", text_encoder, text_tensors)
    _write_component(directory / "vae", "diffusion_pytorch_model", vae, vae_tensors)
    _write_component(directory / "unet", "diffusion_pytorch_model", unet, unet_tensors)
    _write_json(directory / "scheduler" / "scheduler_config.json", scheduler)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.6.0",
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _write_json(directory / "model_index.json", index)
    return directory


def _deprecated_name(name: str) -> str:
    if ".attentions." in name:
        for new, old in _DEPRECATED_ATTENTION.items():
            name = name.replace(f".{new}.", f".{old}.")
    return name


def _write_component(
    directory: Path, stem: str, config: dict[str, Any], tensors: dict[str, torch.Tensor]
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    _write_json(directory / "config.json", config)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(contiguous, directory / f"{stem}.safetensors", {"format": "pt"})


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sdxl_like(directory: Path, seed: int = 0, force_zeros: bool = True) -> Path:
    """Stable Diffusion XL base 1.0, its keys and structure in small widths; saved by diffusers."""
    from diffusers import (
        AutoencoderKL,
        EulerDiscreteScheduler,
        StableDiffusionXLPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    vocab_size = write_tokenizer(directory / "first")
    write_tokenizer(directory / "second", pad_token="!")
    common = {
        "bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1, "max_position_embeddings": 77,
        "num_attention_heads": 2, "num_hidden_layers": 3, "vocab_size": vocab_size,
    }  # fmt: skip
    first = {"hidden_act": "quick_gelu", "hidden_size": 16, "intermediate_size": 32, "projection_dim": 16}
    second = {"hidden_act": "gelu", "hidden_size": 32, "intermediate_size": 64, "projection_dim": 24}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = StableDiffusionXLPipeline(
            vae=AutoencoderKL(
                block_out_channels=(8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 3,
                up_block_types=("UpDecoderBlock2D",) * 3, latent_channels=4, layers_per_block=1,
                norm_num_groups=4, sample_size=64, scaling_factor=0.13025, force_upcast=True,
            ),
            text_encoder=CLIPTextModel(CLIPTextConfig(**common, **first, pad_token_id=vocab_size - 1)),
            text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**common, **second, pad_token_id=0)),
            tokenizer=CLIPTokenizer.from_pretrained(directory / "first"),
            tokenizer_2=CLIPTokenizer.from_pretrained(directory / "second"),
            unet=UNet2DConditionModel(
                addition_embed_type="text_time", addition_time_embed_dim=8,
                attention_head_dim=(1, 2, 4), block_out_channels=(16, 32, 32), cross_attention_dim=48,
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                layers_per_block=1, norm_num_groups=8, projection_class_embeddings_input_dim=6 * 8 + 24,
                sample_size=16, transformer_layers_per_block=(1, 1, 2), use_linear_projection=True,
            ),
            scheduler=EulerDiscreteScheduler(
                beta_end=0.012, beta_schedule="scaled_linear", beta_start=0.00085,
                interpolation_type="linear", num_train_timesteps=1000, prediction_type="epsilon",
                steps_offset=1, timestep_spacing="leading",
            ),
            force_zeros_for_empty_prompt=force_zeros, add_watermarker=False,
        )  # fmt: skip
        pipeline.save_pretrained(directory)
    for written, published in (("first", "tokenizer"), ("second", "tokenizer_2")):
        shutil.rmtree(directory / published)  # this transformers writes tokenizer.json in the place of these
        (directory / written).rename(directory / published)
    return directory
