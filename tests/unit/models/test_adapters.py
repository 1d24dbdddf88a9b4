"""Adapters through peft and their files: what diffusers and peft read, merging, exact bytes."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import safetensors
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from stages.lib.frame.errors import StageError
from stages.lib.frame.params import read_params
from stages.lib.models.adapter_files import (
    PEFT_CONFIG,
    read_adapters,
    save_adapters,
    state_of,
)
from stages.lib.models.adapters import Adapters, Strength, add_adapters
from stages.lib.models.layout import LORA_WEIGHTS, PEFT_WEIGHTS, write_pipeline_index
from stages.lib.models.loaders import load_unet
from stages.lib.models.trained import load_trained_unet
from stages.lib.models.weights import component_fingerprint
from stages.lib.training.ema import MovingAverage
from stages.lib.training.unet import build_unet, export_unet, trained_parameters
from tests.checkpoints import tiny_pipeline
from tests.conftest import REPOSITORY, changed

KINDS = ("lora", "dora", "lokr", "loha")
ATTENTION = ("to_k", "to_q", "to_v", "to_out.0")
EVERYTHING = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "time_emb_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    directory = tiny_pipeline(tmp_path_factory.mktemp("lora") / "base")
    write_pipeline_index(directory, ["diffusers", "DDIMScheduler"])
    return directory


@pytest.fixture
def unet(base) -> UNet2DConditionModel:
    return load_unet(base)


def add_lora(unet: UNet2DConditionModel, rank: int, alpha: float, targets: tuple[str, ...], seed: int):
    add_adapters(unet, Adapters("lora", rank, alpha, targets), seed)


def save_lora(unet: UNet2DConditionModel, path: Path, lineage: dict[str, str]) -> None:
    save_adapters(state_of(unet, lineage), path)


def moved(unet: UNet2DConditionModel, seed: int = 1) -> UNet2DConditionModel:
    """With every adapter weight changed, as training would."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in trainable(unet).values():
            weight += 0.05 * torch.randn(weight.shape, generator=random)
    return unet


def merged_by_diffusers(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    merged = copy.deepcopy(unet)
    merged.fuse_lora()
    merged.unload_lora()
    return merged


def assert_same_weights(
    unet: UNet2DConditionModel, reference: UNet2DConditionModel, **tolerance: float
) -> None:
    found, expected = unet.state_dict(), reference.state_dict()
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, **({"rtol": 0, "atol": 0} | tolerance))


