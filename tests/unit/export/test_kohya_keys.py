"""Kohya's format: a loader of its published rules, diffusers and the merged UNet make the same picture."""

import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from stages.lib.export.kohya_keys import kohya_metadata, kohya_names, kohya_tensors
from stages.lib.models.adapter_files import read_adapters, save_adapters, state_of
from stages.lib.models.adapters import Adapters, Strength, add_adapters
from stages.lib.models.layout import write_pipeline_index
from stages.lib.models.loaders import load_unet
from stages.lib.models.trained import load_trained_unet
from stages.lib.models.weights import component_fingerprint
from tests.checkpoints import tiny_pipeline

SDXL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "attention_head_dim": 2,
    "block_out_channels": [8, 16, 16],
    "cross_attention_dim": 32,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "projection_class_embeddings_input_dim": 40,
    "transformer_layers_per_block": [1, 2, 3],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "use_linear_projection": True,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    directory = tiny_pipeline(tmp_path_factory.mktemp("kohya") / "base")
    write_pipeline_index(directory, ["diffusers", "DDIMScheduler"])
    return directory


def trained(unet: UNet2DConditionModel, adapters: Adapters) -> UNet2DConditionModel:
    """With adapters whose every weight is some way from where it began."""
    add_adapters(unet, adapters, seed=0)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in unet.parameters():
            if weight.requires_grad:
                weight += 0.05 * torch.randn(weight.shape, generator=random)
    return unet


