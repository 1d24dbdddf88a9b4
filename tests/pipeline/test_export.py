"""What export writes is loaded by diffusers alone, and draws what the trained UNet draws."""

import base64
import hashlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import yaml
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    create_unet_diffusers_config_from_ldm,
    create_vae_diffusers_config_from_ldm,
)
from huggingface_hub import ModelCard
from PIL import Image

from stages import export
from stages.lib.core.sums import check_sums, write_sums
from stages.lib.core.tensors import write_safetensors
from stages.lib.export.adapters import check_adapters
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import Params, read_params
from stages.lib.models.presets import PRESETS
from tests.checkpoints import edit_json, sd21_like, tiny_pipeline
from tests.conftest import changed, content_fingerprint, enter, run_train, write_params
from tests.evaluations import PROMPTS, seal_run, write_run

EXPORT = Path("data/export")
ALL = ["pipeline", "single_file"]
STEM = "fine-tuned-stable-diffusion"


def make_trained(root: Path, base: Path, **scheduler: Any) -> None:
    """A project in which a run has ended: other weights than the base's, and what the stages left of it."""
    write_run(root, prompts=PROMPTS[:1], seeds=(0,))
    shutil.copytree(base, "data/base")
    index = json.loads(Path("data/base/model_index.json").read_text())
    sampler = json.loads(Path("data/base/scheduler/scheduler_config.json").read_text()) | scheduler
    index |= {
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
    }
    Path("data/base/model_index.json").write_text(json.dumps(index))
    for directory in (
        *sorted(path for path in Path("data/base").iterdir() if path.is_dir()),
        Path("data/base"),
    ):
        write_sums(directory)
    unet = UNet2DConditionModel.from_pretrained("data/base/unet")
    generator = torch.Generator().manual_seed(7)
    for parameter in unet.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    shutil.rmtree("data/unet")
    unet.save_pretrained("data/unet")
    lineage = {
        "params": json.dumps({"train": {"learning_rate": 1e-4, "seed": 3}}),
        "exported": json.dumps({"step": 12}),
    }
    write_safetensors(Path("data/unet/diffusion_pytorch_model.safetensors"), unet.state_dict(), lineage)
    Path("data/unet/scheduler_config.json").write_text(json.dumps(sampler))
    counts = {"samples": 12, "captions": 14, "train_samples": 9, "validation_samples": 3, "rejected": 1}
    Path("data/prepare_metrics.json").write_text(json.dumps({f"num_{name}": n for name, n in counts.items()}))
    seal_run(root)