@torch.no_grad()
def predict(unet: UNet2DConditionModel, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    noisy_latents = torch.randn(2, 4, 16, 16, generator=random)
    encoder_hidden_states = torch.randn(2, 77, 32, generator=random)
    return unet(noisy_latents, torch.tensor([10, 900]), encoder_hidden_states).sample


def trainable(unet: UNet2DConditionModel) -> dict[str, torch.nn.Parameter]:
    return {name: weight for name, weight in unet.named_parameters() if weight.requires_grad}


def train(unet: UNet2DConditionModel, steps: range, optimizer: torch.optim.Optimizer | None = None):
    """Steps of some length in some direction, so that outputs differ visibly from the base's."""
    optimizer = optimizer or torch.optim.AdamW(trainable(unet).values(), lr=0.05)
    for step in steps:
        random = torch.Generator().manual_seed(step)
        sample = torch.randn(1, 4, 16, 16, generator=random)
        hidden = torch.randn(1, 77, 32, generator=random)
        unet(sample, 500, hidden).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("kind", KINDS)
def test_before_the_first_step_the_output_is_the_base_s(unet, kind):
    before = predict(unet)
    add_adapters(unet, Adapters(kind, 4, 8, ("all_linear_and_conv",)), seed=0)
    torch.testing.assert_close(predict(unet), before, rtol=0, atol=1e-5 if kind == "dora" else 0)


def test_only_the_adapters_are_trained(unet):
    frozen = {name: weight.clone() for name, weight in unet.state_dict().items()}
    add_lora(unet, 4, 8, ATTENTION, seed=0)
    names = list(trainable(unet))
    assert len(names) == 2 * sum(
        name.endswith(tuple(f"{end}.weight" for end in ATTENTION)) for name in frozen
    )
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert {weight.shape[0] for name, weight in trainable(unet).items() if ".lora_A." in name} == {4}
    train(unet, range(2))
    moved = dict(unet.named_parameters())
    for name, weight in moved.items():
        if name not in names:
            assert torch.equal(weight, frozen[name.replace(".base_layer", "")]), name
    assert all(moved[name].abs().max() > 0.01 for name in names if ".lora_B." in name)


@pytest.mark.parametrize("kind", ["lokr", "loha"])
def test_other_kinds_are_a_function_of_the_seed_too_and_draw_as_peft_does(base, kind):
    def adapters(seed: int, targets: tuple[str, ...] = ("all_linear_and_conv",)) -> dict[str, torch.Tensor]:
        unet = load_unet(base)
        torch.manual_seed(seed + 5)
        add_adapters(unet, Adapters(kind, 4, 8, targets), seed)
        return {name: weight.detach() for name, weight in trainable(unet).items()}

    first, again, other, fewer = adapters(0), adapters(0), adapters(1), adapters(0, ("to_q",))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], fewer[name]) for name in fewer)
    drawn = [name for name, weight in first.items() if weight.any()]
    assert len(drawn) > len(first) / 3
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    config = {"lokr": LoKrConfig, "loha": LoHaConfig}[kind](
        r=4, alpha=8, target_modules=sorted({name.split(".lokr_")[0].split(".hada_")[0] for name in first})
    )
    reference = load_unet(base)
    reference.add_adapter(config)
    theirs = trainable(reference)
    assert theirs.keys() == first.keys()
    assert [name for name, weight in theirs.items() if weight.any()] == drawn
    assert float(torch.cat([first[name].flatten() for name in drawn]).std()) == pytest.approx(
        float(torch.cat([theirs[name].detach().flatten() for name in drawn]).std()), rel=0.05
    )


def test_adapters_are_a_function_of_the_seed_and_draw_as_peft_does(base):
    def adapters(seed: int, targets: tuple[str, ...] = ATTENTION) -> dict[str, torch.Tensor]:
        unet = load_unet(base)
        torch.manual_seed(seed + 5)
        state = torch.get_rng_state()
        add_lora(unet, 4, 8, targets, seed)
        assert torch.equal(torch.get_rng_state(), state)
        return {name: weight.detach() for name, weight in trainable(unet).items()}

    first, again, other, fewer = adapters(0), adapters(0), adapters(1), adapters(0, ("to_q",))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], fewer[name]) for name in fewer)
    drawn = [name for name in first if ".lora_A." in name]
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    assert not torch.equal(first[drawn[0]], first[drawn[2]])

    reference = load_unet(base)
    reference.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=list(ATTENTION)))
    theirs = torch.cat([trainable(reference)[name].detach().flatten() for name in drawn])
    mine = torch.cat([first[name].flatten() for name in drawn])
    assert float(mine.std()) == pytest.approx(float(theirs.std()), rel=0.05)
    assert float(mine.abs().max()) == pytest.approx(float(theirs.abs().max()), rel=0.05)


def test_a_run_trains_the_adapters_that_the_params_ask_for(base, unet):
    options = changed(
        read_params(REPOSITORY / "params.yaml").train,
        lora_rank=3,
        lora_alpha=7,
        lora_target_modules=("to_q",),
        seed=5,
    )
    built = build_unet(base, options)
    config = built.peft_config["default"]
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (3, 7, {"to_q"})
    add_lora(unet, 3, 7, ("to_q",), seed=5)
    assert trainable(built).keys() == trainable(unet).keys()
    assert all(torch.equal(weight, trainable(unet)[name]) for name, weight in trainable(built).items())
    assert list(map(id, trained_parameters(built))) == list(map(id, trainable(built).values()))


