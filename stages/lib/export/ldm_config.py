"""The .yaml that A1111 reads beside a single file, where the weights do not tell how they are sampled.

It takes SD 1.x to predict noise, and guesses of SD 2.x. Classes and keys are those of the LDM repository.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from stages.lib.frame.errors import StageError

_CLIP = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
_OPEN_CLIP = {
    "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
    "params": {"freeze": True, "layer": "penultimate"},
}


def ldm_config(
    unet: Mapping[str, Any],
    vae: Mapping[str, Any],
    scheduler: Mapping[str, Any],
    is_sd2: bool,
    predicts_v: bool,
) -> str:
    """The text of the .yaml.

    Args:
        unet, vae, scheduler: their configs, of diffusers; of the VAE with ``scaling_factor``.
        is_sd2: whether the text encoder came from OpenCLIP.
        predicts_v: whether the UNet predicts velocity.

    Raises:
        StageError: if the UNet's or the VAE's widths are no multiples of their first.
    """
    params = {
        "linear_start": scheduler.get("beta_start", 0.0001),
        "linear_end": scheduler.get("beta_end", 0.02),
        "timesteps": scheduler.get("num_train_timesteps", 1000),
        **({"parameterization": "v"} if predicts_v else {}),
        "num_timesteps_cond": 1,
        "first_stage_key": "jpg",
        "cond_stage_key": "txt",
        "image_size": unet["sample_size"],
        "channels": unet["in_channels"],
        "cond_stage_trainable": False,
        "conditioning_key": "crossattn",
        "monitor": "val/loss_simple_ema",
        "scale_factor": vae["scaling_factor"],
        "use_ema": False,
        "unet_config": _unet(unet),
        "first_stage_config": _vae(vae),
        "cond_stage_config": _OPEN_CLIP if is_sd2 else _CLIP,
    }
    document = {"model": {"target": "ldm.models.diffusion.ddpm.LatentDiffusion", "params": params}}
    return yaml.safe_dump(document, sort_keys=False)


def _unet(config: Mapping[str, Any]) -> dict[str, Any]:
    widths, heads = config["block_out_channels"], config["attention_head_dim"]
    # diffusers calls the number of heads so, and gives one for each block where heads have one width.
    split = {"num_heads": heads} if isinstance(heads, int) else {"num_head_channels": widths[0] // heads[0]}
    with_attention = [
        2**level for level, kind in enumerate(config["down_block_types"]) if kind.startswith("CrossAttn")
    ]
    params = {
        "image_size": 32,  # not used
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": widths[0],
        "attention_resolutions": with_attention[::-1],
        "num_res_blocks": config["layers_per_block"],
        "channel_mult": _multiples(widths, "UNet"),
        **split,
        "use_spatial_transformer": True,
        "use_linear_in_transformer": bool(config.get("use_linear_projection", False)),
        "transformer_depth": 1,
        "context_dim": config["cross_attention_dim"],
        "use_checkpoint": False,
        "legacy": False,
    }
    return {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": params}


def _vae(config: Mapping[str, Any]) -> dict[str, Any]:
    widths = config["block_out_channels"]
    layers = {
        "double_z": True,
        "z_channels": config["latent_channels"],
        "resolution": config["sample_size"],
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": widths[0],
        "ch_mult": _multiples(widths, "VAE"),
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    params = {
        "embed_dim": config["latent_channels"],
        "monitor": "val/rec_loss",
        "ddconfig": layers,
        "lossconfig": {"target": "torch.nn.Identity"},
    }
    return {"target": "ldm.models.autoencoder.AutoencoderKL", "params": params}


def _multiples(widths: list[int], model: str) -> list[int]:
    if any(width % widths[0] for width in widths):
        raise StageError(
            f"export.formats: single_file: expected a {model} whose widths are multiples of {widths[0]}, got "
            f"{widths}, for which the original layout has no config; leave single_file out, and take pipeline"
        )
    return [width // widths[0] for width in widths]
