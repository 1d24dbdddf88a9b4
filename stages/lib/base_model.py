"""The base model on disk, ``data/base``: its layout, what makes it valid, its fingerprint, its loaders.

A diffusers pipeline directory of five components, safetensors only. Each loader imports what it
needs and nothing more, so that training loads neither the text encoder nor the VAE.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.lib.errors import StageError
from stages.lib.stage_run import write_json

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from transformers import CLIPTextModel, CLIPTokenizer

BASE = Path("data/base")
COMPONENTS = ("tokenizer", "text_encoder", "vae", "unet", "scheduler")
CONFIG_FILES = {
    "text_encoder": "config.json",
    "vae": "config.json",
    "unet": "config.json",
    "scheduler": "scheduler_config.json",
}
WEIGHT_STEMS = {
    "text_encoder": "model",
    "vae": "diffusion_pytorch_model",
    "unet": "diffusion_pytorch_model",
}
TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)

# What diffusers and transformers assume where a config leaves a key out.
_DEFAULT_LATENT_CHANNELS = 4
_DEFAULT_VAE_CONFIG = {
    "block_out_channels": [64],
    "latent_channels": _DEFAULT_LATENT_CHANNELS,
    "scaling_factor": 0.18215,
    "shift_factor": None,
}
_DEFAULT_CROSS_ATTENTION_DIM = 1280
_DEFAULT_TEXT_CONFIG = {"hidden_size": 512, "max_position_embeddings": 77, "vocab_size": 49408}

_BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "laplace", "sigmoid")
_PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
_UNET_TASKS = {5: "depth-to-image", 7: "upscaling", 8: "image editing (InstructPix2Pix)", 9: "inpainting"}
_BOOKKEEPING_KEYS = ("transformers_version", "torch_dtype", "dtype")


def read_config(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``; StageError if it is absent or something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StageError(f"{path}: not found") from error
    except ValueError as error:
        raise StageError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise StageError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def scaling_factor(vae_config: dict[str, Any]) -> float:
    """Of a VAE's config; the configs of SD 1.x and 2.x leave it out."""
    return float({**_DEFAULT_VAE_CONFIG, **vae_config}["scaling_factor"])


def read_vae_config(base: Path) -> dict[str, Any]:
    """The VAE's config, with what `AutoencoderKL` assumes where it leaves a key out; no weights are read."""
    return {**_DEFAULT_VAE_CONFIG, **read_config(_component(base, "vae") / CONFIG_FILES["vae"])}


def config_problems(base: Path) -> list[str]:
    """Everything in the configs of ``base`` that the later stages could not work with.

    Reads the tokenizer's vocabulary and the four configs, no weights.

    Returns:
        One line a problem: which file, expected, got. Empty for a usable base.
    """
    text_encoder, vae, unet, scheduler = (
        read_config(base / component / file) for component, file in CONFIG_FILES.items()
    )
    return [
        *_class_problems(text_encoder, vae, unet),
        *_unet_problems(text_encoder, vae, unet),
        *_tokenizer_problems(base / "tokenizer", text_encoder),
        *_scheduler_problems(scheduler),
    ]


def _class_problems(text_encoder: dict, vae: dict, unet: dict) -> Iterator[str]:
    for component, config, expected in (
        ("vae", vae, "AutoencoderKL"),
        ("unet", unet, "UNet2DConditionModel"),
    ):
        if (got := config.get("_class_name", expected)) != expected:
            yield f"{component}/config.json: expected class {expected}, got {got}"
    if (got := text_encoder.get("architectures") or ["CLIPTextModel"]) != ["CLIPTextModel"]:
        yield f"text_encoder/config.json: expected architectures ['CLIPTextModel'], got {got}"


def _unet_problems(text_encoder: dict, vae: dict, unet: dict) -> Iterator[str]:
    latent_channels = vae.get("latent_channels", _DEFAULT_LATENT_CHANNELS)
    in_channels = unet.get("in_channels", _DEFAULT_LATENT_CHANNELS)
    out_channels = unet.get("out_channels", _DEFAULT_LATENT_CHANNELS)
    if in_channels != latent_channels:
        task = f", a UNet for {_UNET_TASKS[in_channels]}, not supported" if in_channels in _UNET_TASKS else ""
        yield (
            f"unet/config.json: expected in_channels {latent_channels}, the VAE's latent_channels, "
            f"got {in_channels}{task}"
        )
    if out_channels != latent_channels:
        yield (
            f"unet/config.json: expected out_channels {latent_channels}, the VAE's latent_channels, "
            f"got {out_channels}"
        )
    hidden_size = text_encoder.get("hidden_size", _DEFAULT_TEXT_CONFIG["hidden_size"])
    cross_attention_dim = unet.get("cross_attention_dim", _DEFAULT_CROSS_ATTENTION_DIM)
    if cross_attention_dim != hidden_size:
        yield (
            f"unet/config.json: expected cross_attention_dim {hidden_size}, the text encoder's hidden_size, "
            f"got {cross_attention_dim}"
        )
    for key in ("addition_embed_type", "class_embed_type", "num_class_embeds", "encoder_hid_dim"):
        if unet.get(key) is not None:
            yield f"unet/config.json: {key} {unet[key]!r}: conditioning beyond the caption is not supported"


