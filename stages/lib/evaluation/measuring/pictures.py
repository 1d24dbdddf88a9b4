"""What an evaluation draws: samples, grids, sweep, denoising and learning strips, nearest training images."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from stages.lib.core.draws import generator
from stages.lib.core.files import fresh_directory
from stages.lib.core.sums import hashes_below
from stages.lib.core.tensors import read_checked
from stages.lib.data.image_shards import read_images
from stages.lib.data.pairs import TRAIN, VALIDATION, SampleCaptions
from stages.lib.data.pictures.decoding import decoded
from stages.lib.drawing.grids import GridRow, draw_grid, draw_message, stack
from stages.lib.encoding.latents import Latents
from stages.lib.evaluation.measuring.measurements import Reference
from stages.lib.evaluation.measuring.nearest import Nearest, nearest_images
from stages.lib.evaluation.measuring.rendering import (
    Rendered,
    Renderer,
    Request,
    Setting,
    decode,
    render,
    settings,
)
from stages.lib.frame.params import Evaluate

NUM_STRIPS = 4  # prompts in the denoising strips


class MadePicture(NamedTuple):
    """A picture in a file."""

    path: Path
    caption: str


def metric_samples(samples: Sequence[SampleCaptions], count: int) -> list[SampleCaptions]:
    """``count`` held-out samples, evenly spaced by sample_id, or all if there are fewer."""
    held_out = [sample for sample in samples if sample.split == VALIDATION]
    count = min(count, len(held_out))
    return [held_out[index * len(held_out) // count] for index in range(count)]


def save_metric_pictures(
    renderer: Renderer, options: Evaluate, samples: Sequence[SampleCaptions], folder: Path
) -> list[MadePicture]:
    """One picture for each sample's first caption, with the first setting and noise of its own."""
    requests = [
        Request(
            sample.captions[0], generator(options.seeds[0], "metric picture", sample.sample_id).initial_seed()
        )
        for sample in samples
    ]
    fresh_directory(folder)
    made = []
    for index, rendered in enumerate(render(renderer, settings(options)[0], requests, "metric pictures")):
        made.append(MadePicture(folder / f"{index:04d}.png", requests[index].prompt))
        rendered.picture.save(made[-1].path)
    return made


def save_samples(renderer: Renderer, options: Evaluate, output: Path) -> list[MadePicture]:
    """Every prompt with every seed in every setting, and the denoising strip of the first setting."""
    cells = list(itertools.product(range(len(options.prompts)), options.seeds))
    requests = [Request(options.prompts[index], seed) for index, seed in cells]
    made = []
    for number, setting in enumerate(settings(options)):
        fresh_directory(output / "samples" / setting.name)
        every_steps = options.denoising_every_steps if number == 0 else None
        strips = []
        pictures = render(renderer, setting, requests, setting.name, every_steps)
        for (index, seed), rendered in zip(cells, pictures, strict=True):
            made.append(MadePicture(sample_path(output, setting, index, seed), options.prompts[index]))
            rendered.picture.save(made[-1].path)
            if index < NUM_STRIPS and seed == options.seeds[0]:
                strips.append((options.prompts[index], rendered))
        if number == 0:
            strip = _denoising(renderer, setting, strips, every_steps)
            strip.save(output / "denoising.png")
    return made


def sample_path(output: Path, setting: Setting, index: int, seed: int) -> Path:
    """Where the picture of a prompt and a seed lies."""
    return output / "samples" / setting.name / f"prompt{index:02d}_seed{seed}.png"


def hashes_of_pictures(output: Path) -> dict[str, str]:
    """Path in ``output`` -> hash of every picture there, for those that read them."""
    return {name: digest for name, digest in hashes_below(output).items() if name.endswith(".png")}


