"""Render and measure the fine-tuned UNet on the problems of the base, and draw both side by side.

Reads  data/base, data/unet, data/embeddings, data/training/previews, data/baseline, data/latents.zarr,
       data/captions.zarr, data/pairs; the file of evaluate.inception_weights
Writes data/evaluation: samples/, metric_samples/, grids/, sweep.png, denoising.png, learning.png,
       nearest.png, measurements.safetensors, pictures.json
Params evaluate (what is rendered and measured, no statistics), validation
"""

from __future__ import annotations

from stages.lib.core.paths import (
    BASELINE,
    BASELINE_MEASUREMENTS,
    EMBEDDINGS,
    EVALUATION,
    EVALUATION_MEASUREMENTS,
    EVALUATION_PICTURES,
    PAIR_IMAGES,
    PREVIEWS,
    TRAINED_UNET,
)
from stages.lib.core.sums import SUMS, hash_file, write_sealed_json
from stages.lib.evaluation.measuring.bench import (
    check_baseline,
    check_same_inception,
    check_trained,
    judge,
    set_up,
)
from stages.lib.evaluation.measuring.measurements import read_measurements, write_measurements
from stages.lib.evaluation.measuring.pictures import (
    draw_beside_base,
    draw_nearest,
    hashes_of_pictures,
    learning,
    training_examples,
)
from stages.lib.evaluation.measuring.rendering import settings
from stages.lib.frame.params import Params
from stages.lib.frame.run import run_stage
from stages.lib.inversion.placeholder import read_placeholder


def main(params: Params) -> None:
    options = params.evaluate
    check_trained(TRAINED_UNET, PREVIEWS)
    placeholder = read_placeholder()
    bench = set_up(options, params.validation)
    base, reference = read_measurements(BASELINE_MEASUREMENTS, "baseline")
    check_baseline(base, bench, BASELINE)
    check_same_inception(base, bench.inception)
    measured, pictures, renderer = judge(
        bench, TRAINED_UNET, options, params.validation, EVALUATION, placeholder
    )
    write_measurements(EVALUATION_MEASUREMENTS, measured)

    learning(renderer, PREVIEWS).save(EVALUATION / "learning.png")
    draw_beside_base(options, bench.samples, PAIR_IMAGES, BASELINE, EVALUATION)
    drawing, memorised = draw_nearest(
        pictures, measured.picture_features, reference, bench.samples, PAIR_IMAGES, options.num_worst_pairs
    )
    drawing.save(EVALUATION / "nearest.png")
    shown = {
        "unet_sha256": hash_file(TRAINED_UNET / SUMS),
        "measurements_sha256": hash_file(EVALUATION_MEASUREMENTS),
        "base_files": dict(base.files),
        "files": hashes_of_pictures(EVALUATION),
        "prompts": list(options.prompts),
        "seeds": list(options.seeds),
        "settings": [{"name": setting.name, **vars(setting)} for setting in settings(options)],
        "examples": training_examples(options, bench.samples),
        "memorised": memorised,
    }
    if placeholder is not None:
        shown["embeddings_sha256"] = hash_file(EMBEDDINGS / SUMS)
    write_sealed_json(EVALUATION_PICTURES, shown)


if __name__ == "__main__":
    run_stage(
        "evaluate",
        (
            "evaluate.prompts",
            "evaluate.negative_prompt",
            "evaluate.seeds",
            "evaluate.scheduler",
            "evaluate.guidance_scale",
            "evaluate.num_inference_steps",
            "evaluate.batch_size",
            "evaluate.denoising_every_steps",
            "evaluate.num_metric_samples",
            "evaluate.inception_weights",
            "evaluate.num_worst_pairs",
            "validation",
        ),
        main,
    )
