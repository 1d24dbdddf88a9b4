"""The base model on disk, ``data/base``: a diffusers pipeline directory, safetensors only, and its hashes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.lib.core.files import read_json, write_json
from stages.lib.core.sums import SUMS, check_sums, hash_file
from stages.lib.frame.errors import StageError
from stages.lib.models.families.chosen import FORCE_ZEROS, INDEX, family_of
from stages.lib.models.families.family import Family
from stages.lib.models.families.sd import SD

CLIP = "clip"  # what pictures are measured with; no part of the pipeline
CONFIG_FILES = {
    "text_encoder": "config.json",
    "text_encoder_2": "config.json",
    "vae": "config.json",
    "unet": "config.json",
    "scheduler": "scheduler_config.json",
}
WEIGHT_STEMS = {
    "text_encoder": "model",
    "text_encoder_2": "model",
    "vae": "diffusion_pytorch_model",
    "unet": "diffusion_pytorch_model",
}
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # the names that diffusers and peft look for
PEFT_WEIGHTS = "adapter_model.safetensors"
# What diffusers and transformers assume where a config leaves a key out.
_DEFAULT_LATENT_CHANNELS = 4
_DEFAULT_VAE_CONFIG = {
    "block_out_channels": [64],
    "latent_channels": _DEFAULT_LATENT_CHANNELS,
    "scaling_factor": 0.18215,
    "shift_factor": None,
}


def read_config(path: Path) -> dict[str, Any]:
    """A config of a component; StageError if it is absent or no JSON object."""
    return read_json(path)


def scaling_factor(vae_config: dict[str, Any]) -> float:
    """Of a VAE's config; the configs of SD 1.x and 2.x leave it out."""
    return float({**_DEFAULT_VAE_CONFIG, **vae_config}["scaling_factor"])


def read_vae_config(base: Path) -> dict[str, Any]:
    """The VAE's config, with what `AutoencoderKL` assumes where it leaves a key out; no weights are read."""
    return {**_DEFAULT_VAE_CONFIG, **read_config(component_directory(base, "vae") / CONFIG_FILES["vae"])}


def downsampling(vae_config: dict[str, Any]) -> int:
    """Pixels a latent, along each side."""
    return 2 ** (len(vae_config["block_out_channels"]) - 1)


def write_pipeline_index(
    base: Path, scheduler: list[str], family: Family = SD, force_zeros: bool | None = None
) -> None:
    """Write ``model_index.json``: the family's stock pipeline loads ``base``, without a safety checker.

    Args:
        base: of the pipeline directory.
        scheduler: library and class that the base samples with, e.g. ``["diffusers", "PNDMScheduler"]``.
        family: of the base. Of components that not every family has the hashes are written too, in keys that
            pipelines pass over: a stage that depends on this file depends on them, there or not.
        force_zeros: whether no caption is zeros, where the family asks; None takes diffusers' default.
    """
    absent = [None, None]
    index: dict[str, Any] = {
        "_class_name": family.pipeline,
        "feature_extractor": absent,
        "image_encoder": absent,
        "scheduler": scheduler,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    for encoder in family.text_encoders:
        index[encoder.folder] = ["transformers", encoder.class_name]
        index[encoder.tokenizer] = ["transformers", "CLIPTokenizer"]
    if family.follows_force_zeros:
        index[FORCE_ZEROS] = force_zeros is None or force_zeros
    else:
        index |= {"requires_safety_checker": False, "safety_checker": absent}
    for component in sorted(set(family.components) - set(SD.components)):
        index[f"_{component}_sha256"] = hash_file(base / component / SUMS)
    write_json(base / INDEX, dict(sorted(index.items())))


def check_component(base: Path, name: str) -> None:
    """Verify every file of a component, and that it is the one that fetch_base put there.

    Raises:
        StageError: naming what is missing, new or damaged.
    """
    check_sums(component_directory(base, name), "fetch_base")


def check_base(base: Path) -> None:
    """As `check_component`, of the whole base."""
    check_sums(base, "fetch_base")
    for name in family_of(base).components:
        check_component(base, name)
    if (base / CLIP).is_dir():  # whether it has to be there, the base's own hashes say
        check_component(base, CLIP)


def has_adapters(directory: Path) -> bool:
    """Whether a directory of weights holds adapters in the UNet's place."""
    return any((directory / name).exists() for name in (LORA_WEIGHTS, PEFT_WEIGHTS))


def component_directory(base: Path, name: str) -> Path:
    directory = Path(base) / name
    # Given a path that does not exist, from_pretrained would take it for a Hub id.
    if not directory.is_dir():
        raise StageError(f"{directory}: not found; run `dvc repro fetch_base`")
    return directory
