"""params.yaml as typed, validated, frozen sections.

A class per section, a field per key, no defaults: those live in params.yaml. `read_params`
reports every problem of the file in one error.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml

from stages.lib.frame.errors import StageError

PARAMS_FILE = Path("params.yaml")
_COMMIT = re.compile(r"[0-9a-f]{40}")
POLYNOMIAL_END = 1e-7  # learning rate that diffusers' polynomial schedule ends with


@dataclass(frozen=True)
class Range:
    """Bounds of a number, included unless named."""

    low: float
    high: float = math.inf
    without: tuple[float, ...] = ()


class Choice(tuple[str, ...]):
    """The texts allowed."""

    def __new__(cls, *allowed: str) -> Choice:
        return super().__new__(cls, allowed)


@dataclass(frozen=True)
class FetchBase:
    """Which base model, if another which VAE, and which CLIP measures pictures."""

    source: Annotated[str, Choice("directory", "hub")]
    directory: str
    hub_id: str | None
    revision: str | None
    vae_source: Annotated[str, Choice("base", "directory", "hub")]
    vae_directory: str
    vae_hub_id: str | None
    vae_revision: str | None
    clip_source: Annotated[str, Choice("base", "directory", "hub")]
    clip_directory: str
    clip_hub_id: str | None
    clip_revision: str | None

    def problems(self) -> list[tuple[str, str, Any]]:
        found: list[tuple[str, str, Any]] = []
        for source, prefix in ((self.source, ""), (self.vae_source, "vae_"), (self.clip_source, "clip_")):
            hub_id, revision = getattr(self, f"{prefix}hub_id"), getattr(self, f"{prefix}revision")
            if source != "hub":
                continue
            if hub_id is None or not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
                found.append(
                    (f"{prefix}hub_id", f"an id such as owner/name, for {prefix}source: hub", hub_id)
                )
            if revision is None or not _COMMIT.fullmatch(revision):
                expected = f"a full commit of 40 hexadecimal digits, for {prefix}source: hub"
                found.append((f"{prefix}revision", expected, revision))
        return found


@dataclass(frozen=True)
class Prepare:
    """Which images and captions."""

    source: str
    caption_column: str
    render_resolution: Annotated[int, Range(8, 4096)]
    validation_fraction: Annotated[float, Range(0, 0.5)]
    split_seed: Annotated[int, Range(0)]
    max_samples: Annotated[int | None, Range(1)]
    max_rejected_fraction: Annotated[float, Range(0, 1)]


@dataclass(frozen=True)
class Tokenize:
    """How captions become token ids."""

    num_chunks: Annotated[int, Range(1)]


@dataclass(frozen=True)
class EncodeCaptions:
    """How captions become `encoder_hidden_states`."""

    clip_skip: Annotated[int | None, Range(1)]
    batch_size: Annotated[int, Range(1)]
    dtype: Annotated[str, Choice("float32", "bfloat16")]


@dataclass(frozen=True)
class EncodeImages:
    """How images become latent moments."""

    resolution: Annotated[int, Range(16)]
    buckets: Annotated[str, Choice("square", "auto", "sizes")]
    bucket_sizes: Annotated[tuple[tuple[int, ...], ...], Range(16)]
    bucket_step: Annotated[int, Range(1)]
    max_aspect: Annotated[float, Range(1)]
    max_upscale: Annotated[float | None, Range(0, without=(0,))]
    interpolation: Annotated[str, Choice("lanczos", "bicubic", "bilinear", "box")]
    jpeg_draft: bool
    random_crops: Annotated[int, Range(0)]
    crop_seed: Annotated[int, Range(0)]
    horizontal_flip: bool
    batch_size: Annotated[int, Range(1)]
    dtype: Annotated[str, Choice("float32", "bfloat16")]
    num_reconstructions: Annotated[int, Range(1)]

    def problems(self) -> list[tuple[str, str, Any]]:
        found: list[tuple[str, str, Any]] = []
        if self.buckets == "auto" and self.resolution % self.bucket_step:
            expected = f"a multiple of bucket_step {self.bucket_step}, for buckets: auto"
            found.append(("resolution", expected, self.resolution))
        if any(len(pair) != 2 for pair in self.bucket_sizes):
            found.append(("bucket_sizes", "pairs of [width, height]", self.bucket_sizes))
        return found


@dataclass(frozen=True)
class Train:
    """How the UNet is fine-tuned."""

    seed: Annotated[int, Range(0)]
    train_batch_size: Annotated[int, Range(1)]
    gradient_accumulation_steps: Annotated[int, Range(1)]
    max_train_steps: Annotated[int | None, Range(1)]
    num_train_epochs: Annotated[int | None, Range(1)]
    early_stopping_patience: Annotated[int | None, Range(1)]
    export: Annotated[str, Choice("last", "best")]
    prediction_type: Annotated[str | None, Choice("epsilon", "v_prediction", "sample")]
    rescale_betas_zero_snr: bool
    snr_gamma: Annotated[float | None, Range(0, without=(0,))]
    timestep_sampling: Annotated[str, Choice("uniform", "stratified")]
    noise_offset: Annotated[float, Range(0)]
    input_perturbation: Annotated[float, Range(0)]
    caption_dropout: Annotated[float, Range(0, 1)]
    optimizer: Annotated[str, Choice("adamw", "adamw_8bit", "adafactor")]
    learning_rate: Annotated[float, Range(0)]
    lr_scheduler: Annotated[str, Choice("constant", "cosine", "cosine_with_restarts", "linear", "polynomial")]
    lr_warmup_steps: Annotated[int, Range(0)]
    lr_num_cycles: Annotated[int, Range(1)]
    lr_power: Annotated[float, Range(0, without=(0,))]
    adam_beta1: Annotated[float, Range(0, 1, without=(1,))]
    adam_beta2: Annotated[float, Range(0, 1, without=(1,))]
    adam_weight_decay: Annotated[float, Range(0)]
    adam_epsilon: Annotated[float, Range(0)]
    max_grad_norm: Annotated[float, Range(0, without=(0,))]
    use_ema: bool
    ema_decay: Annotated[float, Range(0, 1)]
    ema_power: Annotated[float | None, Range(0, without=(0,))]
    ema_update_after_step: Annotated[int, Range(0)]
    validate_ema: bool
    export_ema: bool
    lora_rank: Annotated[int | None, Range(1)]
    lora_alpha: Annotated[int, Range(1)]
    lora_target_modules: tuple[str, ...]
    mixed_precision: Annotated[str, Choice("no", "bf16", "fp16")]
    allow_tf32: bool
    channels_last: bool
    gradient_checkpointing: bool
    torch_compile: bool
    max_resident_bytes: Annotated[int, Range(0)]
    log_every_steps: Annotated[int, Range(1)]
    validation_every_steps: Annotated[int, Range(1)]
    checkpoint_every_steps: Annotated[int, Range(1)]
    preview_every_steps: Annotated[int | None, Range(1)]
    num_previews: Annotated[int, Range(1)]
    preview_guidance_scale: Annotated[float, Range(1)]

    def problems(self) -> list[tuple[str, str, Any]]:
        found: list[tuple[str, str, Any]] = []
        if self.train_batch_size % self.gradient_accumulation_steps:
            expected = f"a divisor of train_batch_size {self.train_batch_size}"
            found.append(("gradient_accumulation_steps", expected, self.gradient_accumulation_steps))
        if (self.max_train_steps is None) == (self.num_train_epochs is None):
            expected = "a number here or in num_train_epochs, and null in the other"
            found.append(("max_train_steps", expected, self.max_train_steps))
        elif self.max_train_steps is not None and self.lr_warmup_steps > self.max_train_steps:
            expected = f"at most max_train_steps {self.max_train_steps}"
            found.append(("lr_warmup_steps", expected, self.lr_warmup_steps))
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            expected = (
                "v_prediction or sample with rescale_betas_zero_snr: pure noise teaches epsilon nothing"
            )
            found.append(("prediction_type", expected, self.prediction_type))
        if self.lr_scheduler == "polynomial" and self.learning_rate <= POLYNOMIAL_END:
            expected = f"more than {POLYNOMIAL_END:g}, where lr_scheduler: polynomial ends"
            found.append(("learning_rate", expected, self.learning_rate))
        return found


@dataclass(frozen=True)
class Validation:
    """The held-out loss that train, baseline and evaluate share."""

    seed: Annotated[int, Range(0)]
    num_timesteps: Annotated[int, Range(1)]
    max_samples: Annotated[int, Range(1)]
    batch_size: Annotated[int, Range(1)]


@dataclass(frozen=True)
class Evaluate:
    """Which pictures are made, and how sure the numbers are that are measured on them."""

    prompts: tuple[str, ...]
    negative_prompt: str
    seeds: Annotated[tuple[int, ...], Range(0)]
    scheduler: Annotated[tuple[str, ...], Choice("base", "ddim", "dpmsolver++", "euler", "unipc")]
    guidance_scale: Annotated[tuple[float, ...], Range(1)]
    num_inference_steps: Annotated[tuple[int, ...], Range(1)]
    batch_size: Annotated[int, Range(1)]
    num_contact_samples: Annotated[int, Range(1)]
    denoising_every_steps: Annotated[int | None, Range(1)]
    num_metric_samples: Annotated[int, Range(2)]
    inception_weights: str | None
    memorisation_threshold: Annotated[float, Range(-1, 1)]
    num_worst_pairs: Annotated[int, Range(1)]
    bootstrap_resamples: Annotated[int, Range(100)]
    bootstrap_level: Annotated[float, Range(0, 1, without=(0, 1))]
    bootstrap_seed: Annotated[int, Range(0)]


@dataclass(frozen=True)
class Params:
    """All sections of params.yaml."""

    fetch_base: FetchBase
    prepare: Prepare
    tokenize: Tokenize
    encode_captions: EncodeCaptions
    encode_images: EncodeImages
    train: Train
    validation: Validation
    evaluate: Evaluate


def read_params(path: Path = PARAMS_FILE) -> Params:
    """Read and validate the whole file.

    Raises:
        StageError: listing every unknown or missing key, wrong type, value out of range and
            impossible combination, each with what was expected and what was found.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StageError(f"{path}: not found; run from the root of the repository") from error
    except yaml.YAMLError as error:
        raise StageError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise StageError(f"{path}: expected sections, got {type(document).__name__}")
    problems: list[str] = []
    sections = {}
    section_types = typing.get_type_hints(Params)
    problems += _key_problems("", document, section_types)
    for name, section_type in section_types.items():
        if name in document:
            sections[name] = _section(name, section_type, document[name], problems)
    if problems:
        raise StageError(f"{path}: {len(problems)} problem(s)\n  " + "\n  ".join(problems))
    return Params(**sections)


