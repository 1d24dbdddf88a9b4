"""What in the configs of a base the later stages could not work with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stages.lib.models.families.family import Family, TextEncoder
from stages.lib.models.families.sd import SD
from stages.lib.models.layout import _DEFAULT_LATENT_CHANNELS, CONFIG_FILES, read_config

_DEFAULT_CROSS_ATTENTION_DIM = 1280
_DEFAULT_TEXT_CONFIG = {"hidden_size": 512, "max_position_embeddings": 77, "vocab_size": 49408}
_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")
_PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_UNET_TASKS = {5: "depth-to-image", 7: "upscaling", 8: "image editing (InstructPix2Pix)", 9: "inpainting"}


def config_problems(base: Path, family: Family = SD) -> list[str]:
    """Everything in the configs of ``base`` that the later stages could not work with.

    Reads the tokenizers' vocabularies and the configs, no weights.

    Returns:
        One line a problem: which file, expected, got. Empty for a usable base.
    """
    vae, unet, scheduler = (
        read_config(base / component / CONFIG_FILES[component]) for component in ("vae", "unet", "scheduler")
    )
    text_encoders = [read_config(base / each.folder / "config.json") for each in family.text_encoders]
    found = [*_class_problems(vae, unet)]
    for encoder, config in zip(family.text_encoders, text_encoders, strict=True):
        found += _text_encoder_problems(encoder, config)
    found += [*_unet_problems(text_encoders, vae, unet), *_added_conditions(family, text_encoders, unet)]
    for encoder, config in zip(family.text_encoders, text_encoders, strict=True):
        found += _tokenizer_problems(base / encoder.tokenizer, encoder.folder, config)
    return [*found, *_scheduler_problems(scheduler)]


def distilled(base: Path) -> str | None:
    """What in the scheduler tells of a base that was distilled to a few steps, as Turbo and LCM were."""
    config = read_config(base / "scheduler" / CONFIG_FILES["scheduler"])
    name, spacing = config.get("_class_name", ""), config.get("timestep_spacing")
    if name in ("LCMScheduler", "TCDScheduler"):
        return str(name)
    if name == "EulerAncestralDiscreteScheduler" and spacing == "trailing":
        return f"{name} with timestep_spacing trailing"
    return None


def _class_problems(vae: dict[str, Any], unet: dict[str, Any]) -> Iterator[str]:
    for component, config, expected in (
        ("vae", vae, "AutoencoderKL"),
        ("unet", unet, "UNet2DConditionModel"),
    ):
        if (got := config.get("_class_name", expected)) != expected:
            yield f"{component}/config.json: expected class {expected}, got {got}"


def _text_encoder_problems(encoder: TextEncoder, config: dict[str, Any]) -> Iterator[str]:
    expected = [encoder.class_name]
    if (got := config.get("architectures") or expected) != expected:
        yield f"{encoder.folder}/config.json: expected architectures {expected}, got {got}"


def _unet_problems(
    text_encoders: list[dict[str, Any]], vae: dict[str, Any], unet: dict[str, Any]
) -> Iterator[str]:
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
    hidden_size = sum(each.get("hidden_size", _DEFAULT_TEXT_CONFIG["hidden_size"]) for each in text_encoders)
    cross_attention_dim = unet.get("cross_attention_dim", _DEFAULT_CROSS_ATTENTION_DIM)
    owner = "the text encoder's" if len(text_encoders) == 1 else "the sum of both text encoders'"
    if cross_attention_dim != hidden_size:
        yield (
            f"unet/config.json: expected cross_attention_dim {hidden_size}, {owner} hidden_size, "
            f"got {cross_attention_dim}"
        )
    if unet.get("time_cond_proj_dim") is not None:
        yield (
            f"unet/config.json: time_cond_proj_dim {unet['time_cond_proj_dim']}: a base with the guidance "
            "scale distilled into its UNet, as LCM's, is not supported; take the base it was made from"
        )


def _added_conditions(
    family: Family, text_encoders: list[dict[str, Any]], unet: dict[str, Any]
) -> Iterator[str]:
    for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim"):
        if unet.get(key) is not None:
            yield f"unet/config.json: {key} {unet[key]!r}: conditioning beyond the caption is not supported"
    added, num_ids = unet.get("addition_embed_type"), sum(family.of_view.values())
    if not num_ids:
        if added is not None:
            yield (
                f"unet/config.json: addition_embed_type {added!r}: conditioning beyond the caption is not "
                "supported"
            )
        return
    if added != "text_time":
        yield f"unet/config.json: expected addition_embed_type 'text_time', got {added!r}"
        return
    pooled = [
        config.get("projection_dim", 512)
        for encoder, config in zip(family.text_encoders, text_encoders, strict=True)
        if encoder.pooled
    ]
    width, of_one = sum(pooled), unet.get("addition_time_embed_dim") or 0
    expected, got = width + num_ids * of_one, unet.get("projection_class_embeddings_input_dim")
    if got != expected:
        refiner = ", a refiner's UNet, not supported" if got == width + 5 * of_one else ""
        yield (
            f"unet/config.json: expected projection_class_embeddings_input_dim {expected}, {num_ids} numbers "
            f"of {of_one} and the projection's {width}, got {got}{refiner}"
        )


def _tokenizer_problems(directory: Path, folder: str, text_encoder: dict[str, Any]) -> Iterator[str]:
    limits = {**_DEFAULT_TEXT_CONFIG, **text_encoder}
    token_ids: list[int] = []
    for name in ("vocab.json", "added_tokens.json"):
        if (directory / name).exists():
            token_ids += read_config(directory / name).values()
    if token_ids and max(token_ids) >= limits["vocab_size"]:
        yield (
            f"{directory.name}: expected token ids below {limits['vocab_size']}, "
            f"the {folder.replace('_', ' ')}'s vocab_size, "
            f"got {max(token_ids)}"
        )
    if (directory / "tokenizer_config.json").exists():
        longest = read_config(directory / "tokenizer_config.json").get("model_max_length")
        if longest is None or longest > limits["max_position_embeddings"]:
            yield (
                f"{directory.name}/tokenizer_config.json: expected model_max_length up to the "
                f"{folder.replace('_', ' ')}'s "
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
