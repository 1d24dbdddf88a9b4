"""What a single safetensors file is, told from the names and shapes of its tensors; no tensor is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

from stages.lib.core.tensors import Header, read_header, tensor_names
from stages.lib.frame.errors import StageError

Kind = Literal["sd1", "sd2", "sdxl"]
UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP_L = "cond_stage_model.transformer."
OPENCLIP_H = "cond_stage_model.model."
XL_CLIP_L = "conditioner.embedders.0.transformer."
XL_OPENCLIP_G = "conditioner.embedders.1.model."
_XL_REFINER = "conditioner.embedders.0.model."
_FIRST_CONV = f"{UNET}input_blocks.0.0.weight"
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_TASKS = {5: "a depth-to-image model", 7: "an upscaler", 8: "an image editor (InstructPix2Pix)",
          9: "an inpainting model"}  # fmt: skip

Told = Callable[[frozenset[str]], bool]


def _part(*parts: str) -> Told:
    return lambda names: any(part in name for name in names for part in parts)


def _start(*starts: str) -> Told:
    return lambda names: any(name.startswith(starts) for name in names)


def _all_start(*starts: str) -> Told:
    return lambda names: all(name.startswith(starts) for name in names)


# The first that fits names the file.
_OTHERS: tuple[tuple[str, Told], ...] = (
    ("a LoRA, adapters without a base", _part(
        "lora_", ".lora", "hada_w", "lokr_", "oft_blocks", "processor.to_")),
    ("a ControlNet", _start("control_model.", "controlnet_cond_embedding.", "input_hint_block.")),
    ("a T2I-Adapter", _start("adapter.", "body.0.block")),
    ("an IP-Adapter", _start("image_proj.", "ip_adapter.")),
    ("a motion module (AnimateDiff)", _part("motion_modules.")),
    ("Stable Diffusion 3", _part("joint_blocks.")),
    ("Flux", _part("double_blocks.")),
    ("a Stable Cascade model", _part("clip_txt_mapper.", ".channelwise.")),
    ("a textual inversion embedding", lambda names: len(names) <= 2 and _start(
        "emb_params", "clip_l", "clip_g", "string_to_param", "<")(names)),
    ("an upscaler (ESRGAN)", _start("conv_first.", "RRDB_trunk.", "model.1.sub.", "body.0.rdb")),
    ("a UNet in diffusers layout; use its whole pipeline directory with source: directory",
     _start("down_blocks.0.", "unet.down_blocks.0.")),
    ("a T5 text encoder", _start("encoder.block.0.", "shared.")),
    ("a CLIP model", _start("vision_model.", "visual.")),
    ("a text encoder", _all_start("text_model.", "text_projection", "logit_scale", "encoder.layers.",
                                  "embeddings.", "final_layer_norm.", "cond_stage_model.")),
)  # fmt: skip


def open_single_file(path: Path) -> Header:
    """The header of a safetensors file.

    Raises:
        StageError: if there is none, it is pickled, cut short or no safetensors file.
    """
    if path.suffix.lower() in _PICKLES:
        raise StageError(
            f"{path}: expected a .safetensors file, got {path.suffix}: a pickle, which can run code when "
            "it is opened and is not read; take the .safetensors of the same model, or convert it elsewhere"
        )
    if not path.is_file():
        got = "a directory; use source: directory for it" if path.is_dir() else "nothing"
        raise StageError(f"{path}: expected a .safetensors file, got {got}")
    tensor_names(path)  # tells what is wrong with a damaged file
    with open(path, "rb") as file:
        return read_header(file)


def checkpoint_kind(path: Path, header: Header) -> Kind:
    """Which Stable Diffusion a checkpoint is.

    Raises:
        StageError: saying what the file is instead, or what it lacks.
    """
    names = frozenset(header.tensors)
    if _FIRST_CONV not in names:
        found = "a VAE; use vae_source: file for it" if is_vae(names) else _other(names)
        raise _refused(path, found)
    if _start("control_model.")(names):
        raise _refused(path, "a ControlNet with its base")
    in_channels = header.tensors[_FIRST_CONV].shape[1]
    if in_channels != 4:
        raise _refused(path, _TASKS.get(in_channels, f"a UNet of {in_channels} input channels"))
    if not _start(VAE)(names):
        raise _refused(path, "a checkpoint without its VAE (first_stage_model.*)")
    if _start(XL_OPENCLIP_G)(names):
        if not _start(XL_CLIP_L)(names):
            raise _refused(path, f"Stable Diffusion XL without its first text encoder ({XL_CLIP_L}*)")
        return "sdxl"
    if _start(_XL_REFINER)(names):
        raise _refused(path, "the Stable Diffusion XL refiner")
    has_label = f"{UNET}label_emb.0.0.weight" in names
    if _start(OPENCLIP_H)(names) or _start(CLIP_L)(names):
        if has_label:
            raise _refused(path, "a model conditioned beyond the caption (unCLIP or another)")
        return "sd2" if _start(OPENCLIP_H)(names) else "sd1"
    raise _refused(path, "a checkpoint without its text encoder (cond_stage_model.* or conditioner.*)")


def is_vae(names: frozenset[str]) -> bool:
    """Whether the file holds a VAE of Stable Diffusion, in the original layout or in that of diffusers."""
    return any(f"{prefix}decoder.conv_in.weight" in names for prefix in ("", VAE, "vae."))


def checked_vae(path: Path, header: Header) -> None:
    """Raise StageError, saying what the file is, if it holds no VAE."""
    names = frozenset(header.tensors)
    if not is_vae(names):
        found = "a UNet alone" if _FIRST_CONV in names else _other(names)
        raise _refused(path, found, "a VAE of Stable Diffusion")


def _other(names: frozenset[str]) -> str:
    known = next((name for name, told in _OTHERS if names and told(names)), None)
    return known or f"unknown tensors, e.g. {min(names, default='none at all')}"


def _refused(
    path: Path, found: str, expected: str = "a whole checkpoint of Stable Diffusion 1.x, 2.x or XL"
) -> StageError:
    return StageError(f"{path}: expected {expected}, got {found}; not supported; take another file")


def told_prediction_type(metadata: Mapping[str, str]) -> str | None:
    """``prediction_type`` as the metadata of a checkpoint has it, by the names of the ModelSpec standard."""
    text = metadata.get("modelspec.prediction_type") or metadata.get("modelspec.predict_key") or ""
    return {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}.get(text.lower())
