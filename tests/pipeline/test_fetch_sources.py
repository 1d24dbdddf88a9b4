"""fetch_base: single files and presets become the same base as a directory of their tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from stages import fetch_base
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import Params, read_params
from stages.lib.frame.sections.fetch_base import FetchBase
from stages.lib.frame.sections.section import read_section
from stages.lib.models import loaders, presets
from stages.lib.models.layout import check_base
from tests.checkpoints import CLIP_VOCAB_SIZE, tiny_pipeline, write_tokenizer
from tests.clips import bundled_clip
from tests.conftest import REPOSITORY, changed
from tests.hub import COMMIT, serving
from tests.single_files import random_components, small_configs, write_checkpoint

__all__ = ["small_configs"]
BASE = Path("data/base")


def params_with(**changes: Any) -> Params:
    params = read_params(REPOSITORY / "params.yaml")
    return changed(params, fetch_base=changed(params.fetch_base, **changes))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


def test_a_single_file_becomes_a_base(
    small_configs: None, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    components = write_checkpoint(work / "model.safetensors", "sd1", torch.float16)
    write_tokenizer(work / "tokens", CLIP_VOCAB_SIZE)
    vocabulary = {name: (work / "tokens" / name).read_bytes() for name in ("vocab.json", "merges.txt")}
    with serving(work / "hub", monkeypatch) as hub:
        monkeypatch.setattr(fetch_base, "CLIP_L", ("owner/clip", COMMIT))
        hub.add("models/owner/clip", vocabulary | {"model.safetensors": b"not this"})
        monkeypatch.setenv("HOME", str(work))
        fetch_base.main(params_with(source="file", file="~/model.safetensors"))
        assert hub.downloaded() == set(vocabulary)
    check_base(BASE)
    for component, tensors in components.items():
        (path,) = (BASE / component).glob("*.safetensors")
        found = safetensors.torch.load_file(path)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert loaders.load_unet(BASE).config.cross_attention_dim == 96
    assert loaders.load_tokenizer(BASE)("red cat").input_ids
    assert [path.name for path in BASE.parent.iterdir()] == ["base"]


def test_a_wrong_file_is_named_before_anything_is_asked(work: Path) -> None:
    safetensors.torch.save_file({"a.lora_up.weight": torch.zeros(1)}, work / "lora.safetensors")
    with pytest.raises(StageError, match=r"lora\.safetensors: .*got a LoRA"):
        fetch_base.main(params_with(source="file", file=str(work / "lora.safetensors")))
    assert not BASE.exists()


def test_a_vae_from_a_file_is_scaled_as_the_base(work: Path) -> None:
    source, other = tiny_pipeline(work / "source"), tiny_pipeline(work / "other", seed=1)
    file = other / "vae/diffusion_pytorch_model.safetensors"
    fetch_base.main(params_with(directory=str(source), vae_source="file", vae_file=str(file)))
    (path,) = (BASE / "vae").glob("*.safetensors")
    found, expected = safetensors.torch.load_file(path), safetensors.torch.load_file(file)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert loaders.load_vae(BASE).config.scaling_factor == 0.5


def test_a_vae_of_another_form_is_refused_by_its_own_name(small_configs: None, work: Path) -> None:
    source = tiny_pipeline(work / "source")
    vae = {name: tensor.contiguous() for name, tensor in random_components("sd1")["vae"].items()}
    safetensors.torch.save_file(vae, work / "wide.safetensors")
    with pytest.raises(StageError, match=r"wide\.safetensors: expected the vae"):
        fetch_base.main(
            params_with(directory=str(source), vae_source="file", vae_file=str(work / "wide.safetensors"))
        )


def test_a_preset_is_a_base_and_a_clip(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(work / "hub", monkeypatch) as hub:
        monkeypatch.setitem(presets.PRESETS, "sd15", presets.PublishedModel("owner/model", COMMIT))
        monkeypatch.setattr(fetch_base, "CLIP_L", ("owner/clip", COMMIT))
        hub.add("models/owner/model", tiny_pipeline(work / "source"))
        hub.add("models/owner/clip", bundled_clip(work / "clip"))
        fetch_base.main(params_with(preset="sd15"))
    check_base(BASE)
    clip = (BASE / "clip/model.safetensors").read_bytes()
    assert clip == (work / "clip/model.safetensors").read_bytes()


def test_presets_are_commits() -> None:
    for hub_id, revision in [*presets.PRESETS.values(), presets.CLIP_L]:
        assert hub_id.count("/") == 1 and len(revision) == 40 and int(revision, 16)


@pytest.mark.parametrize(
    ("changes", "key", "expected"),
    [
        ({"preset": "sd15", "source": "file", "file": "x"}, "preset", "null, where source is file"),
        ({"preset": "sd15", "hub_id": "a/b"}, "preset", "null, where hub_id or revision is given"),
        ({"source": "file"}, "file", "a path, for source: file"),
        ({"vae_source": "file"}, "vae_file", "a path, for vae_source: file"),
    ],
)
def test_what_contradicts_is_refused(changes: dict[str, str], key: str, expected: str) -> None:
    values = read_params(REPOSITORY / "params.yaml").fetch_base.model_dump()
    _, (problem,) = read_section(FetchBase, values | changes)
    assert (problem.key, problem.expected) == (f"fetch_base.{key}", expected)
