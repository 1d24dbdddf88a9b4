"""The base model on disk, ``data/base``: its layout, what makes it valid, its fingerprint, its loaders.

A diffusers pipeline directory of five components, safetensors only. Each loader imports what it
needs and nothing more, so that training loads neither the text encoder nor the VAE.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stages.lib.core.files import read_json, write_json
from stages.lib.core.sums import check_sums
from stages.lib.frame.errors import StageError

COMPONENTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
CLIP = "clip"  # what pictures are measured with; no part of the pipeline
CONFIG_FILES = {
    "text_encoder": "config.json",
    "vae": "config.json",
    "unet": "config.json",
    "scheduler": "scheduler_config.json",
}
WEIGHT_STEMS = {
    "text_encoder": "model",
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


def write_pipeline_index(base: Path, scheduler: list[str]) -> None:
    """Write ``model_index.json``: stock StableDiffusionPipeline loads ``base``, without a safety checker.

    Args:
        base: of the pipeline directory.
        scheduler: library and class that the base samples with, e.g. ``["diffusers", "PNDMScheduler"]``.
    """
    absent = [None, None]
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": absent,
        "image_encoder": absent,
        "requires_safety_checker": False,
        "safety_checker": absent,
        "scheduler": scheduler,
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(base / "model_index.json", index)


def check_component(base: Path, name: str) -> None:
    """Verify every file of a component, and that it is the one that fetch_base put there.

    Raises:
        StageError: naming what is missing, new or damaged.
    """
    check_sums(component_directory(base, name), "fetch_base")


def check_base(base: Path) -> None:
    """As `check_component`, of the whole base."""
    check_sums(base, "fetch_base")
    for name in (*COMPONENTS, CLIP):
        if name != CLIP or (base / CLIP).is_dir():  # whether it has to be there, the base's own hashes say
            check_component(base, name)


def component_directory(base: Path, name: str) -> Path:
    directory = Path(base) / name
    # Given a path that does not exist, from_pretrained would take it for a Hub id.
    if not directory.is_dir():
        raise StageError(f"{directory}: not found; run `dvc repro fetch_base`")
    return directory
