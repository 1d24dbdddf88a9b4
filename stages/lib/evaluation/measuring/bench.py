"""The bench on which base and trained UNet are judged alike: the same samples, noise, captions and models."""

from __future__ import annotations

import dataclasses
import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from stages.lib.core.devices import use_same_kernels
from stages.lib.core.files import fresh_directory, read_json
from stages.lib.core.fingerprints import fingerprint
from stages.lib.core.paths import BASE, BASE_CLIP, LATENTS, PAIR_CAPTIONS, PAIR_IMAGES, RUN_FILE
from stages.lib.core.sums import SUMS, check_hashes, check_sums, hash_file, remedy
from stages.lib.data.image_shards import fingerprint_of_images, image_index
from stages.lib.data.pairs import VALIDATION, SampleCaptions
from stages.lib.diffusion.schedule import training_scheduler
from stages.lib.diffusion.validation import validation_losses
from stages.lib.encoding.conditioning import Conditioning, check_text_encoder, read_conditioning
from stages.lib.encoding.latents import Latents, check_vae, read_latents, read_samples
from stages.lib.evaluation.measuring.clip_features import Clip, load_clip
from stages.lib.evaluation.measuring.inception_features import Inception, load_inception
from stages.lib.evaluation.measuring.measure import measure_unet
from stages.lib.evaluation.measuring.measurements import Measurements
from stages.lib.evaluation.measuring.pictures import (
    MadePicture,
    metric_samples,
    save_metric_pictures,
    save_samples,
)
from stages.lib.evaluation.measuring.rendering import Renderer, conditions_of, load_renderer, sampler_config
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import Evaluate, Validation
from stages.lib.inversion.placeholder import Placeholder
from stages.lib.models.families.family import STATES
from stages.lib.models.layout import check_base

logger = logging.getLogger(__name__)
# Of `evaluate`: what both UNets are asked to render and measure.
RENDERED = (
    "prompts",
    "negative_prompt",
    "seeds",
    "scheduler",
    "guidance_scale",
    "num_inference_steps",
    "batch_size",
    "denoising_every_steps",
    "num_metric_samples",
)


@dataclass(frozen=True)
class Bench:
    """What a UNet is judged on and with.

    Attributes:
        latents, conditioning, samples: of the data set.
        clip: None where the base has none; inception: None where FID is not asked for.
        chosen: held-out samples whose captions pictures are made of and measured.
        made_from: hashes of all of that, and of what is asked for, by name.
    """

    latents: Latents
    conditioning: Conditioning
    samples: list[SampleCaptions]
    clip: Clip | None
    inception: Inception | None
    chosen: list[SampleCaptions]
    made_from: dict[str, str]


def set_up(options: Evaluate, validation: Validation) -> Bench:
    """Open the stores and load what measures.

    Raises:
        StageError: if a store is missing, damaged or of another base than data/base, or a model cannot be
            loaded.
    """
    use_same_kernels()
    check_base(BASE)
    latents, conditioning = read_latents(resident=False), read_conditioning(resident=False)
    samples = read_samples(latents, conditioning, PAIR_CAPTIONS)
    if fingerprint_of_images(image_index(PAIR_IMAGES)) != latents.images:
        raise StageError(
            f"{PAIR_IMAGES}: expected the images that {LATENTS} was made of, got others; "
            "run `dvc repro encode_images`"
        )
    check_vae(latents, BASE / "vae")
    check_text_encoder(conditioning, BASE)
    clip = _clip_of_the_base()
    inception = _inception_for_fid(options, clip)
    chosen = metric_samples(samples, options.num_metric_samples) if clip else []
    made_from = {
        "base": hash_file(BASE / SUMS),
        "latents": latents.fingerprint,
        "captions": conditioning.fingerprint,
        "pairs": fingerprint([dataclasses.astuple(sample) for sample in samples]),
        "params": fingerprint([[getattr(options, name) for name in RENDERED], vars(validation)]),
    }
    return Bench(latents, conditioning, samples, clip, inception, chosen, made_from)


