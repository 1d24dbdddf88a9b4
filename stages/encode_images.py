"""Encode every image once with the frozen VAE into the moments of its latents.

Reads  data/pairs/images, data/base/vae
Writes data/latents.zarr (mean, logvar (N, V, 4, h, w) float16 unscaled, sample_id (N,); with buckets
       one such group for each shape, named by its width and height in pixels),
       data/encode_images_report (shapes.csv, left_out.jsonl, worst_reconstructions.png),
       data/encode_images_metrics.json
Params encode_images
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np

from stages.lib.core.files import fresh_directory, write_json
from stages.lib.core.fingerprints import code_identity, environment
from stages.lib.core.paths import BASE, ENCODE_IMAGES_METRICS, ENCODING_REPORT, LATENTS, PAIR_IMAGES
from stages.lib.core.sums import write_sums
from stages.lib.data.image_shards import fingerprint_of_images, image_index, read_images, scan_images
from stages.lib.encoding.autoencoder import (
    RECONSTRUCTION_BATCH_SIZE,
    build_image_encoder,
    build_reconstructor,
)
from stages.lib.encoding.batches import Encoder, InProcess, compute_with_one_thread
from stages.lib.encoding.engine import Item, encode_missing, processes
from stages.lib.encoding.framing import (
    FramedImage,
    Framing,
    LeftOut,
    allowed_sizes,
    check_sizes,
    frame_images,
    nominal_resolution,
    view_names,
)
from stages.lib.encoding.latents_output import all_keys, by_shape, write_latents
from stages.lib.encoding.pixels import load_pixels
from stages.lib.encoding.report import (
    Reconstruction,
    channel_statistics,
    draw_reconstructions,
    fixed_sample,
    read_reconstructions,
    scores,
    worst,
    write_left_out,
    write_shapes,
)
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import EncodeImages, Params
from stages.lib.frame.run import run_stage
from stages.lib.frame.start_up import leave_out
from stages.lib.frame.work_directory import work_root
from stages.lib.models.layout import check_component, downsampling, read_vae_config
from stages.lib.models.weights import component_fingerprint
from stages.lib.store.work_store import WorkStore
from stages.lib.store.zarr_store import (
    iter_array,
    verify_store,
)

logger = logging.getLogger(__name__)


def main(params: Params) -> None:
    options = params.encode_images
    check_component(BASE, "vae")
    vae_config = read_vae_config(BASE)
    factor, sizes = downsampling(vae_config), allowed_sizes(options)
    check_sizes(sizes, factor)
    entries = image_index(PAIR_IMAGES)
    images, left_out = frame_images(entries, sizes, options)
    check_left_out(images, left_out)
    recipe = recipe_of(options)
    moments = WorkStore(work_root(), "encode_images", recipe)
    encode(moments, images, options)
    checked = fixed_sample(images, options.num_reconstructions)
    decoded = WorkStore(work_root(), "reconstruct_images", recipe_of_reconstructions(recipe))
    reconstruct(decoded, moments, checked, options)
    if not processes().is_main_process:
        return

    attributes = {
        "scaling_factor": vae_config["scaling_factor"],
        "shift_factor": vae_config["shift_factor"],
        "resolution": nominal_resolution(options, factor),
        "views": view_names(options),
        "left_out": [image.sample_id for image in left_out],
        "model_fingerprint": recipe["model"],
        "images": fingerprint_of_images(entries),
    }
    groups = by_shape(images, options)
    redone = write_latents(moments, groups, attributes, factor, vae_config["latent_channels"])
    store = verify_store(LATENTS, "encode_images")
    reconstructions = read_reconstructions(decoded, checked)
    write_report(groups, left_out, reconstructions, options)
    means = (block for name in groups for block in iter_array(LATENTS, store, f"{name}mean", "encode_images"))
    metrics = {
        "num_encoded_images": len(images),
        "num_left_out": len(left_out),
        "num_redone_in_float32": len(redone),
        "cropped_fraction": float(np.mean([image.cropped_fraction for image in images])),
        **channel_statistics(means),
        **scores(reconstructions),
    }
    write_json(ENCODE_IMAGES_METRICS, metrics)


def recipe_of(options: EncodeImages) -> dict[str, Any]:
    """All that determines the bytes of a view's moments, but for the image and its framing."""
    return {
        "model": component_fingerprint(BASE / "vae"),
        "interpolation": options.interpolation,
        "jpeg_draft": options.jpeg_draft,
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "code": code_identity(build_image_encoder, load_view, InProcess, compute_with_one_thread),
        **environment("diffusers", "pillow"),
    }


