"""Files of trained weights: what safetensors would write, exact bytes, whole or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from stages.lib.core.tensors import write_safetensors
from stages.lib.models.loaders import load_unet
from stages.lib.training.unet import WEIGHTS, save_unet
from tests.checkpoints import tiny_pipeline
from tests.conftest import REPOSITORY, read_lineage


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_pipeline(tmp_path_factory.mktemp("unet") / "base")


@pytest.fixture
def unet(base) -> UNet2DConditionModel:
    return load_unet(base)


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
