"""The configs that the bases of each kind are published with, for files that come without any."""

from __future__ import annotations

from typing import Any

from stages.lib.models.single_files.kinds import Kind

Config = dict[str, Any]
_CROSS, _PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
_SCHEDULE = {
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


def published_configs(kind: Kind, prediction_type: str) -> dict[str, Config]:
    """Component -> config; tokenizers have none here.

    Args:
        kind: of the checkpoint.
        prediction_type: of its UNet.
    """
    unet_of = {"sd1": _sd1_unet, "sd2": _sd2_unet, "sdxl": _sdxl_unet}
    found: dict[str, Config] = {"unet": unet_of[kind](), "vae": _vae(kind)}
    if kind == "sd1":
        found["text_encoder"] = _text_config(768, 12, 12, "quick_gelu", 768)
        scheduler = "PNDMScheduler"
    elif kind == "sd2":
        found["text_encoder"] = _text_config(1024, 23, 16, "gelu", 512)
        scheduler = "DDIMScheduler"
        if prediction_type == "v_prediction":
            found["unet"] |= {"sample_size": 96, "upcast_attention": True}
    else:
        found["text_encoder"] = _text_config(768, 12, 12, "quick_gelu", 768)
        second = _text_config(1280, 32, 20, "gelu", 1280)
        found["text_encoder_2"] = second | {"architectures": ["CLIPTextModelWithProjection"]}
        scheduler = "EulerDiscreteScheduler"
    found["scheduler"] = {**_SCHEDULE, "_class_name": scheduler, "prediction_type": prediction_type}
    if kind == "sdxl":
        found["scheduler"] |= {"interpolation_type": "linear", "timestep_spacing": "leading",
                               "use_karras_sigmas": False}  # fmt: skip
    return found


def pipeline_index(kind: Kind, scheduler: str) -> Config:
    """``model_index.json`` of a base of its kind."""
    is_xl = kind == "sdxl"
    index: Config = {
        "_class_name": "StableDiffusionXLPipeline" if is_xl else "StableDiffusionPipeline",
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if is_xl:
        return index | {
            "force_zeros_for_empty_prompt": True,
            "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            "tokenizer_2": ["transformers", "CLIPTokenizer"],
        }
    parts = ("feature_extractor", "image_encoder", "safety_checker")
    absent: Config = {part: [None, None] for part in parts}
    return index | absent | {"requires_safety_checker": False}


def pad_tokens(kind: Kind) -> dict[str, str]:
    """Tokenizer -> what it pads with."""
    end = "<|endoftext|>"
    return {"sd1": {"tokenizer": end}, "sd2": {"tokenizer": "!"},
            "sdxl": {"tokenizer": end, "tokenizer_2": "!"}}[kind]  # fmt: skip


def _text_config(width: int, num_layers: int, num_heads: int, hidden_act: str, projection: int) -> Config:
    return {
        "architectures": ["CLIPTextModel"],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "dropout": 0.0,
        "eos_token_id": 2,
        "hidden_act": hidden_act,
        "hidden_size": width,
        "initializer_factor": 1.0,
        "initializer_range": 0.02,
        "intermediate_size": 4 * width,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": num_heads,
        "num_hidden_layers": num_layers,
        "pad_token_id": 1,
        "projection_dim": projection,
        "vocab_size": 49408,
    }


def _vae(kind: Kind) -> Config:
    config: Config = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": 4,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": {"sd1": 512, "sd2": 768, "sdxl": 1024}[kind],
        "scaling_factor": 0.13025 if kind == "sdxl" else 0.18215,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    }
    return config | ({"force_upcast": True} if kind == "sdxl" else {})


def _sd1_unet() -> Config:
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": [_CROSS, _CROSS, _CROSS, _PLAIN],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    }


def _sd2_unet() -> Config:
    return _sd1_unet() | {
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    }


def _sdxl_unet() -> Config:
    return _sd1_unet() | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "attention_head_dim": [5, 10, 20],
        "block_out_channels": [320, 640, 1280],
        "cross_attention_dim": 2048,
        "down_block_types": [_PLAIN, _CROSS, _CROSS],
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
        "transformer_layers_per_block": [1, 2, 10],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "use_linear_projection": True,
    }