def training_examples(options: Evaluate, samples: Sequence[SampleCaptions]) -> dict[str, str]:
    """Prompt -> sample_id of a training image that has it as a caption, where there is one."""
    sample_of: dict[str, str] = {}
    for sample in samples:
        for caption in sample.captions:
            if sample.split == TRAIN and caption in options.prompts:
                sample_of.setdefault(caption, sample.sample_id)
    return sample_of


def side_by_side(
    options: Evaluate, setting: Setting, base: Path, tuned: Path, examples: Mapping[str, Image.Image]
) -> Image.Image:
    """One row a prompt: a training example, the base's pictures, the fine-tuned UNet's pictures."""
    columns = ["training example"]
    columns += [f"{unet}, seed {seed}" for unet in ("base", "fine-tuned") for seed in options.seeds]
    rows = []
    for index, prompt in enumerate(options.prompts):
        files = [
            sample_path(output, setting, index, seed) for output in (base, tuned) for seed in options.seeds
        ]
        rows.append(GridRow(prompt, [examples.get(prompt), *map(Image.open, files)]))
    return draw_grid(f"Base and fine-tuned UNet, {setting.description}", columns, rows)


def draw_beside_base(
    options: Evaluate, samples: Sequence[SampleCaptions], images: Path, base: Path, tuned: Path
) -> None:
    """In ``tuned`` the grid of each setting, and the sweep over all of them."""
    example_of = training_examples(options, samples)
    found = read_images(images, sorted(set(example_of.values())))
    examples = {prompt: decoded(found[sample_id]) for prompt, sample_id in example_of.items()}
    fresh_directory(tuned / "grids")
    for setting in settings(options):
        grid = side_by_side(options, setting, base, tuned, examples)
        grid.save(tuned / "grids" / f"{setting.name}.png")
    sweep(options, base, tuned).save(tuned / "sweep.png")


def sweep(options: Evaluate, base: Path, tuned: Path) -> Image.Image:
    """The first prompt and seed in every setting: a column for each guidance_scale, fine-tuned above base."""
    rows = []
    for scheduler, steps in itertools.product(options.scheduler, options.num_inference_steps):
        row = [Setting(scheduler, guidance_scale, steps) for guidance_scale in options.guidance_scale]
        sampler = "base's sampler" if scheduler == "base" else scheduler
        for output, unet in ((tuned, "fine-tuned"), (base, "base")):
            files = [sample_path(output, setting, 0, options.seeds[0]) for setting in row]
            rows.append(GridRow(f"{unet}, {sampler}, {steps} steps", list(map(Image.open, files))))
    columns = [f"guidance {guidance_scale:g}" for guidance_scale in options.guidance_scale]
    return draw_grid(f"{options.prompts[0]}, seed {options.seeds[0]}", columns, rows)


def learning(renderer: Renderer, previews: Path) -> Image.Image:
    """One row a caption, one column for each set of latents that training has left in ``previews``."""
    files = sorted(previews.glob("step-*.safetensors"))
    if not files:
        return draw_message("No previews: train.preview_every_steps is null")
    columns: dict[str, list[Image.Image]] = {}
    for file in files:
        tensors, metadata = read_checked(file)
        latents = tensors["latents"]  # (P, 4, h, w)
        columns[f"step {metadata['global_step']}"] = decode(renderer, list(latents))
    captions = json.loads(metadata["captions"])
    rows = [
        GridRow(caption, pictures) for caption, *pictures in zip(captions, *columns.values(), strict=True)
    ]
    return draw_grid("Learning over time", list(columns), rows)


def draw_nearest(
    pictures: Sequence[MadePicture],
    features: torch.Tensor | None,
    reference: Reference | None,
    samples: Sequence[SampleCaptions],
    images: Path,
    count: int,
) -> tuple[Image.Image, list[dict[str, str | float]]]:
    """The pictures nearest to a training image, and the pairs shown; a line of text without CLIP.

    Args:
        pictures: what was made.
        features: (N, D) of them.
        reference: features of the data.
        samples: of both splits.
        images: shards of the images.
        count: pairs to show.
    """
    if reference is None or features is None:
        return draw_message("No nearest training images: data/base has no clip/"), []
    training = [sample.sample_id for sample in samples if sample.split == TRAIN]
    return nearest_pairs(pictures, nearest_images(features, reference.training), training, images, count)


