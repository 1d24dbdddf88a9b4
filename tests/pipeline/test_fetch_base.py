"""fetch_base: what it takes, what it refuses and how it says so."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import pytest
import safetensors.torch
import torch
from diffusers import DDPMScheduler
from huggingface_hub import constants, file_download

from stages import fetch_base
from stages.lib.core import hub_downloads
from stages.lib.core.sums import SUMS
from stages.lib.evaluation.measuring.clip_features import load_clip
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import Params, read_params
from stages.lib.models import loaders
from stages.lib.models.layout import check_base, check_component
from stages.lib.models.weights import component_fingerprint
from tests.checkpoints import edit_json, reshard, sd15_like, sd21_like, tiny_pipeline
from tests.clips import bundled_clip
from tests.conftest import REPOSITORY, changed
from tests.hub import COMMIT, Hub, serving

BASE = Path("data/base")
UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny pipeline outside the working directory, which is an empty one."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tiny_pipeline(tmp_path / "source")


def params_with(**changes: Any) -> Params:
    params = read_params(REPOSITORY / "params.yaml")
    return changed(params, fetch_base=changed(params.fetch_base, **changes))


def fetch(source: Path, **changes: Any) -> None:
    fetch_base.main(params_with(source="directory", directory=str(source), **changes))


def refusal(source: Path, **changes: Any) -> str:
    with pytest.raises(StageError) as caught:
        fetch(source, **changes)
    assert not BASE.exists() and not BASE.with_name("base.partial").exists()
    return str(caught.value)


def content(directory: Path) -> dict[str, str]:
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != SUMS
    }


def tensors_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return dict(module.named_parameters())


def assert_same_weights(module: torch.nn.Module, other: torch.nn.Module) -> None:
    expected = tensors_of(other)
    assert tensors_of(module).keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in module.named_parameters())


# --- what is written


def test_writes_the_five_components_and_an_index_only(source: Path) -> None:
    for dropped in (
        "safety_checker/model.safetensors",
        "feature_extractor/preprocessor_config.json",
        "x.ckpt",
    ):
        (source / dropped).parent.mkdir(exist_ok=True)
        (source / dropped).write_text("{}")
    for junk in ("unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.non_ema.safetensors"):
        (source / junk).write_bytes(b"junk")
    fetch(source)
    assert sorted(content(BASE)) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert not BASE.with_name("base.partial").exists()


def test_the_same_source_gives_the_same_bytes_and_nothing_stays(source: Path) -> None:
    fetch(source)
    first = content(BASE)
    (BASE / "unet" / "stale.safetensors").write_bytes(b"old")
    (BASE.with_name("base.partial") / "unet").mkdir(parents=True)
    (BASE.with_name("base.partial") / "unet" / "killed.safetensors").write_bytes(b"old")
    fetch(source)
    assert content(BASE) == first


def test_links_are_resolved_and_never_made(source: Path, tmp_path: Path) -> None:
    (source / "unet").rename(tmp_path / "elsewhere")
    (source / "unet").symlink_to(tmp_path / "elsewhere")
    (source / "vae/config.json").rename(tmp_path / "vae.json")
    (source / "vae/config.json").symlink_to(tmp_path / "vae.json")
    fetch(source)
    copies = [path for path in BASE.rglob("*") if path.is_file()]
    assert not any(path.is_symlink() or path.stat().st_nlink > 1 for path in copies)
    assert len(copies) == 12 + 6 and not (BASE / "unet").is_symlink()


def test_the_hashes_are_those_of_sha256sum_and_tell_every_kind_of_damage(
    source: Path, tmp_path: Path
) -> None:
    fetch(source)
    earlier = shutil.copytree(BASE / "vae", tmp_path / "earlier")
    edit_json(source / "vae/config.json", scaling_factor=0.3)
    fetch(source)
    for directory in (BASE, BASE / "vae"):
        subprocess.run(["sha256sum", "--check", "--quiet", SUMS], cwd=directory, check=True)
    check_base(BASE)
    weights = BASE / "unet/diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    flipped = bytearray(whole)
    flipped[-7] ^= 4
    for damaged in (flipped, whole[:-1], b""):
        weights.write_bytes(damaged)
        with pytest.raises(
            StageError, match=r"unet: damaged, changed diffusion.*`dvc repro -f -s fetch_base`"
        ):
            check_component(BASE, "unet")
    weights.write_bytes(whole)
    (BASE / "tokenizer/vocab.json").rename(BASE / "tokenizer/tokenizer.json")
    with pytest.raises(StageError, match=r"missing vocab\.json; unexpected tokenizer\.json"):
        check_component(BASE, "tokenizer")
    check_component(BASE, "vae")
    shutil.rmtree(BASE / "vae")
    with pytest.raises(StageError, match=r"data/base: damaged, missing vae/SHA256SUMS"):
        check_base(BASE)
    shutil.copytree(earlier, BASE / "vae")
    with pytest.raises(StageError, match=r"expected the one that data/base/SHA256SUMS lists, got another"):
        check_component(BASE, "vae")
    (BASE / "vae" / SUMS).write_bytes(b"\xff")
    with pytest.raises(StageError, match=r"vae/SHA256SUMS: expected the hashes of the files beside it, got"):
        check_component(BASE, "vae")


@pytest.mark.parametrize(
    ("build", "pad_id", "hidden_act", "scheduler", "prediction_type"),
    [
        (sd15_like, 49407, "quick_gelu", "PNDMScheduler", "epsilon"),
        (sd21_like, 0, "gelu", "DDIMScheduler", "v_prediction"),
    ],
)
def test_true_configs_load_as_a_stock_pipeline(
    build: Callable[[Path], Path],
    pad_id: int,
    hidden_act: str,
    scheduler: str,
    prediction_type: str,
    source: Path,
    tmp_path: Path,
) -> None:
    published = build(tmp_path / "published")
    fetch(published)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(BASE, local_files_only=True)
    assert pipeline.safety_checker is None and pipeline.feature_extractor is None
    assert pipeline.tokenizer.pad_token_id == pad_id == loaders.load_tokenizer(BASE).pad_token_id
    assert pipeline.text_encoder.config.hidden_act == hidden_act
    assert type(pipeline.scheduler).__name__ == scheduler
    assert pipeline.scheduler.config.prediction_type == prediction_type
    assert pipeline.vae.config.scaling_factor == 0.18215
    assert_same_weights(loaders.load_text_encoder(BASE), pipeline.text_encoder)
    assert_same_weights(loaders.load_vae(BASE), pipeline.vae)
    assert_same_weights(loaders.load_unet(BASE), pipeline.unet)

    # Against the published tensors themselves, by their published names.
    text = safetensors.torch.load_file(published / "text_encoder/model.safetensors")
    name = "encoder.layers.0.self_attn.q_proj.weight"
    assert torch.equal(tensors_of(pipeline.text_encoder)[name], text[f"text_model.{name}"])
    vae = safetensors.torch.load_file(published / "vae/diffusion_pytorch_model.safetensors")
    attention = pipeline.vae.encoder.mid_block.attentions[0]
    assert torch.equal(attention.to_out[0].weight, vae["encoder.mid_block.attentions.0.proj_attn.weight"])
    unet = safetensors.torch.load_file(published / UNET_WEIGHTS)
    assert unet.keys() == tensors_of(pipeline.unet).keys()
    assert all(torch.equal(tensor, unet[name]) for name, tensor in pipeline.unet.named_parameters())


def test_loaders_give_float32_in_eval_mode_whatever_the_file_holds(source: Path) -> None:
    for file in source.glob("*/*.safetensors"):
        halves = {name: tensor.half() for name, tensor in safetensors.torch.load_file(file).items()}
        safetensors.torch.save_file(halves, file, {"format": "pt"})
    edit_json(source / "text_encoder/config.json", torch_dtype="float16")
    fetch(source)
    for load in (loaders.load_text_encoder, loaders.load_vae, loaders.load_unet):
        model = load(BASE)
        assert not model.training
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_the_scheduler_keeps_the_base_schedule(source: Path, tmp_path: Path) -> None:
    fetch(sd21_like(tmp_path / "published"))
    scheduler = DDPMScheduler.from_pretrained(BASE / "scheduler")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    assert torch.allclose(scheduler.alphas_cumprod.double(), torch.cumprod(1 - betas, 0), atol=1e-6)
    assert scheduler.config.prediction_type == "v_prediction"


def test_training_loads_neither_text_encoder_nor_vae(source: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from stages.lib.core.sums import SUMS
from stages.lib.models import loaders
from stages.lib.models.layout import check_base, check_component
heavy = {{"torch", "diffusers", "transformers", "PIL"}} & set(sys.modules)
assert not heavy, f"importing loaders loads {{heavy}}"
loaders.load_unet(Path({str(source)!r}))
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "diffusers.models.unets.unet_2d_condition" in loaded
    assert "transformers.models.clip.modeling_clip" not in loaded
    assert "diffusers.models.autoencoders.autoencoder_kl" not in loaded
    # diffusers.utils imports PIL.Image; no image codec comes with it.
    assert not {name for name in loaded if name.startswith("PIL.") and name.endswith("ImagePlugin")}


# --- weights in other shapes


def test_fp16_weights_are_taken_when_there_are_no_others(
    source: Path, caplog: pytest.LogCaptureFixture
) -> None:
    original = (source / UNET_WEIGHTS).read_bytes()
    (source / UNET_WEIGHTS).rename(source / "unet/diffusion_pytorch_model.fp16.safetensors")
    with caplog.at_level(logging.WARNING):
        fetch(source)
    assert (BASE / UNET_WEIGHTS).read_bytes() == original
    assert "unet/ has fp16 weights only" in caplog.text


def test_plain_weights_are_preferred(source: Path, caplog: pytest.LogCaptureFixture) -> None:
    (source / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"not these")
    with caplog.at_level(logging.WARNING):
        fetch(source)
    assert (BASE / UNET_WEIGHTS).read_bytes() == (source / UNET_WEIGHTS).read_bytes()
    assert caplog.text == ""


def test_sharded_weights_load(source: Path, tmp_path: Path) -> None:
    expected = loaders.load_unet(source)
    reshard(source / "unet", 3)
    fetch(source)
    assert len(list((BASE / "unet").glob("*.safetensors"))) == 3
    assert_same_weights(loaders.load_unet(BASE), expected)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(BASE, local_files_only=True)
    assert_same_weights(pipeline.unet, expected)


@pytest.mark.parametrize("infix_first", [True, False])
def test_sharded_fp16_weights_get_plain_names(source: Path, infix_first: bool) -> None:
    expected = loaders.load_text_encoder(source)
    component = source / "text_encoder"
    reshard(component)
    renamed = {}
    for shard in component.glob("*.safetensors"):
        number = shard.stem.removeprefix("model")
        renamed[shard.name] = (
            f"model.fp16{number}.safetensors" if infix_first else f"model{number}.fp16.safetensors"
        )
        shard.rename(component / renamed[shard.name])
    index = json.loads((component / "model.safetensors.index.json").read_text())
    index["weight_map"] = {tensor: renamed[shard] for tensor, shard in index["weight_map"].items()}
    (component / "model.safetensors.index.json").unlink()
    (component / "model.safetensors.index.fp16.json").write_text(json.dumps(index))
    fetch(source)
    assert not list(BASE.glob("*/*fp16*"))
    assert_same_weights(loaders.load_text_encoder(BASE), expected)


def test_a_missing_shard_is_named(source: Path) -> None:
    reshard(source / "unet")
    (source / "unet/diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    assert "diffusion_pytorch_model-00002-of-00002.safetensors is missing" in refusal(source)


def test_a_shard_of_another_checkpoint_is_found(source: Path) -> None:
    reshard(source / "unet")
    first = source / "unet/diffusion_pytorch_model-00001-of-00002.safetensors"
    first.write_bytes(first.with_name(first.name.replace("00001-", "00002-")).read_bytes())
    assert f"{first.name} lacks" in refusal(source)


# --- refusals


@pytest.mark.parametrize(
    ("keep", "expected"),
    [(-1, "cut short"), (100, "cut short"), (0, "cut short")],
)
def test_a_truncated_file_is_named(source: Path, keep: int, expected: str) -> None:
    whole = (source / UNET_WEIGHTS).read_bytes()
    (source / UNET_WEIGHTS).write_bytes(whole[:keep])
    message = refusal(source)
    assert str(source / UNET_WEIGHTS) in message and expected in message


def test_a_git_lfs_pointer_is_recognised(source: Path) -> None:
    (source / UNET_WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    assert "git lfs pull" in refusal(source)


def test_pickled_weights_are_refused_all_at_once(source: Path) -> None:
    (source / UNET_WEIGHTS).rename(source / "unet/diffusion_pytorch_model.bin")
    (source / "text_encoder/model.safetensors").rename(source / "text_encoder/pytorch_model.bin")
    message = refusal(source)
    assert "2 problem(s)" in message and "save_pretrained" in message
    assert "unet/diffusion_pytorch_model.bin" in message and "text_encoder/pytorch_model.bin" in message


def test_only_non_ema_weights_are_refused(source: Path) -> None:
    (source / UNET_WEIGHTS).rename(source / "unet/diffusion_pytorch_model.non_ema.safetensors")
    assert "got only unet/diffusion_pytorch_model.non_ema.safetensors" in refusal(source)


@pytest.mark.parametrize("name", ["v1-5-pruned.safetensors", "v1-5-pruned.ckpt"])
def test_a_single_file_checkpoint_is_refused_with_the_remedy(source: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "single").mkdir()
    (tmp_path / "single" / name).write_bytes(b"weights")
    expected = f"fetch_base.source to file and fetch_base.file to the path of {name}"
    assert expected in refusal(tmp_path / "single")


def test_missing_directories_are_refused(source: Path) -> None:
    assert "not found" in refusal(source / "nothing")
    assert "no model_index.json" in refusal(source / "unet")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}, "text_encoder_2 (CLIPText"),
        ({"unet": None, "transformer": ["diffusers", "FluxTransformer2DModel"]}, "transformer (FluxTransf"),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "expected vae AutoencoderKL, got AutoencoderTiny"),
        ({"scheduler": ["diffusers", "FlaxDDIMScheduler"]}, "got FlaxDDIMScheduler"),
    ],
)
def test_other_kinds_of_model_are_refused(source: Path, changes: dict[str, Any], expected: str) -> None:
    edit_json(source / "model_index.json", **changes)
    message = refusal(source)
    assert expected in message and "model_index.json" in message


@pytest.mark.parametrize(
    ("file", "changes", "expected"),
    [
        ("unet/config.json", {"in_channels": 9}, "got 9, a UNet for inpainting"),
        ("unet/config.json", {"in_channels": 8}, "got 8, a UNet for image editing"),
        ("unet/config.json", {"out_channels": 8}, "expected out_channels 4"),
        ("unet/config.json", {"cross_attention_dim": 48}, "cross_attention_dim 32, the text encoder's"),
        ("unet/config.json", {"addition_embed_type": "text_time"}, "'text_time'"),
        ("unet/config.json", {"_class_name": "UNet3DConditionModel"}, "got UNet3DConditionModel"),
        ("text_encoder/config.json", {"architectures": ["T5EncoderModel"]}, "T5EncoderModel"),
        ("text_encoder/config.json", {"vocab_size": 100}, "token ids below 100"),
        ("text_encoder/config.json", {"max_position_embeddings": 20}, "got 77"),
        ("scheduler/scheduler_config.json", {"beta_start": None}, "without beta_start"),
        ("scheduler/scheduler_config.json", {"beta_schedule": "cosine"}, "got cosine"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow"}, "got flow"),
    ],
)
def test_inconsistent_components_are_refused(
    source: Path, file: str, changes: dict[str, Any], expected: str
) -> None:
    edit_json(source / file, **changes)
    assert expected in refusal(source)


def test_all_inconsistencies_are_listed_at_once(source: Path) -> None:
    edit_json(source / "unet/config.json", in_channels=9, cross_attention_dim=48)
    edit_json(source / "scheduler/scheduler_config.json", beta_end=None)
    message = refusal(source)
    assert "3 problem(s)" in message
    assert "inpainting" in message and "cross_attention_dim 32" in message and "beta_end" in message


def test_a_damaged_config_is_named(source: Path) -> None:
    (source / "unet/config.json").write_text('{"in_channels": 4')
    assert "unet/config.json: not valid JSON" in refusal(source)


def test_weights_that_lack_a_tensor_are_never_left_random(source: Path) -> None:
    for component, load in (
        ("unet", loaders.load_unet),
        ("vae", loaders.load_vae),
        ("text_encoder", loaders.load_text_encoder),
    ):
        (file,) = (source / component).glob("*.safetensors")
        tensors = safetensors.torch.load_file(file)
        lost = sorted(tensors)[0]
        safetensors.torch.save_file({n: t for n, t in tensors.items() if n != lost}, file, {"format": "pt"})
        with pytest.raises(StageError, match=f"{component}: the weights lack 1 .*{lost}"):
            load(source)


def test_loading_what_is_not_there_names_the_stage(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="dvc repro fetch_base"):
        loaders.load_unet(tmp_path)


# --- a CLIP to measure with


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    return bundled_clip(tmp_path / "other" / "clip")


CLIP_FILES = {
    "clip/config.json",
    "clip/model.safetensors",
    "clip/preprocessor_config.json",
    "clip/tokenizer.json",
    "clip/tokenizer_config.json",
}


def test_the_clip_of_the_base_is_taken_and_changes_nothing_else(source: Path) -> None:
    fetch(source)
    without = content(BASE)
    fingerprints = {name: component_fingerprint(BASE / name) for name in ("unet", "vae", "text_encoder")}
    bundled_clip(source / "clip")
    (source / "clip/pytorch_model.bin").write_bytes(b"pickle")
    (source / "clip/notes.md").write_text("no part of it")
    fetch(source)
    assert set(content(BASE)) - set(without) == CLIP_FILES
    assert {name: digest for name, digest in content(BASE).items() if name in without} == without
    assert fingerprints == {name: component_fingerprint(BASE / name) for name in fingerprints}
    assert load_clip(BASE / "clip").model.config.projection_dim == 128


@pytest.mark.parametrize("folder", ["clip", "."])
def test_a_clip_of_another_directory(source: Path, clip: Path, folder: str) -> None:
    (clip.parent / "model_index.json").write_text("{}")
    fetch(source, clip_source="directory", clip_directory=str(clip.parent / folder))
    assert content(BASE / "clip") == content(clip)


def test_a_clip_from_the_hub_is_fetched_at_its_commit(source: Path, clip: Path, hub: Hub) -> None:
    files = {file.name: file.read_bytes() for file in clip.iterdir()}
    hub.add("models/some/clip", files | {"pytorch_model.bin": b"pickle", "README.md": b"later"}, branch="old")
    hub.add("models/some/clip", {"config.json": b"{}"}, commit="f" * 40)
    fetch(source, clip_source="hub", clip_hub_id="some/clip", clip_revision=COMMIT)
    assert content(BASE / "clip") == content(clip)
    assert hub.downloaded() == set(files)


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda clip: (clip / "preprocessor_config.json").unlink(), "preprocessor_config.json is missing"),
        (lambda clip: (clip / "config.json").unlink(), "config.json is missing"),
        (lambda clip: (clip / "tokenizer.json").unlink(), "lacks vocab.json and merges.txt, or tokenizer"),
        (
            lambda clip: (clip / "model.safetensors").rename(clip / "pytorch_model.bin"),
            "pickled weights can run code",
        ),
        (lambda clip: edit_json(clip / "config.json", model_type="siglip"), "expected model_type 'clip'"),
        (lambda clip: (clip / "model.safetensors").write_bytes(b"cut"), "not a whole safetensors file"),
    ],
)
@pytest.mark.parametrize("own", [True, False])
def test_a_clip_that_cannot_be_used_is_refused(
    source: Path, clip: Path, spoil: Callable[[Path], object], expected: str, own: bool
) -> None:
    changes = {} if own else {"clip_source": "directory", "clip_directory": str(clip)}
    if own:
        clip = clip.rename(source / "clip")
    spoil(clip)
    assert expected in refusal(source, **changes)


# --- another VAE


@pytest.mark.parametrize("folder", ["vae", "."])
def test_a_vae_of_another_directory(
    source: Path, tmp_path: Path, folder: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = tiny_pipeline(tmp_path / "other", seed=1)
    edit_json(other / "vae/config.json", scaling_factor=0.25)
    with caplog.at_level(logging.INFO):
        fetch(source, vae_source="directory", vae_directory=str(other / folder))
    assert content(BASE / "vae") == content(other / "vae")
    assert content(BASE / "unet") == content(source / "unet")
    assert content(BASE / "vae") != content(source / "vae")
    assert "scaling_factor 0.25 is used; the base's own VAE has 0.5" in caplog.text


def test_an_equal_scaling_factor_is_not_worth_a_line(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tiny_pipeline(tmp_path / "other", seed=1)
    fetch(source, vae_source="directory", vae_directory=str(other))
    assert "scaling_factor" not in caplog.text


def test_a_vae_that_does_not_fit_is_refused(source: Path, tmp_path: Path) -> None:
    other = tiny_pipeline(tmp_path / "other", seed=1)
    override = {"vae_source": "directory", "vae_directory": str(other / "vae")}
    edit_json(other / "vae/config.json", latent_channels=16)
    message = refusal(source, **override)
    assert "expected in_channels 16" in message and f"(the VAE is that of {other / 'vae'})" in message
    edit_json(other / "vae/config.json", latent_channels=4, _class_name="AutoencoderTiny")
    assert "expected class AutoencoderKL, got AutoencoderTiny" in refusal(source, **override)
    (other / "vae/config.json").unlink()
    assert "config.json is missing" in refusal(source, **override)


# --- the Hub


def fill_cache(cache: Path, hub_id: str, origin: Path, patterns: list[str]) -> Path:
    """Lay ``origin`` out as the Hub cache does: blobs, and a snapshot of links to them."""
    repository = cache / f"models--{hub_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    (repository / "blobs").mkdir(parents=True, exist_ok=True)
    snapshot.mkdir(parents=True, exist_ok=True)
    for file in sorted(path for path in origin.rglob("*") if path.is_file()):
        name = file.relative_to(origin).as_posix()
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            blob = repository / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
            blob.write_bytes(file.read_bytes())
            (snapshot / name).parent.mkdir(exist_ok=True)
            (snapshot / name).unlink(missing_ok=True)
            (snapshot / name).symlink_to(blob)
    return snapshot


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def fetch_from_hub(**changes: Any) -> None:
    fetch_base.main(params_with(source="hub", hub_id="owner/model", revision=COMMIT, **changes))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(tmp_path / "hub", monkeypatch) as served:
        yield served


def test_the_hub_cache_alone_is_enough(source: Path, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill_cache(cache, "owner/model", source, ["*"])
    fetch_from_hub()
    cached = content(BASE)
    assert "HF_HUB_OFFLINE is set; using the Hub cache" in caplog.text
    assert not any(path.is_symlink() for path in BASE.rglob("*"))
    fetch(source)
    assert content(BASE) == cached


def test_online_only_what_is_needed_is_downloaded_and_once(source: Path, hub: Hub) -> None:
    wanted = {name: (source / name).read_bytes() for name in content(source)}
    unwanted = {
        "v1-5-pruned.ckpt",
        "README.md",
        "safety_checker/model.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
    }
    hub.add("models/owner/model", wanted | dict.fromkeys(unwanted, b"not this"))
    fetch_from_hub()
    assert hub.downloaded() == set(wanted)
    from_hub = content(BASE)
    hub.asked.clear()
    fetch_from_hub()
    assert content(BASE) == from_hub and hub.asked == []
    fetch(source)
    assert content(BASE) == from_hub


def test_a_base_that_cannot_be_used_fails_on_its_configs_before_weights_come(source: Path, hub: Hub) -> None:
    edit_json(source / "unet/config.json", in_channels=9)
    hub.add("models/owner/model", source)
    with pytest.raises(StageError, match="inpainting"):
        fetch_from_hub()
    assert "unet/config.json" in hub.downloaded()
    assert not any(path.endswith(".safetensors") for path in hub.downloaded())


def test_an_interrupted_download_continues(source: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(file_download, "time", types.SimpleNamespace(sleep=lambda seconds: None))
    monkeypatch.setattr(hub_downloads, "CONTINUED_BYTES", 1000)
    hub.add("models/owner/model", source)
    hub.cut_after[UNET_WEIGHTS] = 3000
    hub.only_once.add(UNET_WEIGHTS)
    with pytest.raises(StageError, match=r"(?s)download stopped: .*again, it continues"):
        fetch_from_hub()
    asked = [each.first_byte for each in hub.asked if each[:2] == ("GET", UNET_WEIGHTS)]
    assert set(asked) == {0, 3000}
    hub.cut_after.clear()
    hub.only_once.clear()
    hub.asked.clear()
    fetch_from_hub()
    assert [each.first_byte for each in hub.asked if each[:2] == ("GET", UNET_WEIGHTS)] == [3000]
    from_hub = content(BASE)
    fetch(source)
    assert content(BASE) == from_hub


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        ((404, "RevisionNotFound"), "no such revision"),
        ((403, "GatedRepo"), "hf auth login"),
        ((401, "RepoNotFound"), "does not exist or is private"),
        (None, "HF_HUB_OFFLINE is set"),
        ((0, "closed"), "the Hub cannot be reached ("),
    ],
)
def test_a_hub_that_refuses(
    source: Path,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    refusal: tuple[int, str] | None,
    expected: str,
) -> None:
    hub.refusal = refusal
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", refusal is None)
    with pytest.raises(StageError) as caught:
        fetch_from_hub()
    message = str(caught.value)
    assert expected in message and "owner/model" in message and COMMIT in message
    assert not BASE.exists()

    # From then on the Hub, with its retries and time-outs, is left alone.
    fill_cache(hub.cache, "owner/model", source, ["*"])
    hub.asked.clear()
    fetch_from_hub()
    assert (BASE / UNET_WEIGHTS).exists() and "using the Hub cache" in caplog.text
    assert len(hub.asked) == (refusal is not None)


@pytest.mark.parametrize("key", ["", "vae_", "clip_"])
def test_a_branch_is_answered_with_its_commit(source: Path, hub: Hub, key: str) -> None:
    hub.add("models/owner/model", source)
    origin = {f"{key}source": "hub", f"{key}hub_id": "owner/model", f"{key}revision": "main"}
    with pytest.raises(StageError, match=rf"owner/model: revision main points to {COMMIT} at this"):
        fetch_base.main(params_with(**{"source": "directory", "directory": str(source)} | origin))


def test_a_cache_that_holds_a_part_says_so(source: Path, cache: Path) -> None:
    fill_cache(cache, "owner/model", source, ["*.json", "*.txt", "vae/*", "text_encoder/*"])
    with pytest.raises(
        StageError, match=r"(?s)expected safetensors weights in unet/, got none.*with a network"
    ):
        fetch_from_hub()


def test_a_cache_with_fp16_weights_alone_does_not_choose_them(source: Path, cache: Path) -> None:
    (source / UNET_WEIGHTS).rename(source / "unet/diffusion_pytorch_model.fp16.safetensors")
    fill_cache(cache, "owner/model", source, ["*"])
    with pytest.raises(StageError, match=r"(?s)plain weights in unet/, got fp16 ones alone.*with a network"):
        fetch_from_hub()


def test_a_tokenizer_without_its_config_is_refused(source: Path) -> None:
    (source / "tokenizer/tokenizer_config.json").unlink()
    assert "tokenizer/tokenizer_config.json is missing" in refusal(source)


def test_pickled_weights_on_the_hub_are_refused_before_any_download(source: Path, hub: Hub) -> None:
    names = {name: name.replace("model.safetensors", "model.bin") for name in content(source)}
    remote = {renamed: (source / name).read_bytes() for name, renamed in names.items()}
    hub.add("models/owner/model", remote)
    with pytest.raises(StageError, match=r"got only unet/diffusion_pytorch_model\.bin"):
        fetch_from_hub()
    assert hub.downloaded() == {"model_index.json"}


def test_a_vae_from_the_hub(source: Path, cache: Path, tmp_path: Path) -> None:
    other = tiny_pipeline(tmp_path / "other", seed=1)
    fill_cache(cache, "owner/vae", other / "vae", ["*"])
    fetch(source, vae_source="hub", vae_hub_id="owner/vae", vae_revision=COMMIT)
    assert content(BASE / "vae") == content(other / "vae")
    assert content(BASE / "unet") == content(source / "unet")


# --- fingerprints


def test_the_fingerprint_ignores_file_names_shards_and_bookkeeping(source: Path) -> None:
    component = source / "unet"
    before = component_fingerprint(component)
    reshard(component, 3)
    assert component_fingerprint(component) == before
    edit_json(
        component / "config.json", _name_or_path="/elsewhere", _diffusers_version="9", torch_dtype="float16"
    )
    assert component_fingerprint(component) == before


def test_the_fingerprint_sees_each_weight_name_and_setting(source: Path) -> None:
    component = source / "vae"
    file = source / "vae/diffusion_pytorch_model.safetensors"
    seen = {component_fingerprint(component)}
    tensors = safetensors.torch.load_file(file)
    name = sorted(tensors)[-1]
    changed = tensors[name].clone()
    changed.view(torch.int32).view(-1)[-1] ^= 1
    for variant in (
        tensors | {name: changed},
        tensors | {name: tensors[name].reshape(1, *tensors[name].shape)},
        {f"{key}_" if key == name else key: tensor for key, tensor in tensors.items()},
        {key: tensor.view(torch.int32) for key, tensor in tensors.items()},
    ):
        safetensors.torch.save_file(variant, file, {"format": "pt"})
        seen.add(component_fingerprint(component))
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    edit_json(component / "config.json", scaling_factor=0.7)
    seen.add(component_fingerprint(component))
    edit_json(component / "config.json", _class_name="AsymmetricAutoencoderKL")
    seen.add(component_fingerprint(component))
    assert len(seen) == 7