def _key_problems(prefix: str, found: dict, expected: dict) -> list[str]:
    unknown = [
        f"{prefix}{key}: unknown key; known: {', '.join(expected)}" for key in found if key not in expected
    ]
    return unknown + [f"{prefix}{key}: missing" for key in expected if key not in found]


def _section(name: str, section_type: type, values: Any, problems: list[str]) -> Any:
    if not isinstance(values, dict):
        problems.append(f"{name}: expected a section of keys, got {values!r}")
        return None
    fields = {field.name: field for field in dataclasses.fields(section_type)}
    hints = typing.get_type_hints(section_type, include_extras=True)
    before = len(problems)
    problems += _key_problems(f"{name}.", values, fields)
    converted = {}
    for key in fields:
        if key not in values:
            continue
        try:
            converted[key] = _convert(hints[key], values[key])
        except ValueError as error:
            problems.append(f"{name}.{key}: expected {error}, got {values[key]!r}")
    if len(problems) > before:
        return None
    section = section_type(**converted)
    if hasattr(section, "problems"):
        problems += [
            f"{name}.{key}: expected {expected}, got {got!r}" for key, expected, got in section.problems()
        ]
    return section


def _convert(hint: Any, value: Any, limit: Range | Choice | None = None) -> Any:
    """``value`` as the annotated type; ValueError carries what was expected."""
    if typing.get_origin(hint) is Annotated:
        inner, limit = typing.get_args(hint)
        return _convert(inner, value, limit)
    if isinstance(hint, types.UnionType):
        (inner,) = (arm for arm in typing.get_args(hint) if arm is not types.NoneType)
        try:
            return None if value is None else _convert(inner, value, limit)
        except ValueError as error:
            raise ValueError(f"{error}, or null") from error
    if typing.get_origin(hint) is tuple:
        inner = typing.get_args(hint)[0]
        if not isinstance(value, list) or not value:
            raise ValueError("a list of one or more values")
        return tuple(_convert(inner, item, limit) for item in value)
    if hint is str and value is False and isinstance(limit, Choice) and "no" in limit:
        value = "no"  # `dvc exp run -S` rewrites the file without quotes, and YAML 1.1 reads no as false
    if hint is bool or hint is str:
        if not isinstance(value, hint):
            raise ValueError("true or false" if hint is bool else "text")
        if isinstance(limit, Choice) and value not in limit:
            raise ValueError("one of " + ", ".join(limit))
        return value
    number = _number(hint, value)
    if isinstance(limit, Range) and (number in limit.without or not limit.low <= number <= limit.high):
        bounds = f"of {limit.low:g} or more"
        if limit.high != math.inf:
            bounds = f"from {limit.low:g} to {limit.high:g}"
        raise ValueError("".join([f"a number {bounds}", *(f", not {value:g}" for value in limit.without)]))
    return number


def _number(hint: type, value: Any) -> int | float:
    # `dvc exp run -S` writes 1e-05, which YAML 1.1 reads as text.
    expected = "a whole number" if hint is int else "a number"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(expected)
    try:
        number = float(value)
    except ValueError as error:
        raise ValueError(expected) from error
    if not math.isfinite(number) or (hint is int and number != int(number)):
        raise ValueError(expected)
    return int(number) if hint is int else number
