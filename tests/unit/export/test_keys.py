"""Names in the original layout: diffusers' own converters lead back to every tensor, bit for bit."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from stages.lib.export.clip_keys import (
    SDXL_PREFIXES,
    clip_tensors,
    is_open_clip,
    open_clip_tensors,
    published_text_names,
)
from stages.lib.export.ldm_keys import UNET_PREFIX, current_vae_names, unet_names, vae_tensors
from stages.lib.frame.errors import StageError

SD = {
    "block_out_channels": [8, 16, 16, 16],
    "cross_attention_dim": 16,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "norm_num_groups": 4,
    "layers_per_block": 2,
    "attention_head_dim": 2,
}
SDXL = {
    "block_out_channels": [8, 16, 16],
    "cross_attention_dim": 16,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 3],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 40,
    "use_linear_projection": True,
    "norm_num_groups": 4,
    "layers_per_block": 2,
    "attention_head_dim": 2,
}
TEXT = {
    "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3,
    "vocab_size": 99, "projection_dim": 12, "max_position_embeddings": 77,
    "eos_token_id": 98, "bos_token_id": 97,
}  # fmt: skip


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


@pytest.mark.parametrize(
    ("config", "some_names"),
    [
        (
            SD,
            {
                "down_blocks.0.downsamplers.0.conv.weight": "input_blocks.3.0.op.weight",
                "up_blocks.0.upsamplers.0.conv.bias": "output_blocks.2.1.conv.bias",
                "up_blocks.1.upsamplers.0.conv.bias": "output_blocks.5.2.conv.bias",
                "mid_block.resnets.1.time_emb_proj.weight": "middle_block.2.emb_layers.1.weight",
                "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias": (
                    "output_blocks.11.1.transformer_blocks.0.norm1.bias"  # which ComfyUI looks at
                ),
            },
        ),
        (
            SDXL,
            {
                "add_embedding.linear_1.weight": "label_emb.0.0.weight",  # A1111 and diffusers look at it
                "mid_block.attentions.0.transformer_blocks.2.attn2.to_k.weight": (
                    "middle_block.1.transformer_blocks.2.attn2.to_k.weight"
                ),
            },
        ),
    ],
    ids=["sd", "sdxl"],
)
def test_a_unet_returns_through_diffusers_converter(
    config: dict[str, Any], some_names: dict[str, str]
) -> None:
    unet = UNet2DConditionModel.from_config(config)
    tensors = unet.state_dict()
    names = unet_names(tensors, 2)
    assert len(set(names.values())) == len(tensors)
    for name, ldm in some_names.items():
        assert names[name] == f"{UNET_PREFIX}{ldm}"
    original = {names[name]: tensor for name, tensor in tensors.items()}
    assert equal(convert_ldm_unet_checkpoint(original, dict(unet.config)), tensors)


def test_a_tensor_without_a_place_is_named() -> None:
    with pytest.raises(StageError, match=r"got one with class_embedding\.weight"):
        unet_names(["conv_in.weight", "class_embedding.weight"], 2)


@pytest.mark.parametrize("deprecated", [False, True])
def test_a_vae_returns_through_diffusers_converter(deprecated: bool) -> None:
    vae = AutoencoderKL(
        block_out_channels=(8, 16, 16), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, norm_num_groups=4, layers_per_block=2,
    )  # fmt: skip
    tensors = vae.state_dict()
    given = dict(tensors)
    if deprecated:  # as of 2022, and in the published files of SD 1.x and 2.x
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            given = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in given.items()}
    assert equal(current_vae_names(given), tensors)
    original = vae_tensors(given)
    assert original["first_stage_model.encoder.mid.attn_1.q.weight"].shape == (16, 16, 1, 1)
    assert original["first_stage_model.decoder.mid.attn_1.proj_out.bias"].shape == (16,)
    assert original["first_stage_model.decoder.up.2.upsample.conv.weight"].shape == (16, 16, 3, 3)
    assert equal(convert_ldm_vae_checkpoint(original, dict(vae.config)), tensors)


def test_a_clip_returns_through_diffusers_converter() -> None:
    model = CLIPTextModel(CLIPTextConfig(**TEXT))
    tensors = model.state_dict()
    published = {f"text_model.{name}": tensor for name, tensor in tensors.items()}
    published["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    for given in (tensors, published):
        original = clip_tensors(given, "cond_stage_model.")
        assert "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight" in original
        found = convert_ldm_clip_checkpoint(original)
        assert equal({name.removeprefix("text_model."): tensor for name, tensor in found.items()}, tensors)
    first = clip_tensors(tensors, SDXL_PREFIXES[0])
    assert equal(convert_ldm_clip_checkpoint(first), published_text_names(tensors))


@pytest.mark.parametrize("projected", [False, True])
def test_an_open_clip_returns_through_diffusers_converter(projected: bool) -> None:
    config = CLIPTextConfig(**TEXT, hidden_act="gelu")
    model = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    tensors = model.state_dict()
    prefix = SDXL_PREFIXES[1] if projected else "cond_stage_model."
    original = open_clip_tensors(tensors, prefix)
    width = TEXT["hidden_size"]
    fused = original[f"{prefix}model.transformer.resblocks.1.attn.in_proj_weight"]
    assert fused.shape == (3 * width, width)
    if projected:
        assert original[f"{prefix}model.text_projection"].shape == (width, TEXT["projection_dim"])
    found = convert_open_clip_checkpoint(model, original, prefix=f"{prefix}model.")
    assert equal(found, published_text_names(tensors))


def test_encoders_are_told_apart_by_their_activation() -> None:
    assert not is_open_clip({"hidden_act": "quick_gelu"})
    assert not is_open_clip({})
    assert is_open_clip({"hidden_act": "gelu"})
