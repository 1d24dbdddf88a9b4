"""Render evaluation pictures and measure the held-out loss, of the base UNet or of the trained one.

`python -m stages.evaluate baseline` is the stage baseline, `python -m stages.evaluate tuned` evaluate.

Reads  data/base, data/latents.zarr, data/captions.zarr, data/pairs; data/unet and data/baseline (tuned)
Writes data/baseline: samples/, contact_sheet.png, metrics.json
       data/evaluation: samples/, grids/ with base and trained side by side, metrics.json
Params evaluate, validation
"""

from __future__ import annotations

import functools
import io
import sys
from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from PIL import Image

from stages.lib.base_model import load_scheduler
from stages.lib.conditioning import check_text_encoder, read_conditioning
from stages.lib.grids import Row, draw_grid
from stages.lib.latents import Latents, check_vae, read_latents
from stages.lib.pairs import SampleCaptions, read_captions, read_images
from stages.lib.params import Evaluate, Params
from stages.lib.rendering import load_pipeline, render, settings
from stages.lib.stage_run import fresh_directory, read_json, run_stage, write_json
from stages.lib.validation import validation_loss

BASE, UNET, PAIRS = Path("data/base"), Path("data/unet"), Path("data/pairs")
BASELINE, EVALUATION = Path("data/baseline"), Path("data/evaluation")


def main(params: Params, stage: str) -> None:
    is_tuned = stage == "evaluate"
    unet, output = (UNET, EVALUATION) if is_tuned else (BASE / "unet", BASELINE)
    options = params.evaluate
    latents, conditioning = read_latents(), read_conditioning()
    check_vae(latents, BASE / "vae")
    check_text_encoder(conditioning, BASE / "text_encoder")
    samples = latents.encoded(read_captions(PAIRS / "captions.parquet"))
    pipeline = load_pipeline(BASE, unet)
    fresh_directory(output)
    loss = validation_loss(
        pipeline.unet.forward,
        load_scheduler(BASE),
        latents,
        conditioning,
        samples,
        params.validation,
        pipeline.device,
    ).get("validation_loss")

    for setting in settings(options):
        folder = fresh_directory(output / "samples" / setting.name)
        for index, seed, picture in render(
            pipeline, options, setting, conditioning.clip_skip, latents.resolution, conditioning.num_chunks
        ):
            picture.save(folder / sample_name(index, seed))
    if is_tuned:
        fresh_directory(output / "grids")
        examples = training_examples(options, samples)
        for setting in settings(options):
            grid = side_by_side(options, setting.name, examples, f"guidance {setting.guidance_scale:g}, "
                                f"{setting.num_inference_steps} steps")  # fmt: skip
            grid.save(output / "grids" / f"{setting.name}.png")
        metrics = compare(read_json(BASELINE / "metrics.json")["base_validation_loss"], loss)
    else:
        contact_sheet(options, samples, latents, pipeline).save(output / "contact_sheet.png")
        metrics = {"base_validation_loss": loss}
    write_json(output / "metrics.json", metrics)


def sample_name(index: int, seed: int) -> str:
    return f"prompt{index:02d}_seed{seed}.png"


def compare(base_loss: float | None, tuned_loss: float | None) -> dict[str, float | None]:
    """Held-out loss of both UNets and the relative change, negative where the trained one is better."""
    change = None if base_loss is None or tuned_loss is None else tuned_loss / base_loss - 1.0
    return {
        "base_validation_loss": base_loss,
        "tuned_validation_loss": tuned_loss,
        "validation_loss_change": change,
    }


def training_examples(options: Evaluate, samples: list[SampleCaptions]) -> dict[str, Image.Image]:
    """Prompt -> an image of the training split that has it as its caption, where there is one."""
    sample_of: dict[str, str] = {}
    for sample in samples:
        for caption in sample.captions:
            if sample.split == "train" and caption in options.prompts:
                sample_of.setdefault(caption, sample.sample_id)
    images = read_images(PAIRS / "images", sorted(set(sample_of.values())))
    return {prompt: open_image(images[sample_id]) for prompt, sample_id in sample_of.items()}


def side_by_side(options: Evaluate, setting: str, examples: dict[str, Image.Image], how: str) -> Image.Image:
    """One row a prompt: a training example, the base's pictures, the trained UNet's pictures."""
    columns = ["training example"]
    columns += [f"base, seed {seed}" for seed in options.seeds]
    columns += [f"fine-tuned, seed {seed}" for seed in options.seeds]
    rows = []
    for index, prompt in enumerate(options.prompts):
        files = [
            folder / "samples" / setting / sample_name(index, seed)
            for folder in (BASELINE, EVALUATION)
            for seed in options.seeds
        ]
        rows.append(Row(prompt, [examples.get(prompt), *map(Image.open, files)]))
    return draw_grid(f"Base and fine-tuned UNet, {how}", columns, rows)


@torch.inference_mode()
def contact_sheet(
    options: Evaluate, samples: list[SampleCaptions], latents: Latents, pipeline: StableDiffusionPipeline
) -> Image.Image:
    """Training images with their captions, and what the VAE gives back of them."""
    chosen = [sample for sample in samples if sample.split == "train"]
    step = max(1, len(chosen) // options.num_contact_samples)
    chosen = chosen[::step][: options.num_contact_samples]
    images = read_images(PAIRS / "images", [sample.sample_id for sample in chosen])
    rows = []
    for sample in chosen:
        mean, _ = latents.moments(latents.rows([sample.sample_id]), 0, pipeline.device)  # (1, 4, h, w)
        decoded = pipeline.vae.decode(mean.float()).sample.cpu()
        reconstruction = pipeline.image_processor.postprocess(decoded, output_type="pil")[0]
        rows.append(Row(sample.captions[0], [open_image(images[sample.sample_id]), reconstruction]))
    half = (len(rows) + 1) // 2
    sheets = [
        draw_grid("Training pairs", ["image", "VAE reconstruction"], part)
        for part in (rows[:half], rows[half:])
        if part
    ]
    sheet = Image.new(
        "RGB", (sum(part.width for part in sheets), max(part.height for part in sheets)), "#ffffff"
    )
    left = 0
    for part in sheets:
        sheet.paste(part, (left, 0))
        left += part.width
    return sheet


def open_image(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


if __name__ == "__main__":
    stages = {"baseline": "baseline", "tuned": "evaluate"}
    if len(sys.argv) != 2 or sys.argv[1] not in stages:
        sys.exit("usage: python -m stages.evaluate baseline|tuned")
    stage_name = stages[sys.argv[1]]
    run_stage(stage_name, ("evaluate", "validation"), functools.partial(main, stage=stage_name))
