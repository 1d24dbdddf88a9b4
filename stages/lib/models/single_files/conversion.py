"""A checkpoint in the original layout as a diffusers directory: with diffusers' own code, bytes unchanged.

Tensors keep their dtype. One component is held at a time, and no network is asked.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.lib.core.files import fresh_directory, write_json, write_text
from stages.lib.core.tensors import Header
from stages.lib.frame.errors import StageError
from stages.lib.models.layout import CONFIG_FILES, read_config
from stages.lib.models.published_names import published_name
from stages.lib.models.single_files import configs
from stages.lib.models.single_files.kinds import (
    CLIP_L,
    OPENCLIP_H,
    UNET,
    VAE,
    XL_CLIP_L,
    XL_OPENCLIP_G,
    Kind,
    checked_vae,
    checkpoint_kind,
    open_single_file,
    told_prediction_type,
)

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

logger = logging.getLogger(__name__)
_PREFIXES = {
    "sd1": {"text_encoder": CLIP_L},
    "sd2": {"text_encoder": OPENCLIP_H},
    "sdxl": {"text_encoder": XL_CLIP_L, "text_encoder_2": XL_OPENCLIP_G},
}
_FILES = {"unet": "diffusion_pytorch_model.safetensors", "vae": "diffusion_pytorch_model.safetensors"}
_PREDICTS_V, _ZERO_SNR = "v_pred", "ztsnr"  # empty tensors of checkpoints that are sampled so
# Buffers of older libraries, and what a text encoder of SD 1.x and 2.x computes nothing with.
_UNUSED = ("position_ids", "logit_scale", "text_projection.weight")
_DEPRECATED_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def convert_checkpoint(path: Path, tokenizer: Path, prediction_type: str | None, target: Path) -> Kind:
    """Write ``target``, a pipeline directory with all that is in the file and the published configs.

    Args:
        path: of the checkpoint.
        tokenizer: directory with CLIP's vocabulary, as vocab.json and merges.txt or as tokenizer.json.
        prediction_type: ``epsilon`` or ``v_prediction``; None takes what the file tells.
        target: is emptied first.

    Raises:
        StageError: if the file is something else, does not tell what it predicts, or lacks tensors.
    """
    header = open_single_file(path)
    kind = checkpoint_kind(path, header)
    found = configs.published_configs(kind, _prediction_type(path, header, kind, prediction_type))
    if _ZERO_SNR in header.tensors:
        found["scheduler"]["rescale_betas_zero_snr"] = True
    fresh_directory(target)
    _write_tokenizers(kind, tokenizer, found, target)
    for component, config in found.items():
        write_json(target / component / CONFIG_FILES.get(component, "config.json"), config)
    for component, prefix in ({"unet": UNET, "vae": VAE} | _PREFIXES[kind]).items():
        convert = {"unet": _unet, "vae": _vae}.get(component, _text_encoder)
        tensors = convert(_read(path, header, prefix), found[component])
        _write(path, target / component, component, found[component], tensors)
    write_json(target / "model_index.json", configs.pipeline_index(kind, found["scheduler"]["_class_name"]))
    return kind


def convert_vae(path: Path, config: Mapping[str, Any], target: Path) -> None:
    """Write ``target``, an AutoencoderKL directory, from a file with a VAE in either layout.

    Args:
        path: of a VAE, or of a checkpoint with one.
        config: of the base's own VAE: a VAE that fits its UNet has that form and scale.
        target: is emptied first.

    Raises:
        StageError: if the file holds no VAE, or one of another form.
    """
    header = open_single_file(path)
    checked_vae(path, header)
    prefix = next((each for each in (VAE, "vae.") if f"{each}decoder.conv_in.weight" in header.tensors), "")
    tensors = _read(path, header, prefix)
    names = {name.removeprefix(prefix): name for name in tensors}
    if any(name.startswith("decoder.up_blocks.") for name in names):
        tensors = {_current_attention(name): tensors[stored] for name, stored in names.items()}
    else:
        tensors = _vae(tensors, config)
    fresh_directory(target)
    write_json(target / "config.json", dict(config))
    _write(path, target, "vae", config, tensors)


def _prediction_type(path: Path, header: Header, kind: Kind, given: str | None) -> str:
    told = "v_prediction" if _PREDICTS_V in header.tensors else told_prediction_type(header.metadata)
    if given and told and given != told:
        logger.warning("%s: prediction_type %s is used; its metadata tell %s", path, given, told)
    if found := given or told:
        return found
    if kind == "sd2":
        raise StageError(
            f"{path}: Stable Diffusion 2.x, which predicts noise or velocity, and the file does not tell; "
            "set fetch_base.prediction_type to v_prediction (2.0 and 2.1 for 768 pixels) or to epsilon "
            "(the `base` ones for 512 pixels)"
        )
    return "epsilon"


def _read(path: Path, header: Header, prefix: str) -> Tensors:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in sorted(header.tensors) if name.startswith(prefix)}


def _unet(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    return dict(convert_ldm_unet_checkpoint(tensors, config))


def _vae(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    return dict(convert_ldm_vae_checkpoint(tensors, config))


def _text_encoder(tensors: Tensors, config: Mapping[str, Any]) -> Tensors:
    from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_open_clip_checkpoint

    first = min(tensors)
    if first.startswith((CLIP_L, XL_CLIP_L)):
        converted = convert_ldm_clip_checkpoint(tensors)
    else:
        prefix = OPENCLIP_H if first.startswith(OPENCLIP_H) else XL_OPENCLIP_G
        converted = convert_open_clip_checkpoint(_empty("text_encoder", config), tensors, prefix=prefix)
    return {published_name(name): tensor for name, tensor in converted.items()}


def _empty(component: str, config: Mapping[str, Any]) -> torch.nn.Module:
    """The model of a config, without memory for its weights."""
    import torch

    with torch.device("meta"):
        if component == "unet":
            from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

            return UNet2DConditionModel.from_config(dict(config))
        if component == "vae":
            from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

            return AutoencoderKL.from_config(dict(config))
        import transformers

        (name,) = config["architectures"]
        return getattr(transformers, name)(transformers.CLIPTextConfig(**config))


def _write(path: Path, target: Path, component: str, config: Mapping[str, Any], tensors: Tensors) -> None:
    """Write what the model of ``config`` has; StageError if something is missing or of another shape."""
    from safetensors.torch import save_file

    expected = {
        published_name(name) if component.startswith("text_encoder") else name: tuple(tensor.shape)
        for name, tensor in _empty(component, config).state_dict().items()
        if not name.endswith("position_ids")
    }
    found = {name: tensors[name] for name in sorted(expected) if tensors.get(name) is not None}
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [
        f"{name} is {tuple(tensor.shape)} and not {expected[name]}"
        for name, tensor in found.items()
        if tuple(tensor.shape) != expected[name]
    ]
    if problems:
        raise StageError(
            f"{path}: expected the {component} of a published model, got another: {len(problems)} tensor(s) "
            f"differ, e.g. {problems[0]}; not supported; take another file"
        )
    if left := sorted(name for name in tensors.keys() - found.keys() if not name.endswith(_UNUSED)):
        logger.warning("%s: %d tensors of no use in the %s, e.g. %s", path, len(left), component, left[0])
    whole = {name: tensor.contiguous() for name, tensor in found.items()}
    save_file(whole, target / _FILES.get(component, "model.safetensors"), {"format": "pt"})


def _current_attention(name: str) -> str:
    if ".attentions." in name:
        for old, new in _DEPRECATED_ATTENTION.items():
            name = name.replace(f".{old}.", f".{new}.")
    return name


def _write_tokenizers(kind: Kind, source: Path, found: Mapping[str, Any], target: Path) -> None:
    vocabulary, merges = read_vocabulary(source)
    size = found["text_encoder"]["vocab_size"]
    if len(vocabulary) != size or sorted(vocabulary.values()) != list(range(size)):
        raise StageError(
            f"{source}: expected CLIP's vocabulary of {size} tokens, got one of {len(vocabulary)}; name "
            "a CLIP of the same vocabulary in clip_source, e.g. openai/clip-vit-large-patch14"
        )
    start, end = "<|startoftext|>", "<|endoftext|>"
    for folder, pad in configs.pad_tokens(kind).items():
        tokens = {"bos_token": start, "eos_token": end, "pad_token": pad, "unk_token": end}
        write_json(target / folder / "vocab.json", vocabulary)
        write_text(target / folder / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
        write_json(target / folder / "special_tokens_map.json", tokens)
        write_json(
            target / folder / "tokenizer_config.json",
            {**tokens, "add_prefix_space": False, "do_lower_case": True, "errors": "replace",
             "model_max_length": 77, "tokenizer_class": "CLIPTokenizer"},
        )  # fmt: skip


def read_vocabulary(directory: Path) -> tuple[dict[str, int], list[str]]:
    """Token -> id, and the merges in their order, "left right" each.

    Raises:
        StageError: if the directory holds no vocabulary.
    """
    if (directory / "vocab.json").exists() and (directory / "merges.txt").exists():
        lines = (directory / "merges.txt").read_text(encoding="utf-8").split("\n")
        start = 1 if lines[0].startswith("#version") else 0
        return read_config(directory / "vocab.json"), [line for line in lines[start:] if line]
    model = read_config(directory / "tokenizer.json").get("model", {})
    try:
        merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
        return dict(model["vocab"]), merges
    except (KeyError, TypeError, ValueError, json.JSONDecodeError) as error:
        raise StageError(
            f"{directory / 'tokenizer.json'}: expected a vocabulary with merges, got {error!r}; "
            "take another CLIP directory"
        ) from error
