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

from stages.lib.base_model import BASE
from stages.lib.clip_features import Clip, load_clip
from stages.lib.conditioning import check_text_encoder, read_conditioning
from stages.lib.devices import use_same_kernels
from stages.lib.errors import StageError
from stages.lib.evaluation_pictures import (
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
from stages.lib.evaluation_report import (
    base_numbers,
    compared_numbers,
    metrics_of,
    nearest_training_images,
    report_entries,
    summary_of,
)
from stages.lib.grids import draw_message
from stages.lib.inception_features import Inception, load_inception
from stages.lib.latents import check_vae, read_latents
from stages.lib.measurements import (
    Measurements,
    Reference,
    measure_data,
    measure_unet,
    read_measurements,
    write_measurements,
)
from stages.lib.objective import training_scheduler
from stages.lib.pairs import TRAIN, SampleCaptions, read_captions, read_images
from stages.lib.params import Evaluate, Params
from stages.lib.rendering import load_renderer, sampling_config, settings
from stages.lib.stage_run import fresh_directory, run_stage, write_json
from stages.lib.validation import validation_losses

logger = logging.getLogger(__name__)

CLIP, UNET, IMAGES = BASE / "clip", Path("data/unet"), Path("data/pairs/images")
BASELINE, EVALUATION, PREVIEWS = (
    Path("data/baseline"),
    Path("data/evaluation"),
    Path("data/training/previews"),
)


def main(params: Params, stage: str) -> None:
    is_tuned = stage == "evaluate"
    unet, output = (UNET, EVALUATION) if is_tuned else (BASE / "unet", BASELINE)
    options = params.evaluate
    use_same_kernels()
    latents, conditioning = read_latents(resident=False), read_conditioning(resident=False)
    check_vae(latents, BASE / "vae")
    check_text_encoder(conditioning, BASE / "text_encoder")
    samples = latents.encoded(read_captions(Path("data/pairs/captions.parquet")))
    clip = clip_of_the_base()
    inception = inception_for_fid(options, clip)
    if is_tuned:
        base, reference = read_measurements(BASELINE / "measurements.safetensors")
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
        reference = measure_data(clip, inception, samples, IMAGES, latents.resolution) if clip else None
        write_measurements(BASELINE / "measurements.safetensors", measured, reference)
        contact_sheet(renderer, options, samples, latents, IMAGES).save(BASELINE / "contact_sheet.png")
        metrics = metrics_of(measured, reference, [made.caption for made in pictures], options)
        write_json(BASELINE / "metrics.json", base_numbers(metrics, measured, options))


def clip_of_the_base() -> Clip | None:
    if CLIP.is_dir():
        return load_clip(CLIP)
    logger.info("%s: not there, so metrics on CLIP features are left out; see fetch_base.clip_source", CLIP)
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
    images = read_images(IMAGES, sorted(set(example_of.values())))
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
    drawing, pairs = nearest_pairs(pictures, nearest, training, IMAGES, options.num_worst_pairs)
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