def _tokenizer_problems(directory: Path, text_encoder: dict) -> Iterator[str]:
    limits = {**_DEFAULT_TEXT_CONFIG, **text_encoder}
    token_ids: list[int] = []
    for name in ("vocab.json", "added_tokens.json"):
        if (directory / name).exists():
            token_ids += read_config(directory / name).values()
    if token_ids and max(token_ids) >= limits["vocab_size"]:
        yield (
            f"tokenizer: expected token ids below {limits['vocab_size']}, the text encoder's vocab_size, "
            f"got {max(token_ids)}"
        )
    if (directory / "tokenizer_config.json").exists():
        longest = read_config(directory / "tokenizer_config.json").get("model_max_length")
        if longest is None or longest > limits["max_position_embeddings"]:
            yield (
                f"tokenizer/tokenizer_config.json: expected model_max_length up to the text encoder's "
                f"max_position_embeddings {limits['max_position_embeddings']}, got {longest}"
            )


def _scheduler_problems(scheduler: dict) -> Iterator[str]:
    # Without these keys DDPMScheduler would fall back on a schedule the base was not trained on.
    file = "scheduler/scheduler_config.json"
    if scheduler.get("trained_betas") is None:
        required = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
        missing = [key for key in required if scheduler.get(key) is None]
        if missing:
            got = scheduler.get("_class_name", "a scheduler")
            yield f"{file}: expected a schedule of betas, got {got} without {', '.join(missing)}"
        elif scheduler["beta_schedule"] not in _BETA_SCHEDULES:
            known = " or ".join(_BETA_SCHEDULES)
            yield f"{file}: expected beta_schedule {known}, got {scheduler['beta_schedule']}"
    if (got := scheduler.get("prediction_type", "epsilon")) not in _PREDICTION_TYPES:
        yield f"{file}: expected prediction_type {' or '.join(_PREDICTION_TYPES)}, got {got}"


def write_pipeline_index(base: Path, scheduler: list[str]) -> None:
    """Write ``model_index.json``: stock StableDiffusionPipeline loads ``base``, without a safety checker.

    Args:
        base: of the pipeline directory.
        scheduler: library and class that the base samples with, e.g. ``["diffusers", "PNDMScheduler"]``.
    """
    absent = [None, None]
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": absent,
        "image_encoder": absent,
        "requires_safety_checker": False,
        "safety_checker": absent,
        "scheduler": scheduler,
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_json(base / "model_index.json", index)