@pytest.mark.parametrize("targets", [ATTENTION, EVERYTHING])
def test_the_pipeline_of_diffusers_loads_what_was_trained(base, unet, tmp_path, targets):
    add_lora(unet, 4, 10, targets, seed=0)
    train(unet, range(2))
    save_lora(unet, tmp_path, {"base_unet": "abc"})
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    before = predict(pipeline.unet)
    pipeline.load_lora_weights(tmp_path)
    expected = predict(unet)
    assert (before - expected).abs().max() > 0.01
    torch.testing.assert_close(predict(pipeline.unet), expected, rtol=0, atol=1e-6)


def test_the_file_says_alpha_is_the_rank_keeps_lineage_and_repeats_its_bytes(unet, tmp_path):
    add_lora(unet, 4, 10, ATTENTION, seed=0)
    save_lora(unet, tmp_path, {"b": "2", "a": "1"})
    content = (tmp_path / LORA_WEIGHTS).read_bytes()
    with safetensors.safe_open(tmp_path / LORA_WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["a"], metadata["b"]) == ("1", "2")
    adapter = {"unet.r": 4, "unet.lora_alpha": 4, "unet.target_modules": sorted(ATTENTION)}
    assert metadata["lora_adapter_metadata"] == json.dumps(adapter, sort_keys=True)
    save_lora(unet, tmp_path, {"a": "1", "b": "2"})
    assert (tmp_path / LORA_WEIGHTS).read_bytes() == content


@pytest.mark.parametrize(
    ("alpha", "targets"), [(2, ATTENTION), (4, EVERYTHING), (8, ("all_linear_and_conv",))]
)
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_alone_give_the_weights_that_merging_in_place_gives(
    base, unet, tmp_path, kind, alpha, targets
):
    """Bit for bit: the scale is a power of two."""
    add_adapters(unet, Adapters(kind, 4, alpha, targets), seed=0)
    moved(unet)
    expected, names = predict(unet), list(trainable(unet))
    export_unet(unet, tmp_path / "unet", {}, {"base_unet": component_fingerprint(base / "unet")})
    assert torch.equal(predict(unet), expected)
    assert list(trainable(unet)) == names

    state = torch.get_rng_state()
    found = load_trained_unet(base, tmp_path / "unet")
    assert torch.equal(torch.get_rng_state(), state)
    assert not found.training
    assert not hasattr(found, "peft_config")
    assert_same_weights(found, merged_by_diffusers(unet))
    torch.testing.assert_close(predict(found), expected, rtol=0, atol=1e-4)
    assert (expected - predict(load_unet(base))).abs().max() > 2e-3
    assert (tmp_path / "unet" / "config.json").read_bytes() == saved_config(base, tmp_path)


def saved_config(base: Path, directory: Path) -> bytes:
    load_unet(base).save_config(directory / "plain")
    return (directory / "plain" / "config.json").read_bytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_scale_that_is_no_power_of_two_moves_the_last_bits_alone(base, unet, tmp_path, kind):
    by_module = [Strength("mid_block.*", 2, 0.3), Strength("*attn2.to_k", 3)]
    add_adapters(unet, Adapters(kind, 4, 3.7, ATTENTION, by_module), seed=0)
    moved(unet)
    export_unet(unet, tmp_path / "unet", {}, {"base_unet": component_fingerprint(base / "unet")})
    found = load_trained_unet(base, tmp_path / "unet")
    assert_same_weights(found, merged_by_diffusers(unet), atol=1e-7, rtol=1e-6)


