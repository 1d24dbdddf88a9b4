"""Adapters through peft, and the files of trained weights: what diffusers reads, merging, exact bytes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from safetensors.torch import load_file

from stages.lib.core.tensors import write_safetensors
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import read_params
from stages.lib.models.layout import write_pipeline_index
from stages.lib.models.loaders import load_unet
from stages.lib.training.ema import MovingAverage
from stages.lib.training.unet import (
    LORA_WEIGHTS,
    WEIGHTS,
    add_lora,
    build_unet,
    merge_lora,
    save_lora,
    save_unet,
    trained_parameters,
)
from tests.checkpoints import tiny_pipeline
from tests.conftest import REPOSITORY, changed, read_lineage

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


def test_before_the_first_step_the_output_is_the_base_s(unet):
    before = predict(unet)
    add_lora(unet, 4, 8, ATTENTION, seed=0)
    assert torch.equal(predict(unet), before)


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


def test_the_file_keeps_alpha_and_lineage_and_repeats_its_bytes(unet, tmp_path):
    add_lora(unet, 4, 10, ATTENTION, seed=0)
    save_lora(unet, tmp_path, {"b": "2", "a": "1"})
    content = (tmp_path / LORA_WEIGHTS).read_bytes()
    with safetensors.safe_open(tmp_path / LORA_WEIGHTS, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["a"], metadata["b"]) == ("1", "2")
    adapter = {"unet.r": 4, "unet.lora_alpha": 10, "unet.target_modules": sorted(ATTENTION)}
    assert metadata["lora_adapter_metadata"] == json.dumps(adapter, sort_keys=True)
    save_lora(unet, tmp_path, {"a": "1", "b": "2"})
    assert (tmp_path / LORA_WEIGHTS).read_bytes() == content


@pytest.mark.parametrize("targets", [ATTENTION, EVERYTHING])
def test_merging_gives_a_plain_unet_with_the_same_output(base, unet, tmp_path, targets):
    add_lora(unet, 4, 10, targets, seed=0)
    train(unet, range(2))
    expected, names = predict(unet), list(trainable(unet))
    merged = merge_lora(unet)
    torch.testing.assert_close(predict(merged), expected, rtol=0, atol=1e-5)
    assert torch.equal(predict(unet), expected)
    assert list(trainable(unet)) == names

    save_unet(merged, tmp_path / "unet", {})
    save_unet(load_unet(base), tmp_path / "plain", {})
    configs = [(tmp_path / name / "config.json").read_text() for name in ("unet", "plain")]
    assert configs[0] == configs[1]
    assert load_file(tmp_path / "unet" / WEIGHTS).keys() == load_unet(base).state_dict().keys()
    reloaded = load_unet(tmp_path)
    assert torch.equal(predict(reloaded), predict(merged))


def test_full_weights_and_adapters_lie_side_by_side(base, unet, tmp_path):
    """data/unet of a run with adapters: the merged UNet for every reader, the adapters beside it."""
    add_lora(unet, 4, 10, ATTENTION, seed=0)
    train(unet, range(2))
    save_unet(merge_lora(unet), tmp_path / "unet", {})
    save_lora(unet, tmp_path / "unet", {})
    pipeline = StableDiffusionPipeline.from_pretrained(base)
    pipeline.load_lora_weights(tmp_path / "unet")
    torch.testing.assert_close(predict(pipeline.unet), predict(load_unet(tmp_path)), rtol=0, atol=1e-5)


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
        expected = predict(merge_lora(unet))
    saved = load_file(tmp_path / LORA_WEIGHTS)
    for name, averaged in zip(trainable(unet), average.average, strict=True):
        assert torch.equal(saved["unet." + name.replace(".default", "")], averaged)
    assert not torch.allclose(predict(unet), expected, atol=1e-4)


def test_a_resumed_run_is_bit_identical(base):
    def start():
        unet = load_unet(base).train()
        add_lora(unet, 4, 8, ATTENTION, seed=0)
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


def test_the_module_loads_no_text_model_no_vae_and_no_torchvision():
    script = """
import sys
import stages.lib.training.unet
unwanted = ("diffusers.models.autoencoders.", "diffusers.pipelines.stable_diffusion",
            "transformers.models.clip", "torchvision", "bitsandbytes")
loaded = [name for name in sys.modules if name.startswith(unwanted)]
assert not loaded, loaded
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_exported_unet_is_what_safetensors_would_write(unet, tmp_path, memory_format):
    lineage = {"b": "2", "a": "words: \u00fc, \U0001f43b"}
    save_unet(unet.to(memory_format=memory_format), tmp_path / "unet", lineage)
    path = tmp_path / "unet" / WEIGHTS
    tensors = {name: tensor.contiguous() for name, tensor in unet.state_dict().items()}
    content, reference = path.read_bytes(), safetensors.torch.save(tensors, {"format": "pt", **lineage})

    def split(file: bytes) -> tuple[dict, bytes]:
        length = int.from_bytes(file[:8], "little")
        assert length % 8 == 0
        return json.loads(file[8 : 8 + length]), file[8 + length :]

    (header, data), (expected_header, expected_data) = split(content), split(reference)
    assert len(header["__metadata__"].pop("header_sha256")) == 64
    assert header == expected_header
    assert list(header) == list(expected_header)
    assert list(header["__metadata__"]) == ["a", "b", "format"]
    assert data == expected_data
    assert read_lineage(tmp_path / "unet") == {"format": "pt", **lineage}
    loaded = load_file(path)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    save_unet(unet, tmp_path / "unet", lineage)
    assert path.read_bytes() == content


def test_any_precision_and_layout_is_written_as_float32(tmp_path):
    half, strided = torch.tensor([0.5, 1.5], dtype=torch.bfloat16), torch.arange(6.0)[::2]
    weights = {"half": half, "scalar": torch.tensor(2.0), "strided": strided}
    write_safetensors(tmp_path / "w.safetensors", weights, {})
    loaded = load_file(tmp_path / "w.safetensors")
    assert loaded["half"].dtype == torch.float32
    assert (loaded["half"].tolist(), loaded["scalar"].item()) == ([0.5, 1.5], 2.0)
    assert torch.equal(loaded["strided"], strided)


def test_a_stopped_export_leaves_no_file_and_holds_one_tensor_at_a_time(tmp_path):
    class Stopped:
        shape, numel = (2,), staticmethod(lambda: 2)

        def detach(self):
            (partial,) = tmp_path.iterdir()
            assert partial.stat().st_size >= 400_000  # the tensor before is on disk by now
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "w.safetensors", {"a": torch.zeros(100_000), "b": Stopped()}, {})
    assert not list(tmp_path.iterdir())
