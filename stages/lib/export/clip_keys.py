"""Names of a text encoder's tensors: as transformers has published them, and in the original repositories.

SD 1.x, and the first encoder of SDXL, keep transformers' CLIP under a prefix. SD 2.x, and the second of SDXL,
keep OpenCLIP: queries, keys and values are one tensor, and the projection is transposed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from stages.lib.frame.errors import StageError, some
from stages.lib.models.published_names import PREFIX, published_name

if TYPE_CHECKING:
    import torch

SD_PREFIX = "cond_stage_model."
SDXL_PREFIXES = ("conditioner.embedders.0.", "conditioner.embedders.1.")
_POSITION_IDS = f"{PREFIX}embeddings.position_ids"  # no weight, but the numbers from 0 to 76
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_LAYER = re.compile(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_FUSED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")


def published_text_names(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a text encoder under the names that every published file has them."""
    named = {published_name(name): tensor for name, tensor in tensors.items()}
    return {name: tensor for name, tensor in named.items() if name != _POSITION_IDS}


def is_open_clip(config: Mapping[str, object]) -> bool:
    """Whether a text encoder came from OpenCLIP: OpenAI's CLIP has an activation of its own."""
    return config.get("hidden_act", "quick_gelu") != "quick_gelu"


def clip_tensors(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """A CLIP of transformers in the original layout: ``<prefix>transformer.text_model.*``."""
    return {f"{prefix}transformer.{name}": tensor for name, tensor in published_text_names(tensors).items()}


def open_clip_tensors(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """OpenCLIP's own layout, ``<prefix>model.*``; the identity stands for a projection that there is not.

    Args:
        tensors: of a CLIPTextModel, or of one with a projection, named as transformers does.
        prefix: of the encoder in the file.

    Raises:
        StageError: naming tensors that OpenCLIP has no place for.
    """
    import torch

    found: dict[str, torch.Tensor] = {}
    fused: dict[str, dict[str, torch.Tensor]] = {}  # in_proj -> part -> tensor
    lost = []
    for published, tensor in published_text_names(tensors).items():
        name = published.removeprefix(PREFIX)
        layer = _LAYER.fullmatch(name)
        if name in _OPEN_CLIP:
            found[_OPEN_CLIP[name]] = tensor
        elif name == "text_projection.weight":
            found["text_projection"] = tensor.T
        elif layer and layer[2] in _FUSED:
            fused.setdefault(f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}", {})[layer[2]] = (
                tensor
            )
        elif layer and layer[2] in _OPEN_CLIP_LAYER:
            found[f"transformer.resblocks.{layer[1]}.{_OPEN_CLIP_LAYER[layer[2]]}.{layer[3]}"] = tensor
        else:
            lost.append(published)
    found |= {name: torch.cat([parts[each] for each in _FUSED]) for name, parts in fused.items()}
    if lost:
        raise StageError(
            f"export.formats: single_file: expected a text encoder of OpenCLIP, got one with {some(lost)}; "
            "leave single_file out, and take pipeline"
        )
    # SD 2's published files have a projection, which its CLIPTextModel has not, and nothing computes with.
    # Earlier releases of diffusers take the encoder's width from its shape.
    like = found["ln_final.weight"]
    found.setdefault("text_projection", torch.eye(len(like), dtype=like.dtype))
    return {f"{prefix}model.{name}": tensor for name, tensor in found.items()}
