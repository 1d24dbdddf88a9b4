"""Encode every image once with the frozen VAE into the moments of its latents.

Reads  data/pairs/images, data/pairs/masks, data/base/model_index.json, data/base/vae
Writes data/latents.zarr (mean, logvar (N, V, 4, h, w) float16 unscaled, sample_id (N,); with buckets
       or several resolutions one such group for each shape, named by its width and height in pixels;
       with masks also mask (N, V, 1, h, w) float16 in [0, 1]; with SDXL also time_ids (N, V, 6) int32),
       data/encode_images_report (shapes.csv, left_out.jsonl, worst_reconstructions.png),
       data/encode_images_metrics.json
Params encode_images
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from stages.lib.core.files import fresh_directory, write_json
from stages.lib.core.fingerprints import code_identity, environment
from stages.lib.core.paths import (
    BASE,
    ENCODE_IMAGES_METRICS,
    ENCODING_REPORT,
    LATENTS,
    PAIR_IMAGES,
    PAIR_MASKS,
)
from stages.lib.core.sums import write_sums
from stages.lib.data.image_shards import (
    fingerprint_of_images,
    image_index,
    masks_of_images,
    read_images,
    scan_images,
)
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
    nominal_views,
    view_names,
)
from stages.lib.encoding.latents_output import all_keys, by_shape, resolution_of_each, write_latents
from stages.lib.encoding.pixels import build_mask_encoder, load_mask, load_mask_file, load_pixels
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
from stages.lib.models.families.chosen import family_of
from stages.lib.models.layout import check_component, downsampling, read_vae_config
from stages.lib.models.weights import component_fingerprint
from stages.lib.store.blocks import Row
from stages.lib.store.work_store import WorkStore
from stages.lib.store.zarr_store import (
    iter_array,
    verify_store,
)

logger = logging.getLogger(__name__)
MASK_BATCH_SIZE = 16  # rows do not depend on it


def main(params: Params) -> None:
    options = params.encode_images
    check_component(BASE, "vae")
    vae_config = read_vae_config(BASE)
    factor = downsampling(vae_config)
    sizes_of = allowed_sizes(options, factor)
    check_sizes(sizes_of, factor)
    entries = image_index(PAIR_IMAGES)
    images, left_out = frame_images(entries, sizes_of, options)
    check_left_out(images, left_out)
    recipe = recipe_of(options)
    moments = WorkStore(work_root(), "encode_images", recipe)
    encode(moments, images, options)
    nominal = nominal_views(images)
    checked = fixed_sample(nominal, options.num_reconstructions)
    decoded = WorkStore(work_root(), "reconstruct_images", recipe_of_reconstructions(recipe))
    reconstruct(decoded, moments, checked, options)
    masks = None if options.masks == "none" else encoded_masks(images, options, factor)
    if not processes().is_main_process:
        return

    attributes = {
        "scaling_factor": vae_config["scaling_factor"],
        "shift_factor": vae_config["shift_factor"],
        "resolution": next(iter(sizes_of)),
        "views": view_names(options),
        "left_out": [image.sample_id for image in left_out],
        "model_fingerprint": recipe["model"],
        "images": fingerprint_of_images(entries),
    }
    groups = by_shape(images, options)
    if masks is not None:
        attributes["masks"] = options.masks
    if len(sizes_of) > 1:
        attributes |= {"resolutions": list(sizes_of), "resolution_of": resolution_of_each(groups)}
    family = family_of(BASE)
    if family.of_view:
        attributes["factor"] = factor
    redone = write_latents(moments, masks, groups, attributes, factor, vae_config["latent_channels"], family)
    store = verify_store(LATENTS, "encode_images")
    reconstructions = read_reconstructions(decoded, checked)
    write_report(groups, nominal, left_out, reconstructions, options)
    means = (block for name in groups for block in iter_array(LATENTS, store, f"{name}mean", "encode_images"))
    metrics = {
        "num_encoded_images": len(nominal),
        "num_left_out": len(left_out),
        "num_redone_in_float32": len(redone),
        "cropped_fraction": float(np.mean([image.cropped_fraction for image in nominal])),
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


def recipe_of_masks(kind: str, factor: int) -> dict[str, Any]:
    """All that determines the bytes of a view's mask, but for the image or its mask file, and its framing."""
    return {
        "masks": kind,
        "factor": factor,
        "code": code_identity(build_mask_encoder, load_view_of_mask, InProcess, compute_with_one_thread),
        **environment("pillow"),
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
    load = functools.partial(load_view, options)
    encoder = Encoder(load, build_image_encoder, options.batch_size, options.dtype)
    unit = "images" if len(view_names(options)) == len(options.resolution) == 1 else "views"
    encode_missing(moments, all_keys(images), items_of(images, options), encoder, "encode images", unit)


def encoded_masks(
    images: list[FramedImage], options: EncodeImages, factor: int
) -> Callable[[Sequence[FramedImage]], Iterator[Row]]:
    """Encode the mask of every view of every image; what gives their rows."""
    masks = WorkStore(work_root(), "mask_images", recipe_of_masks(options.masks, factor))
    files: dict[str, str] = {}
    if options.masks == "files":
        files = {mask.sample_id: mask.image_sha256 for mask in masks_of_images(PAIR_MASKS, PAIR_IMAGES)}

    def keyed(image: FramedImage) -> FramedImage:
        """As its mask is keyed: by the file that it is made of."""
        digest = files.get(image.sample_id, image.entry.image_sha256)
        return dataclasses.replace(image, entry=image.entry._replace(image_sha256=digest))

    load = functools.partial(load_view_of_mask, options.masks)
    encoder = Encoder(load, functools.partial(build_mask_encoder, factor), MASK_BATCH_SIZE, "float32")
    keyed_images = [keyed(image) for image in images]
    contents = None if options.masks == "alpha" else set(files)
    items = items_of(keyed_images, options, contents)
    encode_missing(masks, all_keys(keyed_images), items, encoder, "mask images", "masks")
    return lambda wanted: masks.rows(all_keys([keyed(image) for image in wanted]))


def items_of(
    images: list[FramedImage], options: EncodeImages, masked: set[str] | None = None
) -> Callable[[set[str]], Iterator[Item]]:
    """The views of the images that have missing ones, each with its image.

    Args:
        images: with views of them.
        options: which views.
        masked: samples with a mask file, which takes the image's place, as nothing does for others; None for
            the images themselves.
    """
    names = view_names(options)

    def contents(wanted: set[str]) -> Iterator[tuple[str, bytes | None]]:
        if masked is None:
            yield from scan_images(PAIR_IMAGES, wanted)
        else:
            yield from scan_images(PAIR_MASKS, wanted & masked)
            yield from ((sample_id, None) for sample_id in sorted(wanted - masked))

    def items(missing: set[str]) -> Iterator[Item]:
        wanted: dict[str, list[FramedImage]] = defaultdict(list)
        for image in images:
            if not missing.isdisjoint(image.keys):
                wanted[image.sample_id].append(image)
        for sample_id, content in contents(set(wanted)):
            for image in wanted[sample_id]:
                for key, view, name in zip(image.keys, image.views, names, strict=True):
                    yield Item(key, f"{sample_id} ({name})", (content, view), image.size)

    return items


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


def load_view_of_mask(kind: str, value: tuple[bytes, Framing]) -> np.ndarray:
    """(image or mask file, framing) -> (height, width) uint8."""
    return load_mask(*value) if kind == "alpha" else load_mask_file(*value)


def load_view_and_mean(
    options: EncodeImages, value: tuple[bytes, Framing, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(image, framing, mean) -> (height, width, 3) uint8, mean (4, h, w)."""
    image, framing, mean = value
    return load_view(options, (image, framing)), mean


def write_report(
    groups: dict[str, list[FramedImage]],
    nominal: list[FramedImage],
    left_out: list[LeftOut],
    reconstructions: list[Reconstruction],
    options: EncodeImages,
) -> None:
    """data/encode_images_report: shapes, images left out, and the worst reconstructions drawn."""
    fresh_directory(ENCODING_REPORT)
    write_left_out(ENCODING_REPORT / "left_out.jsonl", left_out)
    write_shapes(ENCODING_REPORT / "shapes.csv", list(groups.values()))
    centre = {image.sample_id: image.views[0] for image in nominal}
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