def test_ranks_and_alphas_by_module_are_those_of_the_first_pattern_that_fits(unet):
    by_module = [
        Strength("mid_block.*to_q", 2, 0.5),
        Strength("mid_block.*", 3),
        Strength("*attn2.to_k", 6, 12),
    ]
    add_adapters(unet, Adapters("lora", 4, 8, ATTENTION, by_module), seed=0)
    seen = set()
    for name, module in unet.named_modules():
        if not hasattr(module, "lora_A"):
            continue
        in_middle = name.startswith("mid_block.")
        expected = (4, 2.0)
        if in_middle:
            expected = (2, 0.25) if name.endswith("to_q") else (3, 8 / 3)
        elif name.endswith("attn2.to_k"):
            expected = (6, 2.0)
        assert (module.lora_A["default"].weight.shape[0], module.scaling["default"]) == expected, name
        seen.add(expected)
    assert len(seen) == 4


def test_presets_name_the_modules_that_they_say(base):
    def with_adapters(*targets: str) -> set[str]:
        unet = load_unet(base)
        add_adapters(unet, Adapters("lora", 2, 2, targets), seed=0)
        return {name for name, module in unet.named_modules() if hasattr(module, "lora_A")}

    plain = {
        name
        for name, module in load_unet(base).named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    }
    attention = {name for name in plain if ".attn" in name}
    feed_forward = {name for name in plain if ".ff." in name}
    assert with_adapters("attention") == attention == with_adapters(*ATTENTION)
    assert with_adapters("attention_and_feed_forward") == attention | feed_forward
    outside = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
    assert with_adapters("all_linear_and_conv") == plain - outside
    assert with_adapters("attention", "conv_in") == attention | {"conv_in"}


@pytest.mark.parametrize(("kind", "alpha"), [("lokr", 3.7), ("loha", 10)])
def test_peft_reads_its_own_layout_at_the_strength_that_was_trained(base, unet, tmp_path, kind, alpha):
    by_module = [Strength("mid_block.*", 2, 0.3)]
    add_adapters(unet, Adapters(kind, 4, alpha, ("all_linear_and_conv",), by_module), seed=0)
    moved(unet)
    save_adapters(state_of(unet, {"a": "1"}), tmp_path)
    loaded = PeftModel.from_pretrained(load_unet(base), tmp_path).merge_and_unload()
    assert_same_weights(loaded, merged_by_diffusers(unet), atol=1e-6, rtol=1e-5)
    config = json.loads((tmp_path / PEFT_CONFIG).read_text())
    assert (config["r"], config["alpha"]) == (4, 4)
    assert config["rank_pattern"] == config["alpha_pattern"]
    content = [(tmp_path / name).read_bytes() for name in (PEFT_CONFIG, PEFT_WEIGHTS)]
    save_adapters(state_of(unet, {"a": "1"}), tmp_path)
    assert [(tmp_path / name).read_bytes() for name in (PEFT_CONFIG, PEFT_WEIGHTS)] == content


@pytest.mark.parametrize(("kind", "alpha"), [("lora", 2), ("lora", 3.7), ("lora", 4), ("dora", 10)])
def test_a_loader_that_knows_no_alpha_gives_the_strength_that_was_trained(base, unet, tmp_path, kind, alpha):
    by_module = [Strength("mid_block.*", 2, 0.3)]
    add_adapters(unet, Adapters(kind, 4, alpha, ATTENTION, by_module), seed=0)
    moved(unet)
    save_adapters(state_of(unet, {}), tmp_path)
    expected = merged_by_diffusers(unet)

    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(tmp_path)  # reads alpha
    pipeline.fuse_lora()
    pipeline.unet.unload_lora()
    assert_same_weights(pipeline.unet, expected, atol=1e-6, rtol=1e-5)

    (tmp_path / "bare").mkdir()
    save_file(load_file(tmp_path / LORA_WEIGHTS), tmp_path / "bare" / LORA_WEIGHTS)
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(tmp_path / "bare")  # has no alpha to read
    pipeline.fuse_lora()
    pipeline.unet.unload_lora()
    assert_same_weights(pipeline.unet, expected, atol=1e-6, rtol=1e-5)


