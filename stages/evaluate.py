"""Render evaluation pictures and measure them and the held-out loss, of the base UNet or of the trained one.

`python -m stages.evaluate baseline` is the stage baseline, `python -m stages.evaluate tuned` evaluate.

Reads  data/base, data/latents.zarr, data/captions.zarr, data/pairs; tuned: data/unet, data/training/previews,
       data/baseline; the file of evaluate.inception_weights, if any
Writes data/baseline: samples/, metric_samples/, denoising.png, contact_sheet.png, measurements.safetensors,
       metrics.json
       data/evaluation: samples/, metric_samples/, grids/ with base and trained side by side, sweep.png,
       denoising.png, learning.png, nearest.png, report.json, metrics.json, summary.json
Params evaluate, validation
"""

from __future__ import annotations

import functools
import logging
import sys
from pathlib import Path

from stages.lib.core.devices import use_same_kernels
from stages.lib.core.files import fresh_directory, write_json
from stages.lib.core.paths import (
    BASE,
    BASE_CLIP,
    BASE_UNET,
    BASELINE,
    BASELINE_MEASUREMENTS,
    EVALUATION,
    PAIR_CAPTIONS,
    PAIR_IMAGES,
    PREVIEWS,
    TRAINED_UNET,
)
from stages.lib.data.pairs import TRAIN, SampleCaptions, read_captions, read_images
from stages.lib.diffusion.schedule import training_scheduler
from stages.lib.diffusion.validation import validation_losses
from stages.lib.drawing.grids import draw_message
from stages.lib.encoding.conditioning import check_text_encoder, read_conditioning
from stages.lib.encoding.latents import check_vae, read_latents
from stages.lib.evaluation.clip_features import Clip, load_clip
from stages.lib.evaluation.inception_features import Inception, load_inception
from stages.lib.evaluation.measurements import (
    Measurements,
    Reference,
    measure_data,
    measure_unet,
    read_measurements,
    write_measurements,
)
from stages.lib.evaluation.pictures import (
    MadePicture,
    contact_sheet,
    learning,
    metric_samples,
    nearest_pairs,
    open_image,
    save_metric_pictures,
    save_samples,
    side_by_side,
    sweep,
    training_examples,
)
from stages.lib.evaluation.rendering import load_renderer, sampling_config, settings
from stages.lib.evaluation.report import (
    base_numbers,
    compared_numbers,
    metrics_of,
    nearest_training_images,
    report_entries,
    summary_of,
)
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import Evaluate, Params
from stages.lib.frame.run import run_stage

logger = logging.getLogger(__name__)


def main(params: Params, stage: str) -> None:
    is_tuned = stage == "evaluate"
    unet, output = (TRAINED_UNET, EVALUATION) if is_tuned else (BASE_UNET, BASELINE)
    options = params.evaluate
    use_same_kernels()
    latents, conditioning = read_latents(resident=False), read_conditioning(resident=False)
    check_vae(latents, BASE / "vae")
    check_text_encoder(conditioning, BASE / "text_encoder")
    samples = latents.encoded(read_captions(PAIR_CAPTIONS))
    clip = clip_of_the_base()
    inception = inception_for_fid(options, clip)
    if is_tuned:
        base, reference = read_measurements(BASELINE_MEASUREMENTS)
        check_same_inception(base, inception)
    chosen = metric_samples(samples, options.num_metric_samples) if clip else []
    captions = [sample.captions[0] for sample in chosen]
    renderer = load_renderer(
        BASE,
        unet,
        options,
        [*options.prompts, *captions],
        latents.resolution,
        conditioning.clip_skip,
        conditioning.num_chunks,
    )
    fresh_directory(output)

    scheduler = training_scheduler(sampling_config(BASE, unet))
    forward, device = renderer.pipeline.unet.forward, renderer.pipeline.device
    losses = validation_losses(forward, scheduler, latents, conditioning, samples, params.validation, device)
    pictures = save_metric_pictures(renderer, options, chosen, output / "metric_samples")
    pictures += save_samples(renderer, options, output)
    measured = measure_unet(losses, scheduler, clip, inception, [made.path for made in pictures], captions)

    if is_tuned:
        learning(renderer, PREVIEWS).save(EVALUATION / "learning.png")
        draw_beside_base(options, samples)
        memorised = draw_nearest(options, samples, pictures, measured, reference)
        metrics = metrics_of(base, reference, [made.caption for made in pictures], options)
        entries = report_entries(metrics, base, measured, options)
        write_report(options, samples, entries, memorised)
        numbers = compared_numbers(entries)
        write_json(EVALUATION / "metrics.json", numbers)
        write_json(EVALUATION / "summary.json", summary_of(numbers))
    else:
        reference = measure_data(clip, inception, samples, PAIR_IMAGES, latents.resolution) if clip else None
        write_measurements(BASELINE_MEASUREMENTS, measured, reference)
        contact_sheet(renderer, options, samples, latents, PAIR_IMAGES).save(BASELINE / "contact_sheet.png")
        metrics = metrics_of(measured, reference, [made.caption for made in pictures], options)
        write_json(BASELINE / "metrics.json", base_numbers(metrics, measured, options))