def judge(
    bench: Bench,
    unet: Path,
    options: Evaluate,
    validation: Validation,
    output: Path,
    placeholder: Placeholder | None = None,
) -> tuple[Measurements, list[MadePicture], Renderer]:
    """Render and measure one UNet.

    Args:
        bench: as `set_up` gives it.
        unet: directory of the UNet.
        options, validation: what is rendered, and how the held-out loss is measured.
        output: gets samples/, metric_samples/ and denoising.png.
        placeholder: a learned word, which prompts and captions may hold.

    Returns:
        What was measured, the pictures that were, in that order, and what rendered them.
    """
    captions = [sample.captions[0] for sample in bench.chosen]
    renderer = load_renderer(
        BASE, unet, options, [*options.prompts, *captions],
        bench.latents.resolution, bench.conditioning.clip_skip, bench.conditioning.num_chunks, placeholder,
    )  # fmt: skip
    output.mkdir(parents=True, exist_ok=True)
    fresh_directory(output / "samples")  # what lies beside it may be another stage's
    scheduler = training_scheduler(sampler_config(BASE, unet))
    pipeline = renderer.pipeline
    losses = validation_losses(
        pipeline.unet.forward, scheduler, bench.latents, _with_placeholder(bench, renderer), bench.samples,
        validation, pipeline.device,
    )  # fmt: skip
    pictures = save_metric_pictures(renderer, options, bench.chosen, output / "metric_samples")
    pictures += save_samples(renderer, options, output)
    paths = [made.path for made in pictures]
    measured = measure_unet(losses, scheduler, bench.clip, bench.inception, paths, captions)
    return dataclasses.replace(measured, made_from=bench.made_from), pictures, renderer


def _with_placeholder(bench: Bench, renderer: Renderer) -> Conditioning:
    """What held-out losses are measured with: first captions that hold a learned word are encoded with it."""
    placeholder, known = renderer.placeholder, bench.conditioning
    captions = list(dict.fromkeys(each.captions[0] for each in bench.samples if each.split == VALIDATION))
    learned = [] if placeholder is None else [text for text in captions if placeholder.word in text]
    if not learned:
        return known
    rows = torch.cat([torch.tensor([known.empty_row]), known.rows(captions)])
    states = known.states(rows, torch.device("cpu"))  # (1 + U, num_chunks * 77, D)
    row_of = {text: row for row, text in enumerate(captions, 1)}
    for text in learned:  # rounded as stored captions are
        states[row_of[text]] = conditions_of(renderer, text)[STATES].cpu().half().float()
    return dataclasses.replace(known, encoder_hidden_states=states, row_of=row_of, empty_row=0)


def check_trained(unet: Path, previews: Path) -> None:
    """Verify what train has made, and that all of it is of one run; StageError says what is not."""
    check_sums(unet, "train")
    check_sums(previews, "train")
    recorded = read_json(previews / RUN_FILE, remedy("train")).get("unet_sha256")
    if recorded != hash_file(unet / SUMS):
        raise StageError(
            f"{previews}: expected the previews of {unet}, got those of another run; run `dvc repro train`"
        )


def check_baseline(base: Measurements, bench: Bench, directory: Path) -> None:
    """Raise StageError if the base was judged on another bench, or its pictures are not those it made."""
    if differing := [name for name, value in bench.made_from.items() if base.made_from.get(name) != value]:
        raise StageError(
            f"{directory}: expected the base measured with what is there now, got it measured with other "
            f"{', '.join(differing)}; run `dvc repro baseline`"
        )
    check_hashes(
        directory,
        {name: value for name, value in base.files.items() if name.startswith("samples/")},
        "baseline",
    )


def check_same_inception(base: Measurements, inception: Inception | None) -> None:
    """Raise StageError if the base was measured with another Inception, or with none."""
    if base.inception_fingerprint != (inception.fingerprint if inception else ""):
        raise StageError(
            "evaluate.inception_weights: the file is not the one that data/baseline was measured with; "
            "run `dvc repro -f -s baseline`, then `dvc repro`"
        )


def _clip_of_the_base() -> Clip | None:
    if BASE_CLIP.is_dir():
        return load_clip(BASE_CLIP)
    logger.info(
        "%s: not there, so metrics on CLIP features are left out; see fetch_base.clip_source", BASE_CLIP
    )
    return None


def _inception_for_fid(options: Evaluate, clip: Clip | None) -> Inception | None:
    if options.inception_weights is None:
        return None
    if clip is None:
        raise StageError(
            "evaluate.inception_weights: FID is measured on the pictures that CLIP's metrics are, and "
            f"{BASE} has no clip/; set fetch_base.clip_source, or inception_weights to null"
        )
    return load_inception(Path(options.inception_weights))
