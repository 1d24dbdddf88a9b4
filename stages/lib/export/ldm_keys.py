"""Names of the UNet's and the VAE's tensors in the original repositories (LDM, and SGM of SDXL).

The inverse of what `from_single_file` of diffusers does. There blocks are counted through: a block's resnets,
each with its attention, and then its sampler.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from stages.lib.frame.errors import StageError, some

if TYPE_CHECKING:
    import torch

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_DEPRECATED_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_UNET_BLOCK = re.compile(
    r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)\.(weight|bias)"
)
_UNET_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)\.(weight|bias)")
_VAE_BLOCK = re.compile(
    r"(encoder|decoder)\.(?:down|up)_blocks\.(\d+)\.(resnets|downsamplers|upsamplers)\.(\d+)\.(.+)\.(weight|bias)"
)
_VAE_MIDDLE = re.compile(r"(encoder|decoder)\.mid_block\.(resnets|attentions)\.(\d+)\.(.+)\.(weight|bias)")


def unet_names(names: Iterable[str], layers_per_block: int) -> dict[str, str]:
    """Name in diffusers -> name in the original layout, with its prefix.

    Args:
        names: of all tensors of the UNet.
        layers_per_block: of its config.

    Raises:
        StageError: naming tensors that the original layout has no place for.
    """
    given = set(names)
    found = {name: _unet_name(name, given, layers_per_block) for name in given}
    _check_placed("UNet", found)
    return {name: f"{UNET_PREFIX}{ldm}" for name, ldm in found.items()}


def vae_tensors(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The VAE's tensors under their original names; its attention is of 1 x 1 convolutions there.

    Args:
        tensors: named as in diffusers, of today or of 2022.

    Raises:
        StageError: as `unet_names`.
    """
    current = current_vae_names(tensors)
    num_blocks = 1 + max(
        (int(match[2]) for name in current if (match := _VAE_BLOCK.fullmatch(name))), default=0
    )
    found = {name: _vae_name(name, num_blocks) for name in current}
    _check_placed("VAE", found)
    return {
        f"{VAE_PREFIX}{found[name]}": tensor[:, :, None, None]
        if ".attentions." in name and tensor.ndim == 2
        else tensor
        for name, tensor in current.items()
    }


def current_vae_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A VAE's tensors under the names that diffusers gives them today."""
    found = {}
    for name, tensor in tensors.items():
        if ".attentions." in name:
            place, last, kind = name.rsplit(".", 2)
            name = f"{place}.{_DEPRECATED_ATTENTION.get(last, last)}.{kind}"
            if last in _DEPRECATED_ATTENTION and tensor.ndim > 2:
                tensor = tensor.flatten(1)
        found[name] = tensor
    return found


def _unet_name(name: str, names: set[str], layers_per_block: int) -> str:
    """Without prefix; empty where the layout has no place."""
    place, _, kind = name.rpartition(".")
    if place in _UNET_ENDS:
        return f"{_UNET_ENDS[place]}.{kind}"
    if match := _UNET_MIDDLE.fullmatch(name):
        part, index, rest, kind = match.groups()
        if part == "attentions":
            return f"middle_block.{2 * int(index) + 1}.{rest}.{kind}"
        return f"middle_block.{2 * int(index)}.{_UNET_RESNET[rest]}.{kind}" if rest in _UNET_RESNET else ""
    if (match := _UNET_BLOCK.fullmatch(name)) is None:
        return ""
    side, block, part, index, rest, kind = match.groups()
    first = int(block) * (layers_per_block + 1)
    if part == "downsamplers":
        return f"input_blocks.{1 + first + layers_per_block}.0.op.{kind}"
    if part == "upsamplers":
        has_attention = any(each.startswith(f"up_blocks.{block}.attentions.") for each in names)
        return f"output_blocks.{first + layers_per_block}.{2 if has_attention else 1}.conv.{kind}"
    blocks = (
        f"input_blocks.{1 + first + int(index)}" if side == "down" else f"output_blocks.{first + int(index)}"
    )
    if part == "attentions":
        return f"{blocks}.1.{rest}.{kind}"
    return f"{blocks}.0.{_UNET_RESNET[rest]}.{kind}" if rest in _UNET_RESNET else ""


def _vae_name(name: str, num_blocks: int) -> str:
    if match := _VAE_MIDDLE.fullmatch(name):
        coder, part, index, rest, kind = match.groups()
        if part == "attentions":
            return (
                f"{coder}.mid.attn_{int(index) + 1}.{_VAE_ATTENTION[rest]}.{kind}"
                if rest in _VAE_ATTENTION
                else ""
            )
        return f"{coder}.mid.block_{int(index) + 1}.{_vae_resnet(rest)}.{kind}"
    if match := _VAE_BLOCK.fullmatch(name):
        coder, block, part, index, rest, kind = match.groups()
        place = f"encoder.down.{block}" if coder == "encoder" else f"decoder.up.{num_blocks - 1 - int(block)}"
        if part == "resnets":
            return f"{place}.block.{index}.{_vae_resnet(rest)}.{kind}"
        return f"{place}.{'downsample' if coder == 'encoder' else 'upsample'}.conv.{kind}"
    place, _, kind = name.rpartition(".")
    ends = ("encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out")
    if place in (*ends, "quant_conv", "post_quant_conv"):
        return name
    if place in ("encoder.conv_norm_out", "decoder.conv_norm_out"):
        return f"{place.replace('conv_norm_out', 'norm_out')}.{kind}"
    return ""


def _vae_resnet(rest: str) -> str:
    return "nin_shortcut" if rest == "conv_shortcut" else rest


def _check_placed(model: str, found: Mapping[str, str]) -> None:
    if lost := sorted(name for name, ldm in found.items() if not ldm):
        raise StageError(
            f"export.formats: single_file: expected a {model} of Stable Diffusion, got one with "
            f"{some(lost)}, which the original layout has no place for; leave single_file out, and take "
            "pipeline"
        )
