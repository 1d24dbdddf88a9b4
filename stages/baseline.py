"""Render and measure the base UNet, and measure the data: what every fine-tuned UNet is held against.

Reads  data/base, data/latents.zarr, data/captions.zarr, data/pairs; the file of evaluate.inception_weights
Writes data/baseline: samples/, metric_samples/, denoising.png, contact_sheet.png, measurements.safetensors
Params evaluate (what is rendered and measured, no statistics), validation
"""

from __future__ import annotations

import dataclasses

from stages.lib.core.paths import BASE_UNET, BASELINE, BASELINE_MEASUREMENTS, PAIR_IMAGES
from stages.lib.evaluation.measuring.bench import judge, set_up
from stages.lib.evaluation.measuring.measure import measure_data
from stages.lib.evaluation.measuring.measurements import write_measurements
from stages.lib.evaluation.measuring.pictures import contact_sheet, hashes_of_pictures
from stages.lib.frame.params import Params
from stages.lib.frame.run import run_stage


def main(params: Params) -> None:
    options = params.evaluate
    bench = set_up(options, params.validation)
    measured, _, renderer = judge(bench, BASE_UNET, options, params.validation, BASELINE)
    reference = None
    if bench.clip:
        reference = measure_data(
            bench.clip, bench.inception, bench.samples, PAIR_IMAGES, bench.latents.resolution
        )
    sheet = contact_sheet(renderer, options, bench.samples, bench.latents, PAIR_IMAGES)
    sheet.save(BASELINE / "contact_sheet.png")
    files = hashes_of_pictures(BASELINE)
    write_measurements(BASELINE_MEASUREMENTS, dataclasses.replace(measured, files=files), reference)


if __name__ == "__main__":
    run_stage(
        "baseline",
        (
            "evaluate.prompts",
            "evaluate.negative_prompt",
            "evaluate.seeds",
            "evaluate.scheduler",
            "evaluate.guidance_scale",
            "evaluate.num_inference_steps",
            "evaluate.batch_size",
            "evaluate.num_contact_samples",
            "evaluate.denoising_every_steps",
            "evaluate.num_metric_samples",
            "evaluate.inception_weights",
            "validation",
        ),
        main,
    )