def recipe_of_reconstructions(recipe: dict[str, Any]) -> dict[str, Any]:
    """As `recipe_of`, for what the VAE makes of those moments."""
    return {
        "moments": recipe,
        "code": code_identity(build_reconstructor, load_view_and_mean, InProcess, compute_with_one_thread),
        **environment("scikit-image"),
    }


def check_left_out(images: list[FramedImage], left_out: list[LeftOut]) -> None:
    """Say what is left out; raise StageError if that is everything."""
    if left_out:
        logger.warning("%d images are too small, see %s", len(left_out), ENCODING_REPORT / "left_out.jsonl")
    if not images:
        raise StageError(
            f"all {len(left_out)} images are too small, the first: {left_out[0].sample_id}: "
            f"{left_out[0].reason}; raise it, or allow smaller shapes"
        )


def encode(moments: WorkStore, images: list[FramedImage], options: EncodeImages) -> None:
    """Rows of mean and logvar for every view of every image, in the work store."""
    image_of = {image.sample_id: image for image in images}
    names = view_names(options)

    def items(missing: set[str]) -> Iterator[Item]:
        wanted = {image.sample_id for image in images if not missing.isdisjoint(image.keys)}
        for sample_id, content in scan_images(PAIR_IMAGES, wanted):
            image = image_of[sample_id]
            for key, view, name in zip(image.keys, image.views, names, strict=True):
                yield Item(key, f"{sample_id} ({name})", (content, view), image.size)

    load = functools.partial(load_view, options)
    encoder = Encoder(load, build_image_encoder, options.batch_size, options.dtype)
    unit = "images" if len(names) == 1 else "views"
    encode_missing(moments, all_keys(images), items, encoder, "encode images", unit)


def reconstruct(
    decoded: WorkStore, moments: WorkStore, images: list[FramedImage], options: EncodeImages
) -> None:
    """Rows of psnr, ssim and decoded for the centre view of ``images``, in the work store."""

    def items(missing: set[str]) -> Iterator[Item]:
        wanted = [image for image in images if image.keys[0] in missing]
        contents = read_images(PAIR_IMAGES, [image.sample_id for image in wanted])
        rows = moments.rows([image.keys[0] for image in wanted])
        for image, row in zip(wanted, rows, strict=True):
            value = (contents[image.sample_id], image.views[0], row["mean"])
            yield Item(image.keys[0], image.sample_id, value, image.size)

    load = functools.partial(load_view_and_mean, options)
    encoder = Encoder(load, build_reconstructor, RECONSTRUCTION_BATCH_SIZE, options.dtype)
    keys = [image.keys[0] for image in images]
    encode_missing(decoded, keys, items, encoder, "reconstruct images", "images")


def load_view(options: EncodeImages, value: tuple[bytes, Framing]) -> np.ndarray:
    """(image, framing) -> (height, width, 3) uint8."""
    return load_pixels(*value, options.interpolation, options.jpeg_draft)


def load_view_and_mean(
    options: EncodeImages, value: tuple[bytes, Framing, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(image, framing, mean) -> (height, width, 3) uint8, mean (4, h, w)."""
    image, framing, mean = value
    return load_view(options, (image, framing)), mean


def write_report(
    groups: dict[str, list[FramedImage]],
    left_out: list[LeftOut],
    reconstructions: list[Reconstruction],
    options: EncodeImages,
) -> None:
    """data/encode_images_report: shapes, images left out, and the worst reconstructions drawn."""
    fresh_directory(ENCODING_REPORT)
    write_left_out(ENCODING_REPORT / "left_out.jsonl", left_out)
    write_shapes(ENCODING_REPORT / "shapes.csv", list(groups.values()))
    centre = {image.sample_id: image.views[0] for images in groups.values() for image in images}
    drawn = worst(reconstructions)
    contents = read_images(PAIR_IMAGES, [each.sample_id for each in drawn])
    pictures = [load_view(options, (content, centre[name])) for name, content in contents.items()]
    title = f"The {len(drawn)} worst of {len(reconstructions)} reconstructions"
    draw_reconstructions(title, drawn, pictures).save(ENCODING_REPORT / "worst_reconstructions.png")
    write_sums(ENCODING_REPORT)


if __name__ in ("__main__", "__mp_main__"):  # the stage, or a process that it started
    leave_out("peft", "transformers")
if __name__ == "__main__":
    run_stage("encode_images", ("encode_images",), main, distributed=True)
