"""One file with all weights in the original layout, as A1111, ComfyUI and Forge load it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.lib.core.files import read_json, write_text
from stages.lib.core.tensors import write_in_parts
from stages.lib.export.clip_keys import (
    SD_PREFIX,
    SDXL_PREFIXES,
    clip_tensors,
    is_open_clip,
    open_clip_tensors,
)
from stages.lib.export.components import base_tensors, trained_unet_config, trained_unet_tensors
from stages.lib.export.ldm_config import ldm_config
from stages.lib.export.ldm_keys import unet_names, vae_tensors
from stages.lib.export.modelspec import Kind
from stages.lib.export.whole_pipeline import is_rescaled, sampling_scheduler
from stages.lib.frame.errors import StageError
from stages.lib.models.layout import read_vae_config

if TYPE_CHECKING:
    import torch

Part = Callable[[], Mapping[str, "torch.Tensor"]]
Metadata = Callable[[str], Mapping[str, str]]
_SECOND_ENCODER = "text_encoder_2"
_PREDICTS_V, _ZERO_SNR = "v_pred", "ztsnr"  # empty tensors, by which ComfyUI and Forge know


def kind_of(base: Path, unet: Path, resolution: tuple[int, int]) -> Kind:
    """What kind of model a base with a trained UNet is."""
    scheduler = sampling_scheduler(unet)
    is_sdxl = (base / _SECOND_ENCODER).is_dir()
    return Kind(
        is_sdxl=is_sdxl,
        is_sd2=not is_sdxl and is_open_clip(read_json(base / "text_encoder" / "config.json")),
        predicts_v=scheduler.get("prediction_type") == "v_prediction",
        rescaled=is_rescaled(scheduler),
        resolution=resolution,
    )


def write_single_file(
    path: Path, base: Path, unet: Path, kind: Kind, dtype: torch.dtype, metadata: Metadata
) -> None:
    """Write the file, and a .yaml beside it where A1111 needs one.

    Args:
        path: of the file.
        base: directory of the base model.
        unet: directory of the trained UNet.
        kind: of `kind_of`.
        dtype: of the weights.
        metadata: from the SHA-256 of all that follows the header.

    Raises:
        StageError: if the original layout has no place for the model.
    """
    config = trained_unet_config(base, unet)
    parts: list[Part] = [
        *text_parts(base, kind),
        lambda: vae_tensors(base_tensors(base, "vae")),
        lambda: _unet(base, unet, config),
        functools.partial(markers, kind),
    ]
    write_in_parts(path, parts, dtype, metadata)
    if kind.predicts_v and not kind.is_sdxl:
        vae = {"in_channels": 3, "out_channels": 3, "layers_per_block": 1, "sample_size": 512}
        vae |= read_vae_config(base)
        text = ldm_config(config, vae, sampling_scheduler(unet), kind.is_sd2, kind.predicts_v)
        write_text(path.with_suffix(".yaml"), text)


def check_prediction(scheduler: Mapping[str, Any]) -> None:
    """Raise StageError if the UNet predicts neither noise nor velocity."""
    prediction = scheduler.get("prediction_type", "epsilon")
    if prediction not in ("epsilon", "v_prediction"):
        raise StageError(
            "params.yaml: export.formats: single_file: expected a UNet that predicts epsilon "
            f"or v_prediction, got {prediction}, which no reader of single files knows; leave single_file "
            "out, and take pipeline"
        )


def text_parts(base: Path, kind: Kind) -> list[Part]:
    """The text encoders, one after the other."""

    def clip(prefix: str) -> Mapping[str, torch.Tensor]:
        return clip_tensors(base_tensors(base, "text_encoder"), prefix)

    def open_clip(component: str, prefix: str) -> Mapping[str, torch.Tensor]:
        return open_clip_tensors(base_tensors(base, component), prefix)

    if kind.is_sdxl:
        first, second = SDXL_PREFIXES
        return [functools.partial(clip, first), functools.partial(open_clip, _SECOND_ENCODER, second)]
    if kind.is_sd2:
        return [functools.partial(open_clip, "text_encoder", SD_PREFIX)]
    return [functools.partial(clip, SD_PREFIX)]


def markers(kind: Kind) -> dict[str, torch.Tensor]:
    """Empty tensors whose names tell how the model is sampled."""
    import torch

    names = [name for name, is_set in ((_PREDICTS_V, kind.predicts_v), (_ZERO_SNR, kind.rescaled)) if is_set]
    return {name: torch.empty(0) for name in names}


def _unet(base: Path, unet: Path, config: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    tensors = trained_unet_tensors(base, unet)
    names = unet_names(tensors, config["layers_per_block"])
    return {names[name]: tensor for name, tensor in tensors.items()}