def nearest_pairs(
    pictures: Sequence[MadePicture], nearest: Nearest, training: Sequence[str], images: Path, count: int
) -> tuple[Image.Image, list[dict[str, str | float]]]:
    """Generated pictures beside their nearest training images, the nearest pair first.

    Args:
        pictures: what was compared, row by row.
        nearest: the comparison.
        training: sample_ids of the training images, row by row.
        images: shards of the images.
        count: pairs to show.

    Returns:
        The drawing, and the ``memorised`` entries of report.json.
    """
    pairs = [(pictures[row], training[column], cosine) for row, column, cosine in nearest.worst_pairs(count)]
    found = read_images(images, dict.fromkeys(sample_id for _, sample_id, _ in pairs))
    rows = [
        GridRow(
            f"cosine {cosine:.3f}, {sample_id}: {made.caption}",
            [Image.open(made.path), decoded(found[sample_id])],
        )
        for made, sample_id, cosine in pairs
    ]
    entries: list[dict[str, str | float]] = [
        {"picture": made.path.as_posix(), "sample_id": sample_id, "similarity": round(cosine, 6)}
        for made, sample_id, cosine in pairs
    ]
    return _halves(
        "Pictures and their nearest training images", ["generated", "training image"], rows
    ), entries


def contact_sheet(
    renderer: Renderer, options: Evaluate, samples: Sequence[SampleCaptions], latents: Latents, images: Path
) -> Image.Image:
    """Training images with their captions, and what the VAE gives back of them."""
    chosen = [sample for sample in samples if sample.split == TRAIN]
    step = max(1, len(chosen) // options.num_contact_samples)
    chosen = chosen[::step][: options.num_contact_samples]
    found = read_images(images, [sample.sample_id for sample in chosen])
    means = [
        latents.moments(latents.rows([sample.sample_id]), 0, renderer.pipeline.device)[0][0]
        for sample in chosen
    ]
    scaled = [
        (mean.float() - latents.shift_factor) * latents.scaling_factor for mean in means
    ]  # (4, h, w) each
    rows = [
        GridRow(sample.captions[0], [decoded(found[sample.sample_id]), reconstruction])
        for sample, reconstruction in zip(chosen, decode(renderer, scaled), strict=True)
    ]
    return _halves("Training pairs", ["image", "VAE reconstruction"], rows)


def _denoising(
    renderer: Renderer,
    setting: Setting,
    strips: Sequence[tuple[str, Rendered]],
    every_steps: int | None,
) -> Image.Image:
    """The latents on the way to pictures, decoded: one row a prompt, from noise to the picture."""
    if every_steps is None:
        return draw_message("No denoising strips: evaluate.denoising_every_steps is null")
    length = len(strips[0][1].path)
    # The last has no number: PNDM, for one, takes more steps than num_inference_steps.
    columns = [*(f"step {every_steps * (column + 1)}" for column in range(length - 1)), "picture"]
    decoded = decode(renderer, [latents for _, rendered in strips for latents in rendered.path])
    rows = [
        GridRow(prompt, decoded[number * length : (number + 1) * length])
        for number, (prompt, _) in enumerate(strips)
    ]
    return draw_grid(f"Denoising, {setting.description}", columns, rows)


def _halves(title: str, columns: Sequence[str], rows: Sequence[GridRow]) -> Image.Image:
    """A table of many rows as two tables beside each other."""
    half = (len(rows) + 1) // 2
    return stack(
        [draw_grid(title, columns, part) for part in (rows[:half], rows[half:]) if part], beside=True
    )
