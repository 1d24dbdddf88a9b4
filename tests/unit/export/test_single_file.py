"""SDXL: both encoders and the second set of UNet inputs, out to one file and back through diffusers."""

from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from stages.lib.core.tensors import write_in_parts
from stages.lib.export.single_file import kind_of, write_single_file
from stages.lib.export.whole_pipeline import write_pipeline
from stages.lib.frame.errors import StageError
from tests.checkpoints import write_tokenizer
from tests.unit.export.test_keys import SDXL


@pytest.fixture
def sdxl(tmp_path: Path) -> Path:
    """A pipeline of SDXL's kind, whose encoders have different widths."""
    vocab_size = write_tokenizer(tmp_path / "tokenizer")
    text = {
        "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": vocab_size,
        "bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = StableDiffusionXLPipeline(
            vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4),
            text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=6, projection_dim=6, **text)),
            text_encoder_2=CLIPTextModelWithProjection(
                CLIPTextConfig(hidden_size=10, projection_dim=16, hidden_act="gelu", **text)
            ),
            tokenizer=CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"),
            tokenizer_2=CLIPTokenizer.from_pretrained(tmp_path / "tokenizer"),
            unet=UNet2DConditionModel.from_config(SDXL),
            scheduler=EulerDiscreteScheduler(),
        )
    pipeline.save_pretrained(tmp_path / "base")
    pipeline.unet.conv_in.weight.data += 1
    pipeline.unet.save_pretrained(tmp_path / "unet")
    pipeline.scheduler.save_config(tmp_path / "unet")
    return tmp_path


def test_sdxl_returns_through_diffusers(sdxl: Path) -> None:
    base, unet = sdxl / "base", sdxl / "unet"
    kind = kind_of(base, unet, (1024, 1024))
    assert kind.architecture == "stable-diffusion-xl-v1-base"
    write_pipeline(sdxl / "pipeline", base, unet, torch.float32)
    write_single_file(sdxl / "one.safetensors", base, unet, kind, torch.float32, lambda _: {})
    assert not (sdxl / "one.yaml").exists()
    whole = StableDiffusionXLPipeline.from_pretrained(sdxl / "pipeline")
    one = StableDiffusionXLPipeline.from_single_file(sdxl / "one.safetensors", config=str(sdxl / "pipeline"))
    published = StableDiffusionXLPipeline.from_pretrained(
        base, unet=UNet2DConditionModel.from_pretrained(unet)
    )
    for part in ("text_encoder", "text_encoder_2", "unet", "vae"):
        expected = getattr(published, part).state_dict()
        for other in (whole, one):
            found = getattr(other, part).state_dict()
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], expected[name]) for name in expected), part


def test_parts_hold_what_they_say_and_no_value_out_of_range(tmp_path: Path) -> None:
    path = tmp_path / "parts.safetensors"
    with pytest.raises(StageError, match=r"expected finite values of torch\.float16, got others in b"):
        write_in_parts(path, [lambda: {"b": torch.tensor([7e4])}], torch.float16, lambda _: {})
    assert not [*tmp_path.iterdir()]
