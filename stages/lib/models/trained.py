"""A trained UNet from its directory: whole as it lies there, or the base's with adapters added to it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stages.lib.frame.errors import StageError
from stages.lib.models.adapter_files import AdapterState, read_adapters
from stages.lib.models.adapters import NAME, merge
from stages.lib.models.layout import has_adapters
from stages.lib.models.loaders import load_unet, load_unet_in
from stages.lib.models.weights import component_fingerprint

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


def load_trained_unet(base: Path, directory: Path) -> UNet2DConditionModel:
    """The UNet that training has left in ``directory``. CPU, float32, eval mode, no adapters in it.

    Args:
        base: directory of the base model.
        directory: with a whole UNet, e.g. ``data/unet`` or ``data/base/unet``, or with adapters alone.

    Raises:
        StageError: if a part is missing or damaged, or the adapters belong to another base.
    """
    if not has_adapters(directory):
        return load_unet_in(directory)
    state = read_adapters(directory)
    check_base_of(state, base, directory)
    unet = load_unet(base)
    for parameter in unet.parameters():  # as loaded, weights are pages of their file
        parameter.data = parameter.data.clone()
    put_adapters(unet, state, directory)
    merge(unet)
    return unet.eval()


def check_base_of(state: AdapterState, base: Path, directory: Path) -> None:
    """Raise StageError if adapters were trained on another UNet than the base's."""
    expected, found = component_fingerprint(base / "unet"), state.lineage.get("base_unet", "")
    if found != expected:
        raise StageError(
            f"{directory}: expected adapters of {base}/unet ({expected[:12]}), "
            f"got those of another UNet ({found[:12] or 'unknown'}); run `dvc repro train`, "
            "or bring back the base that they were trained on"
        )


def put_adapters(unet: UNet2DConditionModel, state: AdapterState, directory: Path) -> None:
    """Give a UNet adapters with their weights, in place.

    Raises:
        StageError: naming ``directory``, if they do not fit the UNet or peft is not installed.
    """
    try:
        from peft import inject_adapter_in_model, set_peft_model_state_dict
    except ImportError as error:
        raise StageError(
            f"{directory}: holds adapters, which need the package peft, and that is not installed; "
            'run `pip install -e ".[lora]"`'
        ) from error
    try:
        with torch.random.fork_rng(devices=[]):
            inject_adapter_in_model(state.config, unet, NAME)
        result: Any = set_peft_model_state_dict(unet, dict(state.tensors), NAME)
        own = [name for name, _ in unet.named_parameters() if f".{NAME}" in name]
        amiss = sorted({*result.unexpected_keys, *(set(own) & set(result.missing_keys))})
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise StageError(
            f"{directory}: expected adapters that fit the base's UNet, got: {error}; run `dvc repro train`"
        ) from error
    if amiss:
        raise StageError(
            f"{directory}: expected the tensors of its adapters and no others, got {len(amiss)} missing or "
            f"unknown, e.g. {amiss[0]}; run `dvc repro train`"
        )