def tensor_names(path: Path) -> set[str]:
    """Names of the tensors in a safetensors file.

    Reads the header and compares the length it announces with the file's.

    Raises:
        StageError: naming ``path`` if it is cut short, a Git LFS pointer or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as tensors:
            return set(tensors.keys())
    except (SafetensorError, OSError) as error:
        with open(path, "rb") as file:
            is_pointer = file.read(16) == b"version https://"
        remedy = (
            "run `git lfs pull` there" if is_pointer else "it is cut short or damaged: fetch or copy it again"
        )
        raise StageError(f"{path}: not a whole safetensors file ({error}); {remedy}") from error


def weight_files(component: Path) -> list[Path]:
    """The safetensors files of a component, complete.

    Args:
        component: directory of one component, e.g. ``data/base/unet``.

    Raises:
        StageError: if there are none, or shards or tensors named in the index are missing.
    """
    singles = [component / f"{stem}.safetensors" for stem in sorted({*WEIGHT_STEMS.values()})]
    if found := [path for path in singles if path.exists()]:
        return found[:1]
    indices = sorted(component.glob("*.safetensors.index.json"))
    if not indices:
        raise StageError(f"{component}: expected safetensors weights, found none; run `dvc repro fetch_base`")
    shards: dict[str, set[str]] = {}
    try:
        for tensor, shard in read_config(indices[0])["weight_map"].items():
            shards.setdefault(shard, set()).add(tensor)
    except (KeyError, AttributeError, TypeError) as error:
        raise StageError(f"{indices[0]}: expected a weight_map from tensor to file name") from error
    problems = []
    for shard, tensors in sorted(shards.items()):
        if not (component / shard).exists():
            problems.append(f"{shard} is missing")
        elif absent := tensors - tensor_names(component / shard):
            problems.append(f"{shard} lacks {len(absent)} of its tensors, e.g. {min(absent)}")
    if problems:
        raise StageError(f"{indices[0]}: {'; '.join(problems)}; fetch or copy the component again")
    return [component / shard for shard in sorted(shards)]


def component_fingerprint(component: Path) -> str:
    """SHA-256 of what a component computes: its tensors and its config.

    File names, shards and keys that tell who wrote the config and when do not count. One tensor is
    held at a time.

    Args:
        component: directory with config.json and safetensors, e.g. ``data/base/vae``.

    Raises:
        StageError: if the config or weights are missing or damaged.
    """
    import torch
    from safetensors import safe_open

    config = {
        key: value
        for key, value in read_config(component / "config.json").items()
        if key not in _BOOKKEEPING_KEYS and (key == "_class_name" or not key.startswith("_"))
    }
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    locations = {name: path for path in weight_files(component) for name in tensor_names(path)}
    handles = {path: safe_open(path, framework="pt") for path in sorted(set(locations.values()))}
    for name, path in sorted(locations.items()):
        tensor = handles[path].get_tensor(name)
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def check_made_by(store: Path, what: str, found: str, component: Path, stage: str) -> None:
    """Raise StageError if another model than this one made a store.

    Args:
        store: named in the error.
        what: it holds, in the plural.
        found: fingerprint of the model that made it.
        component: directory of the model expected, e.g. ``data/base/vae``.
        stage: that makes the store.
    """
    expected = component_fingerprint(component)
    if found != expected:
        raise StageError(
            f"{store}: expected {what} encoded by {component} ({expected[:12]}), "
            f"got those of another ({found[:12]}); run `dvc repro {stage}`"
        )


def load_tokenizer(base: Path) -> CLIPTokenizer:
    """The base's tokenizer, with its own pad token (SD 1.x pads with EOS, SD 2.x with "!")."""
    from transformers import CLIPTokenizer

    directory = _component(base, "tokenizer")
    return CLIPTokenizer.from_pretrained(directory, local_files_only=True)


def load_text_encoder(base: Path) -> CLIPTextModel:
    """The base's text encoder: CPU, float32, eval mode."""
    import torch
    from transformers import CLIPTextModel

    # transformers 5 would keep the checkpoint's own dtype.
    return _load_model(CLIPTextModel, _component(base, "text_encoder"), dtype=torch.float32)


def load_vae(base: Path) -> AutoencoderKL:
    """The base's VAE: CPU, float32, eval mode."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return _load_model(AutoencoderKL, _component(base, "vae"), torch_dtype=torch.float32)


def load_unet(base: Path) -> UNet2DConditionModel:
    """The UNet in ``base/unet``; the trained one is that of the base ``data``. CPU, float32, eval mode."""
    import torch
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    return _load_model(UNet2DConditionModel, _component(base, "unet"), torch_dtype=torch.float32)


def load_scheduler(base: Path) -> DDPMScheduler:
    """Betas, prediction_type and the training mathematics of the base's scheduler, whatever its class.

    For `add_noise` and `get_velocity`; sample with the scheduler that the base names.
    """
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    return DDPMScheduler.from_pretrained(_component(base, "scheduler"), local_files_only=True)


def _component(base: Path, name: str) -> Path:
    directory = Path(base) / name
    # Given a path that does not exist, from_pretrained would take it for a Hub id.
    if not directory.is_dir():
        raise StageError(f"{directory}: not found; run `dvc repro fetch_base`")
    return directory


def _load_model(model_class: Any, directory: Path, **dtype: Any) -> Any:
    try:
        model, loading = model_class.from_pretrained(
            directory, use_safetensors=True, local_files_only=True, output_loading_info=True, **dtype
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise StageError(f"{directory}: cannot be loaded as {model_class.__name__}: {error}") from error
    # The libraries only warn, and leave these weights random.
    if missing := sorted(loading["missing_keys"]):
        raise StageError(
            f"{directory}: the weights lack {len(missing)} of the tensors that config.json calls for, "
            f"e.g. {missing[0]}; fetch a whole checkpoint and run `dvc repro fetch_base`"
        )
    return model.eval()
