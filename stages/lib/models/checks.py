"""What in the configs of a base the later stages could not work with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.lib.models.layout import _DEFAULT_LATENT_CHANNELS, CONFIG_FILES, read_config

if TYPE_CHECKING:
    pass

_DEFAULT_CROSS_ATTENTION_DIM = 1280
_DEFAULT_TEXT_CONFIG = {"hidden_size": 512, "max_position_embeddings": 77, "vocab_size": 49408}
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")
_PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_UNET_TASKS = {5: "depth-to-image", 7: "upscaling", 8: "image editing (InstructPix2Pix)", 9: "inpainting"}


def config_problems(base: Path) -> list[str]:
    """Everything in the configs of ``base`` that the later stages could not work with.

    Reads the tokenizer's vocabulary and the four configs, no weights.

    Returns:
        One line a problem: which file, expected, got. Empty for a usable base.
    """
    text_encoder, vae, unet, scheduler = (
        read_config(base / component / file) for component, file in CONFIG_FILES.items()
    )
    return [
        *_class_problems(text_encoder, vae, unet),
        *_unet_problems(text_encoder, vae, unet),
        *_tokenizer_problems(base / "tokenizer", text_encoder),
        *_scheduler_problems(scheduler),
    ]


def _class_problems(text_encoder: dict[str, Any], vae: dict[str, Any], unet: dict[str, Any]) -> Iterator[str]:
    for component, config, expected in (
        ("vae", vae, "AutoencoderKL"),
        ("unet", unet, "UNet2DConditionModel"),
    ):
        if (got := config.get("_class_name", expected)) != expected:
            yield f"{component}/config.json: expected class {expected}, got {got}"
    if (got := text_encoder.get("architectures") or ["CLIPTextModel"]) != ["CLIPTextModel"]:
        yield f"text_encoder/config.json: expected architectures ['CLIPTextModel'], got {got}"


def _unet_problems(text_encoder: dict[str, Any], vae: dict[str, Any], unet: dict[str, Any]) -> Iterator[str]:
    latent_channels = vae.get("latent_channels", _DEFAULT_LATENT_CHANNELS)
    in_channels = unet.get("in_channels", _DEFAULT_LATENT_CHANNELS)
    out_channels = unet.get("out_channels", _DEFAULT_LATENT_CHANNELS)
    if in_channels != latent_channels:
        task = f", a UNet for {_UNET_TASKS[in_channels]}, not supported" if in_channels in _UNET_TASKS else ""
        yield (
            f"unet/config.json: expected in_channels {latent_channels}, the VAE's latent_channels, "
            f"got {in_channels}{task}"
        )
    if out_channels != latent_channels:
        yield (
            f"unet/config.json: expected out_channels {latent_channels}, the VAE's latent_channels, "
            f"got {out_channels}"
        )
    hidden_size = text_encoder.get("hidden_size", _DEFAULT_TEXT_CONFIG["hidden_size"])
    cross_attention_dim = unet.get("cross_attention_dim", _DEFAULT_CROSS_ATTENTION_DIM)
    if cross_attention_dim != hidden_size:
        yield (
            f"unet/config.json: expected cross_attention_dim {hidden_size}, the text encoder's hidden_size, "
            f"got {cross_attention_dim}"
        )
    for key in ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim"):
        if unet.get(key) is not None:
            yield f"unet/config.json: {key} {unet[key]!r}: conditioning beyond the caption is not supported"


def _tokenizer_problems(directory: Path, text_encoder: dict[str, Any]) -> Iterator[str]:
    limits = {**_DEFAULT_TEXT_CONFIG, **text_encoder}
    token_ids: list[int] = []
    for name in ("vocab.json", "added_tokens.json"):
        if (directory / name).exists():
            token_ids += read_config(directory / name).values()
    if token_ids and max(token_ids) >= limits["vocab_size"]:
        yield (
            f"tokenizer: expected token ids below {limits['vocab_size']}, the text encoder's vocab_size, "
            f"got {max(token_ids)}"
        )
    if (directory / "tokenizer_config.json").exists():
        longest = read_config(directory / "tokenizer_config.json").get("model_max_length")
        if longest is None or longest > limits["max_position_embeddings"]:
            yield (
                f"tokenizer/tokenizer_config.json: expected model_max_length up to the text encoder's "
                f"max_position_embeddings {limits['max_position_embeddings']}, got {longest}"
            )


def _scheduler_problems(scheduler: dict[str, Any]) -> Iterator[str]:
    # Without these keys DDPMScheduler would fall back on a schedule the base was not trained on.
    file = "scheduler/scheduler_config.json"
    if scheduler.get("trained_betas") is None:
        required = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
        missing = [key for key in required if scheduler.get(key) is None]
        if missing:
            got = scheduler.get("_class_name", "a scheduler")
            yield f"{file}: expected a schedule of betas, got {got} without {', '.join(missing)}"
        elif scheduler["beta_schedule"] not in _BETA_SCHEDULES:
            known = " or ".join(_BETA_SCHEDULES)
            yield f"{file}: expected beta_schedule {known}, got {scheduler['beta_schedule']}"
    if (got := scheduler.get("prediction_type", "epsilon")) not in _PREDICTION_TYPES:
        yield f"{file}: expected prediction_type {' or '.join(_PREDICTION_TYPES)}, got {got}"