def test_adapters_of_another_base_or_damaged_are_refused(base, unet, tmp_path):
    directory = tmp_path / "unet"
    add_lora(unet, 4, 4, ATTENTION, seed=0)
    export_unet(unet, directory, {}, {"base_unet": component_fingerprint(base / "unet")})
    other = tiny_pipeline(tmp_path / "other", seed=7)
    with pytest.raises(
        StageError, match=r"unet: expected adapters of .*other/unet .* got those of another UNet"
    ):
        load_trained_unet(other, directory)

    state = read_adapters(directory)
    name = min(state.tensors)
    few = dict(state.tensors)
    del few[name]
    for tensors, message in (
        (few, "expected the tensors of its adapters and no others, got 1 missing or unknown"),
        ({**state.tensors, name: torch.zeros(9, 9)}, "expected adapters that fit the base's UNet, got"),
    ):
        (directory / LORA_WEIGHTS).unlink()
        save_adapters(dataclasses.replace(state, tensors=tensors), directory)
        with pytest.raises(StageError, match=message):
            load_trained_unet(base, directory)
    (directory / LORA_WEIGHTS).write_bytes(b"short")
    with pytest.raises(StageError, match=r"weights\.safetensors: expected adapters of stage train, got"):
        load_trained_unet(base, directory)


def test_a_whole_unet_is_loaded_as_it_lies_there(base, unet, tmp_path):
    export_unet(moved(unet), tmp_path / "step-000002", {}, {})
    assert_same_weights(load_trained_unet(base, tmp_path / "step-000002"), unet)


def test_the_average_of_the_adapters_alone_is_kept_and_exported(unet, tmp_path):
    add_lora(unet, 4, 4, ATTENTION, seed=0)
    average = MovingAverage(trainable(unet).values(), max_decay=0.5)
    train(unet, range(1))
    average.update()
    train(unet, range(1, 2))
    average.update()
    assert len(average.average) == len(trainable(unet))
    with average.applied():
        save_lora(unet, tmp_path, {})
        expected = predict(merged_by_diffusers(unet))
    saved = load_file(tmp_path / LORA_WEIGHTS)
    for name, averaged in zip(trainable(unet), average.average, strict=True):
        assert torch.equal(saved["unet." + name.replace(".default", "")], averaged)
    assert not torch.allclose(predict(unet), expected, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_is_bit_identical(base, kind):
    def start():
        unet = load_unet(base).train()
        add_adapters(unet, Adapters(kind, 4, 8, ATTENTION), seed=0)
        weights = torch.nn.ParameterList(trainable(unet).values())
        return unet, weights, torch.optim.AdamW(weights, lr=0.01, fused=True)

    whole, stopped, resumed = start(), start(), start()
    train(whole[0], range(4), whole[2])
    train(stopped[0], range(2), stopped[2])
    for part, other in zip(resumed[1:], stopped[1:], strict=True):
        part.load_state_dict(other.state_dict())
    train(resumed[0], range(2, 4), resumed[2])
    assert torch.equal(predict(whole[0]), predict(resumed[0]))
    assert not torch.equal(predict(whole[0]), predict(stopped[0]))


def test_modules_that_cannot_have_an_adapter_are_refused(unet):
    with pytest.raises(StageError, match=r"has no module to_z, q; attention projections are to_q"):
        add_lora(unet, 4, 4, ("to_q", "to_z", "q"), seed=0)
    with pytest.raises(StageError, match=r"lora_target_modules: .*LayerNorm.* is not supported"):
        add_lora(unet, 4, 4, ("norm1",), seed=0)


def test_patterns_without_effect_are_refused(unet):
    by_module = [Strength("mid_block.*", 2), Strength("mid_block.*to_q", 2), Strength("nowhere.*", 2)]
    with pytest.raises(
        StageError, match=r"lora_by_module: .* got mid_block\.\*to_q, nowhere\.\*; such modules are"
    ):
        add_adapters(unet, Adapters("lora", 4, 4, ATTENTION, by_module), seed=0)