def clip_of_the_base() -> Clip | None:
    if BASE_CLIP.is_dir():
        return load_clip(BASE_CLIP)
    logger.info(
        "%s: not there, so metrics on CLIP features are left out; see fetch_base.clip_source", BASE_CLIP
    )
    return None


def inception_for_fid(options: Evaluate, clip: Clip | None) -> Inception | None:
    if options.inception_weights is None:
        return None
    if clip is None:
        raise StageError(
            "evaluate.inception_weights: FID is measured on the pictures that CLIP's metrics are, and "
            "data/base has no clip/; set fetch_base.clip_source, or inception_weights to null"
        )
    return load_inception(Path(options.inception_weights))


def check_same_inception(base: Measurements, inception: Inception | None) -> None:
    if base.inception_fingerprint != (inception.fingerprint if inception else ""):
        raise StageError(
            "evaluate.inception_weights: the file is not the one that data/baseline was measured with; "
            "run `dvc repro -f -s baseline`, then `dvc repro`"
        )


def draw_beside_base(options: Evaluate, samples: list[SampleCaptions]) -> None:
    """The grid of each setting, and the sweep over all of them."""
    example_of = training_examples(options, samples)
    images = read_images(PAIR_IMAGES, sorted(set(example_of.values())))
    examples = {prompt: open_image(images[sample_id]) for prompt, sample_id in example_of.items()}
    fresh_directory(EVALUATION / "grids")
    for setting in settings(options):
        grid = side_by_side(options, setting, BASELINE, EVALUATION, examples)
        grid.save(EVALUATION / "grids" / f"{setting.name}.png")
    sweep(options, BASELINE, EVALUATION).save(EVALUATION / "sweep.png")


def draw_nearest(
    options: Evaluate,
    samples: list[SampleCaptions],
    pictures: list[MadePicture],
    measured: Measurements,
    reference: Reference | None,
) -> list[dict[str, str | float]]:
    """nearest.png; the pairs it shows."""
    if reference is None:
        draw_message("No nearest training images: data/base has no clip/").save(EVALUATION / "nearest.png")
        return []
    training = [sample.sample_id for sample in samples if sample.split == TRAIN]
    nearest = nearest_training_images(measured, reference)
    drawing, pairs = nearest_pairs(pictures, nearest, training, PAIR_IMAGES, options.num_worst_pairs)
    drawing.save(EVALUATION / "nearest.png")
    return pairs


def write_report(
    options: Evaluate,
    samples: list[SampleCaptions],
    entries: list[dict],
    memorised: list[dict[str, str | float]],
) -> None:
    """report.json, what the page shows of the evaluation."""
    report = {
        "prompts": list(options.prompts),
        "seeds": list(options.seeds),
        "settings": [{"name": setting.name, **vars(setting)} for setting in settings(options)],
        "examples": training_examples(options, samples),
        "metrics": entries,
        "memorised": memorised,
    }
    write_json(EVALUATION / "report.json", report)


if __name__ == "__main__":
    stages = {"baseline": "baseline", "tuned": "evaluate"}
    if len(sys.argv) != 2 or sys.argv[1] not in stages:
        sys.exit("usage: python -m stages.evaluate baseline|tuned")
    stage_name = stages[sys.argv[1]]
    run_stage(stage_name, ("evaluate", "validation"), functools.partial(main, stage=stage_name))
