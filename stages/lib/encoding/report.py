"""What to look at after encoding: shapes and what they crop, images left out, the worst reconstructions."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from stages.lib.core.draws import unit_interval
from stages.lib.core.files import write_json_lines
from stages.lib.drawing.grids import GridRow, draw_grid
from stages.lib.encoding.framing import FramedImage, LeftOut
from stages.lib.store.work_store import WorkStore

NUM_WORST = 8


@dataclass(frozen=True)
class Reconstruction:
    """One image and its way through the VAE and back.

    Attributes:
        sample_id: of the image.
        psnr: dB, on the 8-bit range.
        ssim: at most 1.
        decoded: (height, width, 3) uint8.
    """

    sample_id: str
    psnr: float
    ssim: float
    decoded: np.ndarray


def read_reconstructions(decoded: WorkStore, images: list[FramedImage]) -> list[Reconstruction]:
    """What `reconstruct` made of ``images``."""
    rows = decoded.rows([image.keys[0] for image in images])
    return [
        Reconstruction(image.sample_id, float(row["psnr"]), float(row["ssim"]), row["decoded"])
        for image, row in zip(images, rows, strict=True)
    ]


def fixed_sample(images: Sequence[FramedImage], count: int) -> list[FramedImage]:
    """``count`` of the images, chosen by name alone: new images change few of them."""
    order = sorted(images, key=lambda image: unit_interval(0, "reconstruction", image.sample_id))
    return sorted(order[:count], key=lambda image: image.sample_id)


def scores(reconstructions: Sequence[Reconstruction]) -> dict[str, float]:
    """Mean and worst of each score."""
    psnr = [each.psnr for each in reconstructions]
    ssim = [each.ssim for each in reconstructions]
    return {
        "reconstruction_psnr": float(np.mean(psnr)),
        "reconstruction_psnr_worst": min(psnr),
        "reconstruction_ssim": float(np.mean(ssim)),
        "reconstruction_ssim_worst": min(ssim),
    }


def worst(reconstructions: Sequence[Reconstruction]) -> list[Reconstruction]:
    """Those with the lowest PSNR, the lowest first."""
    return sorted(reconstructions, key=lambda each: (each.psnr, each.sample_id))[:NUM_WORST]


def draw_reconstructions(
    title: str, reconstructions: Sequence[Reconstruction], pictures: Sequence[np.ndarray]
) -> Image.Image:
    """Each picture, (height, width, 3) uint8, beside what the VAE makes of it, with name and scores."""
    rows = [
        GridRow(
            f"{each.sample_id} PSNR {each.psnr:.1f} dB, SSIM {each.ssim:.2f}",
            [Image.fromarray(picture), Image.fromarray(each.decoded)],
        )
        for each, picture in zip(reconstructions, pictures, strict=True)
    ]
    return draw_grid(title, ["image", "VAE reconstruction"], rows)


def write_left_out(path: Path, left_out: Sequence[LeftOut]) -> None:
    """A JSON object a line."""
    write_json_lines(path, [image._asdict() for image in left_out])


def write_shapes(path: Path, groups: Sequence[Sequence[FramedImage]]) -> None:
    """A line a shape: how many images it holds, and how much they were cropped and enlarged."""
    with open(path, "w", newline="", encoding="utf-8") as handle:
        table = csv.writer(handle, lineterminator="\n")
        table.writerow(["width", "height", "images", "mean_cropped", "most_cropped", "most_upscaled"])
        for images in groups:
            cropped = [image.cropped_fraction for image in images]
            numbers = [np.mean(cropped), max(cropped), max(image.upscaled for image in images)]
            table.writerow([*images[0].size, len(images), *(f"{number:.4f}" for number in numbers)])


def channel_statistics(means: Iterable[np.ndarray]) -> dict[str, float]:
    """Mean and standard deviation of each latent channel, unscaled, summed in float64.

    Args:
        means: blocks (N, V, C, h, w), one in memory at a time.
    """
    count, total, squares = 0, np.zeros(1), np.zeros(1)
    for block in means:
        values = block.astype(np.float64)
        count += values.size // values.shape[2]
        total = total + values.sum(axis=(0, 1, 3, 4))
        squares = squares + np.square(values).sum(axis=(0, 1, 3, 4))
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0.0))
    return {
        f"latent_{name}_{channel}": float(values[channel])
        for name, values in (("mean", mean), ("std", std))
        for channel in range(len(values))
    }