def loaded_by_rule(
    unet: UNet2DConditionModel, tensors: dict[str, torch.Tensor], knows_alpha: bool = True
) -> UNet2DConditionModel:
    """As sd-scripts' networks/lora.py and LyCORIS merge, written from their rules, in float64."""
    left = set(tensors)
    for path, module in unet.named_modules():
        name = "lora_unet_" + path.replace(".", "_")
        own = {
            key[len(name) + 1 :]: value.double()
            for key, value in tensors.items()
            if key.startswith(f"{name}.")
        }
        if not own or not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            continue
        left -= {f"{name}.{key}" for key in own}
        weight = module.weight.detach().double()
        alpha = own["alpha"].item()
        scale = 1.0
        if "lora_down.weight" in own:
            down, up = own["lora_down.weight"], own["lora_up.weight"]
            rank, update = down.shape[0], up.flatten(1) @ down.flatten(1)
        elif "hada_w1_a" in own:
            rank = own["hada_w1_b"].shape[0]
            update = (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
        else:
            rank = own["lokr_w2_b"].shape[0] if "lokr_w2_b" in own else alpha  # whole factors have no scale
            second = own["lokr_w2"] if "lokr_w2" in own else own["lokr_w2_a"] @ own["lokr_w2_b"]
            first = own["lokr_w1"]
            update = torch.kron(first[:, :, None, None] if second.ndim == 4 else first, second)
        if knows_alpha:
            scale = alpha / rank
        merged = weight + scale * update.reshape(weight.shape)
        if "dora_scale" in own:
            assert own["dora_scale"].shape == (weight.shape[0], *[1] * (weight.ndim - 1))
            length = merged.flatten(1).norm(dim=1).reshape(own["dora_scale"].shape)
            merged = merged * own["dora_scale"] / length
        module.weight.data = merged.float()
    assert not left
    return unet


def picture(base: Path, unet: UNet2DConditionModel | None = None, lora: object = None) -> torch.Tensor:
    """Of the tiny pipeline, three steps."""
    pipeline = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    if unet is not None:
        pipeline.unet = unet
    if lora is not None:
        pipeline.load_lora_weights(lora)
    made = pipeline(
        "a red heart",
        num_inference_steps=3,
        guidance_scale=3.0,
        output_type="pt",
        generator=torch.Generator().manual_seed(3),
    )
    return made.images


def stored(base: Path, directory: Path, adapters: Adapters) -> UNet2DConditionModel:
    unet = trained(load_unet(base), adapters)
    save_adapters(state_of(unet, {"base_unet": component_fingerprint(base / "unet")}), directory)
    return unet


@pytest.mark.parametrize("alpha", [2, 4, 10, 2.7])
def test_every_loader_of_a_lora_makes_the_picture_of_the_merged_unet(base, tmp_path, alpha):
    by_module = (Strength("mid_block.*", 2, 0.3), Strength("*attn2.to_k", 6))
    unet = stored(base, tmp_path, Adapters("lora", 4, alpha, ("all_linear_and_conv",), by_module))
    merged = load_trained_unet(base, tmp_path)
    expected = picture(base, merged)
    assert (expected - picture(base)).abs().max() > 0.01

    tensors = kohya_tensors(read_adapters(tmp_path), merged.config)
    by_rule = loaded_by_rule(load_unet(base), tensors)
    by_rule_without_alpha = loaded_by_rule(load_unet(base), tensors, knows_alpha=False)
    fused = copy.deepcopy(unet)
    fused.fuse_lora()
    for other in (
        picture(base, fused),
        picture(base, by_rule),
        picture(base, by_rule_without_alpha),
        picture(base, lora=tmp_path),
        picture(base, lora=dict(tensors)),
    ):
        torch.testing.assert_close(other, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("targets", ["attention_and_feed_forward", "all_linear_and_conv"])
@pytest.mark.parametrize(("kind", "alpha"), [("dora", 2.7), ("lokr", 10), ("loha", 2.7)])
def test_other_kinds_are_merged_by_lycoris_rules_as_peft_merges_them(base, tmp_path, kind, alpha, targets):
    unet = stored(base, tmp_path, Adapters(kind, 2, alpha, (targets,), (Strength("mid_block.*", 1, 0.3),)))
    unet.fuse_lora()
    unet.unload_lora()
    for knows_alpha in (True, False):
        tensors = kohya_tensors(read_adapters(tmp_path), unet.config)
        found = loaded_by_rule(load_unet(base), tensors, knows_alpha).state_dict()
        for name, weight in unet.state_dict().items():
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)
    kinds = {"dora": "dora_scale", "lokr": "lokr_w2_a", "loha": "hada_w2_b"}
    assert any(name.endswith(f".{kinds[kind]}") for name in tensors)


def test_sdxl_has_the_names_of_its_original_unet_which_diffusers_reads():
    unet = UNet2DConditionModel.from_config(SDXL)
    trained(unet, Adapters("lora", 2, 3, ("all_linear_and_conv", "conv_in", "time_embedding.linear_1")))
    state = state_of(unet, {})
    tensors = kohya_tensors(state, unet.config)
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight" in tensors
    assert "lora_unet_output_blocks_2_2_conv.alpha" in tensors
    assert "lora_unet_input_blocks_3_0_op.alpha" in tensors

    plain = UNet2DConditionModel.from_config(SDXL)
    read, alphas = StableDiffusionXLPipeline.lora_state_dict(dict(tensors), unet_config=plain.config)
    plain.load_lora_adapter(read, network_alphas=alphas, prefix="unet")
    expected = {name: value for name, value in unet.named_parameters() if ".lora_" in name}
    found = {name: value for name, value in plain.named_parameters() if ".lora_" in name}
    assert len(found) == len(expected)
    for name, value in state.tensors.items():
        adapter = name.replace(".weight", ".default_0.weight")
        assert torch.equal(found[adapter], value), name


def test_sdxl_s_names_are_those_that_its_checkpoint_is_converted_by():
    """A checkpoint whose every weight is named as its adapter would be, but for underscores."""
    unet = UNet2DConditionModel.from_config(SDXL)
    weights = {
        name: module.weight
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    names = kohya_names(weights, unet.config)
    assert len(set(names.values())) == len(weights)

    from stages.lib.export.ldm_keys import unet_names

    all_of_them = unet.state_dict()
    original = unet_names(all_of_them, SDXL["layers_per_block"])
    converted = convert_ldm_unet_checkpoint({original[name]: name for name in all_of_them}, dict(unet.config))
    for name, source in converted.items():
        assert name == source
        if (module := name.removesuffix(".weight")) in weights:
            place = original[name].removeprefix("model.diffusion_model.").removesuffix(".weight")
            assert names[module] == "lora_unet_" + place.replace(".", "_")


def test_the_metadata_say_what_readers_sort_by(base):
    def metadata(
        kind: str, targets: str = "attention", lineage: dict[str, str] | None = None, **config: object
    ):
        unet = trained(load_unet(base), Adapters(kind, 2, 5, (targets,)))
        return kohya_metadata(state_of(unet, lineage or {}), {**unet.config, **config})

    params = {"train": {"seed": 7, "learning_rate": 1e-4, "snr_gamma": None, "noise_offset": 0.0}}
    exported = {"weights": "last", "step": 12}
    texts = metadata("lora", lineage={"params": json.dumps(params), "exported": json.dumps(exported)})
    assert texts["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert (texts["ss_base_model_version"], texts["ss_v2"]) == ("sd_v1", "False")
    assert (texts["ss_network_module"], texts["ss_network_args"]) == ("networks.lora", "{}")
    assert (texts["ss_network_dim"], texts["ss_network_alpha"]) == ("2", "2.0")
    assert (texts["ss_seed"], texts["ss_learning_rate"], texts["ss_steps"]) == ("7", "0.0001", "12")
    assert "ss_min_snr_gamma" not in texts

    texts = metadata(
        "lora", "all_linear_and_conv", {"prediction_type": "v_prediction"}, cross_attention_dim=1024
    )
    assert texts["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert texts["modelspec.prediction_type"] == "v"
    assert (texts["ss_base_model_version"], texts["ss_v2"]) == ("sd_v2", "True")
    assert json.loads(texts["ss_network_args"]) == {"conv_alpha": "2.0", "conv_dim": "2"}

    texts = metadata("lokr", addition_embed_type="text_time")
    assert texts["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert texts["ss_base_model_version"] == "sdxl_base_v1-0"
    assert texts["ss_network_module"] == "lycoris.kohya"
    assert json.loads(texts["ss_network_args"]) == {"algo": "lokr"}
    assert json.loads(metadata("dora")["ss_network_args"])["dora_wd"] == "True"
