"""A whole diffusers directory with the trained UNet, and the scheduler to sample it with."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.lib.core.files import read_json, write_json
from stages.lib.core.sums import SUMS
from stages.lib.core.tensors import write_in_parts
from stages.lib.export.clip_keys import published_text_names
from stages.lib.export.components import base_tensors, trained_unet_config, trained_unet_tensors
from stages.lib.export.ldm_keys import current_vae_names
from stages.lib.frame.errors import StageError

if TYPE_CHECKING:
    import torch

_DTYPE_KEYS = ("dtype", "torch_dtype")


def write_pipeline(directory: Path, base: Path, unet: Path, dtype: torch.dtype) -> None:
    """Write a directory that ``DiffusionPipeline.from_pretrained`` loads without further arguments.

    Args:
        directory: to create.
        base: directory of the base model.
        unet: directory of the trained UNet.
        dtype: that weights are stored in. Without an argument all of them are loaded as float32.
    """
    index = read_json(base / "model_index.json", "run `dvc repro fetch_base`")
    scheduler = sampling_scheduler(unet)
    index["scheduler"] = ["diffusers", scheduler.get("_class_name", index["scheduler"][1])]
    directory.mkdir(parents=True)
    index = {name: value for name, value in index.items() if name == "_class_name" or name[0] != "_"}
    for name, value in sorted(index.items()):
        if not isinstance(value, list) or value[0] is None:
            continue
        place = directory / name
        place.mkdir()
        if name == "scheduler":
            write_json(place / "scheduler_config.json", scheduler)
        elif name.startswith("tokenizer"):
            for path in sorted((base / name).iterdir()):
                if path.name != SUMS and not path.name.startswith("."):
                    shutil.copyfile(path, place / path.name)
        else:
            _write_model(place, name, base, unet, dtype)
    write_json(directory / "model_index.json", index)


def sampling_scheduler(unet: Path) -> dict[str, Any]:
    """Config of the scheduler that samples what was trained, which training leaves beside the weights."""
    return read_json(unet / "scheduler_config.json", "run `dvc repro train`")


def is_rescaled(scheduler: Mapping[str, Any]) -> bool:
    """Whether the noise schedule ends in pure noise."""
    return bool(scheduler.get("rescale_betas_zero_snr", False))


def _write_model(place: Path, name: str, base: Path, unet: Path, dtype: torch.dtype) -> None:
    def tensors() -> Mapping[str, torch.Tensor]:
        if name == "unet":
            return trained_unet_tensors(base, unet)
        own = base_tensors(base, name)
        return published_text_names(own) if is_text else current_vae_names(own)

    is_text = name.startswith("text_encoder")
    if not is_text and name not in ("unet", "vae"):
        raise StageError(
            f"{base}/model_index.json: expected text encoders, a vae and a unet, got {name}; "
            "run `dvc repro fetch_base`"
        )
    config = trained_unet_config(base, unet) if name == "unet" else read_json(base / name / "config.json")
    config.pop("_name_or_path", None)
    if is_text:
        # transformers loads in the dtype that is written here, diffusers its models as float32.
        config = {key: value for key, value in config.items() if key not in _DTYPE_KEYS}
        config["torch_dtype"] = "float32"
    write_json(place / "config.json", config)
    stem = "model" if is_text else "diffusion_pytorch_model"
    write_in_parts(place / f"{stem}.safetensors", [tensors], dtype, lambda _: {})