def options(**changes: Any) -> Params:
    write_params(export=changes)
    return read_params()


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a base that predicts noise, whose text encoder says that it is of float16."""
    enter(tmp_path, monkeypatch)
    base = tiny_pipeline(tmp_path / "base")
    edit_json(base / "text_encoder/config.json", dtype="float16")
    make_trained(tmp_path, base)
    return tmp_path


@pytest.fixture(scope="module")
def base_of_sd2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd21_like(tmp_path_factory.mktemp("sd21"), 8)


def draw(pipeline: DiffusionPipeline, size: int = 64) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        "red cat", num_inference_steps=3, guidance_scale=3.0, generator=generator, output_type="np",
        width=size, height=size,
    ).images[0]  # fmt: skip


def expected_picture(size: int = 64) -> np.ndarray:
    """What diffusers draws of the base with data/unet and the scheduler that lies there."""
    config = json.loads(Path("data/unet/scheduler_config.json").read_text())
    pipeline = StableDiffusionPipeline.from_pretrained(
        "data/base", unet=UNet2DConditionModel.from_pretrained("data/unet"),
        scheduler=getattr(diffusers, config["_class_name"]).from_config(config), dtype=torch.float32,
    )  # fmt: skip
    return draw(pipeline, size)


def metadata_of(path: Path) -> dict[str, str]:
    with safetensors.safe_open(path, "pt") as file:
        return dict(file.metadata())


def test_with_no_formats_the_card_is_written_alone(trained: Path) -> None:
    export.main(options())
    assert {path.name for path in EXPORT.iterdir()} == {"README.md", "grid.png", "SHA256SUMS"}
    check_sums(EXPORT, "export")


@pytest.mark.parametrize(
    ("base", "base_model", "said"),
    [
        ({"preset": "sd15"}, PRESETS["sd15"].hub_id, f"at commit `{PRESETS['sd15'].revision}`"),
        (
            {"source": "hub", "hub_id": "owner/name", "revision": "a" * 40},
            "owner/name",
            "[owner/name](https://huggingface.co/owner/name) at commit",
        ),
        (
            {"source": "file", "file": "/home/u/mine.safetensors"},
            None,
            "`mine.safetensors`, a checkpoint in",
        ),
        ({"source": "directory", "directory": "/home/u/mine"}, None, "`mine`, a diffusers directory"),
        (
            {"vae_source": "file", "vae_file": "/home/u/vae.safetensors"},
            None,
            "with the VAE `vae.safetensors`",
        ),
    ],
)
def test_the_card_names_the_base_that_was_taken(
    trained: Path, base: dict[str, str], base_model: str | None, said: str
) -> None:
    params = options()
    export.main(changed(params, fetch_base=changed(params.fetch_base, **base)))
    card = ModelCard.load(EXPORT / "README.md", ignore_metadata_errors=True)
    assert card.data.to_dict().get("base_model") == base_model
    assert said in card.text
    assert "/home/u" not in card.content


def test_what_fetch_base_notes_for_dvc_stays_out_of_the_pipeline(trained: Path) -> None:
    edit_json(Path("data/base/model_index.json"), _text_encoder_2_sha256="0" * 64)
    write_sums(Path("data/base"))
    export.main(options(formats=["pipeline"]))
    index = json.loads((EXPORT / "pipeline" / "model_index.json").read_text())
    assert [name for name in index if name.startswith("_")] == ["_class_name"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_pipeline_loads_without_arguments_and_draws_the_same(trained: Path, dtype: str) -> None:
    export.main(options(formats=["pipeline"], dtype=dtype))
    pipeline = StableDiffusionPipeline.from_pretrained(EXPORT / "pipeline")
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    assert [part.dtype for part in parts] == [torch.float32] * 3
    assert pipeline.safety_checker is None
    assert pipeline.feature_extractor is None
    difference = np.abs(draw(pipeline) - expected_picture()).max()
    assert difference == 0 if dtype == "float32" else 0 < difference < 0.02
    stored = safetensors.torch.load_file(EXPORT / "pipeline/text_encoder/model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    assert all(name.startswith("text_model.") for name in stored)


def test_half_precision_is_loaded_as_a_whole_where_it_is_asked_for(trained: Path) -> None:
    export.main(options(formats=["pipeline"], dtype="float16"))
    pipeline = StableDiffusionPipeline.from_pretrained(EXPORT / "pipeline", dtype=torch.float16)
    assert {part.dtype for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float16}


def test_the_single_file_draws_the_same_in_diffusers(trained: Path) -> None:
    export.main(options(formats=ALL, title="Fine-tuned Stable Diffusion!", author="A. Person", license="mit"))
    path = EXPORT / f"{STEM}_fp32.safetensors"
    pipeline = StableDiffusionPipeline.from_single_file(path, config=str(EXPORT / "pipeline"))
    assert np.array_equal(draw(pipeline), expected_picture())
    assert not path.with_suffix(".yaml").exists()

    found = metadata_of(path)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert (
        found["modelspec.hash_sha256"] == "0x" + hashlib.sha256(path.read_bytes()[8 + header :]).hexdigest()
    )
    expected = {
        "sai_model_spec": "1.0.1", "architecture": "stable-diffusion-v1", "prediction_type": "epsilon",
        "resolution": "64x64", "title": "Fine-tuned Stable Diffusion!", "author": "A. Person",
        "license": "mit",
    }  # fmt: skip
    assert {key: found[f"modelspec.{key}"] for key in expected} == expected
    assert "modelspec.date" not in found
    kind, _, content = found["modelspec.thumbnail"].partition(",")
    thumbnail = Image.open(io.BytesIO(base64.b64decode(content)))
    assert (kind, thumbnail.format) == ("data:image/jpeg;base64", "JPEG")
    assert "v_pred" not in safetensors.torch.load_file(path)


def test_velocity_and_zero_snr_are_told_to_every_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(tmp_path, monkeypatch)
    changes = {
        "_class_name": "DDIMScheduler", "prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }  # fmt: skip
    make_trained(tmp_path, tiny_pipeline(tmp_path / "base"), **changes)
    export.main(options(formats=ALL))
    pipeline = StableDiffusionPipeline.from_pretrained(EXPORT / "pipeline")
    assert isinstance(pipeline.scheduler, DDIMScheduler)
    assert {key: pipeline.scheduler.config[key] for key in changes if key[0] != "_"} == {
        key: value for key, value in changes.items() if key[0] != "_"
    }
    assert np.array_equal(draw(pipeline), expected_picture())

    path = EXPORT / f"{STEM}_fp32.safetensors"
    tensors = safetensors.torch.load_file(path)
    assert tensors["v_pred"].numel() == tensors["ztsnr"].numel() == 0
    assert metadata_of(path)["modelspec.prediction_type"] == "v"
    again = StableDiffusionPipeline.from_single_file(path, config=str(EXPORT / "pipeline"))
    assert np.array_equal(draw(again), expected_picture())
    # A1111 reads the file's neighbour; diffusers reads such configs too.
    config = yaml.safe_load(path.with_suffix(".yaml").read_text())
    assert config["model"]["params"]["parameterization"] == "v"
    assert config["model"]["params"]["scale_factor"] == 0.5
    described = create_unet_diffusers_config_from_ldm(config, tensors, image_size=None)
    kept = {key: pipeline.unet.config[key] for key in described if key != "sample_size"}
    assert {key: _listed(described[key]) for key in kept} == {
        key: _listed(value) for key, value in kept.items()
    }


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_sd2_keeps_the_layout_of_open_clip(
    base_of_sd2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter(tmp_path, monkeypatch)
    make_trained(tmp_path, base_of_sd2)
    export.main(options(formats=ALL))
    path = EXPORT / f"{STEM}_fp32.safetensors"
    names = safetensors.torch.load_file(path)
    assert names["cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight"].shape == (384, 128)
    assert metadata_of(path)["modelspec.architecture"] == "stable-diffusion-v2-768-v"
    pipeline = StableDiffusionPipeline.from_single_file(path, config=str(EXPORT / "pipeline"))
    whole = StableDiffusionPipeline.from_pretrained(EXPORT / "pipeline")
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(whole, part).state_dict()
        found = getattr(pipeline, part).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected), part

    config = yaml.safe_load(path.with_suffix(".yaml").read_text())
    params = config["model"]["params"]
    assert params["cond_stage_config"]["target"].endswith("FrozenOpenCLIPEmbedder")
    described = create_unet_diffusers_config_from_ldm(config, names)
    kept = {key: _listed(whole.unet.config[key]) for key in described if key != "sample_size"}
    assert {key: _listed(described[key]) for key in kept} == kept
    described = create_vae_diffusers_config_from_ldm(config, names)
    kept = {key: _listed(whole.vae.config[key]) for key in described if key != "sample_size"}
    assert {key: _listed(described[key]) for key in kept} == kept


def test_the_same_inputs_give_the_same_bytes(trained: Path) -> None:
    params = options(formats=ALL, dtype="float16")
    export.main(params)
    first = content_fingerprint(EXPORT)
    (EXPORT / "stale.txt").write_text("of another run")
    export.main(params)
    assert content_fingerprint(EXPORT) == first


def test_what_was_there_stays_when_export_fails(trained: Path) -> None:
    export.main(options())
    first = content_fingerprint(EXPORT)
    tensors = safetensors.torch.load_file("data/unet/diffusion_pytorch_model.safetensors")
    tensors["conv_in.weight"] = tensors["conv_in.weight"] + 1e5
    with safetensors.safe_open("data/unet/diffusion_pytorch_model.safetensors", "pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key in ("params", "exported")}
    write_safetensors(Path("data/unet/diffusion_pytorch_model.safetensors"), tensors, metadata)
    seal_run(trained)
    with pytest.raises(StageError, match=r"finite values of torch\.float16, got others in .*conv_in\.weight"):
        export.main(options(formats=["pipeline"], dtype="float16"))
    assert content_fingerprint(EXPORT) == first
    assert not list(Path("data").glob("export*partial"))


@pytest.mark.parametrize(
    ("formats", "prediction", "message"),
    [
        (["lora_kohya"], "epsilon", r"lora_kohya: expected a run with adapters, got data/unet without"),
        (["lora_diffusers"], "epsilon", r"lora_diffusers: expected a run with adapters"),
        (["single_file"], "sample", r"predicts epsilon or v_prediction, got sample"),
    ],
)
def test_a_format_that_the_run_cannot_have_is_refused(
    trained: Path, formats: list[str], prediction: str, message: str
) -> None:
    edit_json(Path("data/unet/scheduler_config.json"), prediction_type=prediction)
    seal_run(trained)
    with pytest.raises(StageError, match=message):
        export.main(options(formats=formats))
    assert not EXPORT.exists()


def test_numbers_of_other_weights_are_refused(trained: Path) -> None:
    edit_json(Path("data/unet/scheduler_config.json"), clip_sample=True)
    write_sums(Path("data/unet"))
    with pytest.raises(
        StageError, match="expected numbers of the weights in data/unet, got those of another run"
    ):
        export.main(options())


def snippets(card: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card, re.DOTALL)


def test_the_cards_examples_run_and_the_hub_reads_its_front(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = options(
        formats=ALL, title="Hearts", license="other", license_name="mine", license_link="https://example.org",
        tags=["hearts"], description="Draws hearts.",
    )  # fmt: skip
    export.main(params)
    card = ModelCard.load(EXPORT / "README.md")
    data = card.data.to_dict()
    assert data["license"] == "other"
    assert (data["license_name"], data["license_link"]) == ("mine", "https://example.org")
    assert (data["pipeline_tag"], data["library_name"]) == ("text-to-image", "diffusers")
    assert "hearts" in data["tags"]
    assert "base_model" not in data  # a directory has no name on the Hub
    for text in (
        "# Hearts",
        "Draws hearts.",
        "12 images with 14 captions",
        "| `train.seed` | `3` |",
        "12 optimizer",
    ):
        assert text in card.content
    assert str(trained) not in card.content
    row = re.search(
        r"\| Held-out loss \| lower \| 0\.1 \[0\.09, 0\.11\] \| 0\.08 \[0\.07, 0\.09\] \|", card.content
    )
    assert row is not None
    examples = snippets(card.content)
    assert len(examples) == 2
    monkeypatch.chdir(EXPORT)
    for example in examples:
        torch.manual_seed(0)
        exec(example, {})  # what the card tells people to run
    assert np.array_equal(np.asarray(Image.open("pipeline.png")), np.asarray(Image.open("single_file.png")))


def test_adapters_go_out_in_both_forms(project_with_adapters: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export.main(options(formats=["lora_kohya", "lora_diffusers", "pipeline"]))
    own = safetensors.torch.load_file("data/unet/pytorch_lora_weights.safetensors")
    out = safetensors.torch.load_file(EXPORT / "pytorch_lora_weights.safetensors")
    assert own.keys() == out.keys()
    assert all(torch.equal(own[name], out[name]) for name in own)
    base = StableDiffusionPipeline.from_pretrained("data/base")
    pictures = []
    for name in ("pytorch_lora_weights.safetensors", f"{STEM}_fp32_lora.safetensors"):
        base.load_lora_weights(EXPORT, weight_name=name)
        pictures.append(draw(base))
        base.unload_lora_weights()
    kohya = metadata_of(EXPORT / f"{STEM}_fp32_lora.safetensors")
    assert kohya["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert kohya["ss_network_dim"] == "2"
    assert kohya["modelspec.thumbnail"].startswith("data:image/jpeg")
    merged = draw(StableDiffusionPipeline.from_pretrained(EXPORT / "pipeline"))
    plain = draw(base)
    for picture in pictures:
        assert np.abs(picture - merged).max() < 1e-3 < np.abs(picture - plain).max()
    card = (EXPORT / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["tags"].count("lora") == 1
    (example,) = [each for each in snippets(card) if "load_lora_weights" in each]
    base_path = str(Path("data/base").resolve())
    monkeypatch.chdir(EXPORT)
    exec(example.replace('"BASE"', repr(base_path)), {})


@pytest.fixture
def project_with_adapters(encoded: Path) -> Path:
    """A run with adapters, of twice the rank as alpha, and what its evaluation would leave."""
    shutil.rmtree(encoded / "data/evaluation", ignore_errors=True)
    run_train(lora_rank=2, lora_alpha=8.0, learning_rate=0.05)
    kept = Path("data/kept")
    shutil.copytree("data/unet", kept)
    metrics = Path("data/prepare_metrics.json").read_text()
    write_run(encoded, prompts=PROMPTS[:1], seeds=(0,))
    shutil.rmtree("data/unet")
    kept.rename("data/unet")
    Path("data/prepare_metrics.json").write_text(metrics)
    seal_run(encoded)
    return encoded


def test_kinds_that_diffusers_has_no_files_for_are_refused(encoded: Path) -> None:
    run_train(lora_rank=2, adapter="lokr")
    with pytest.raises(
        StageError, match=r"expected adapters of kind lora or dora, got lokr, .*take lora_kohya"
    ):
        check_adapters(Path("data/unet"), "lora_diffusers")
    check_adapters(Path("data/unet"), "lora_kohya")
