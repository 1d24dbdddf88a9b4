"""Encode every image once with the frozen VAE into the moments of its latents.

Reads  data/pairs/images, data/base/vae
Writes data/latents.zarr (mean, logvar (N, V, 4, h, w) float16 unscaled, sample_id (N,)),
       data/encode_images_metrics.json
Params encode_images
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from stages.lib.base_model import component_fingerprint, load_vae
from stages.lib.draws import unit_interval
from stages.lib.encoding import Encode, encode_missing
from stages.lib.errors import StageError
from stages.lib.latents import channel_statistics, read_latents
from stages.lib.pairs import image_index, iter_images, read_images
from stages.lib.params import EncodeImages, Params
from stages.lib.pixels import load_pixels
from stages.lib.stage_run import run_stage, work_root, write_json
from stages.lib.stores import ArraySpec, create_store, finish_store, write_rows
from stages.lib.work import Row, WorkStore, environment, source_fingerprint

IMAGES, LATENTS, BASE = Path("data/pairs/images"), Path("data/latents.zarr"), Path("data/base")


def stack_pixels(inputs: Sequence[tuple[bytes, str]], options: EncodeImages) -> torch.Tensor:
    """Image bytes and views -> (B, 3, r, r) float32 in [-1, 1]."""
    return torch.stack(
        [load_pixels(image, options.resolution, options.interpolation, view) for image, view in inputs]
    )


def place_vae(options: EncodeImages, device: str) -> AutoencoderKL:
    """The base's VAE on ``device``, in the dtype of the params."""
    vae = load_vae(BASE).to(device, memory_format=torch.channels_last)
    return vae if options.dtype == "float32" else vae.to(getattr(torch, options.dtype))


def build_encoder(options: EncodeImages, device: str) -> Encode:
    """The VAE's encoder as a function of (image bytes, view) -> mean, logvar (4, h, w) float16, unscaled."""
    vae = place_vae(options, device)

    @torch.inference_mode()
    def encode(inputs: Sequence[tuple[bytes, str]]) -> list[Row]:
        pixels = stack_pixels(inputs, options)
        pixels = pixels.to(device, vae.dtype, memory_format=torch.channels_last)
        posterior = vae.encode(pixels).latent_dist
        means, logvars = (m.float().cpu().half().numpy() for m in (posterior.mean, posterior.logvar))
        return [{"mean": mean, "logvar": logvar} for mean, logvar in zip(means, logvars, strict=True)]

    return encode


def build_reconstructor(options: EncodeImages, device: str) -> Encode:
    """decode(mean) against the pixels, as (image bytes, mean) -> PSNR in dB on the 8-bit range."""
    vae = place_vae(options, device)

    @torch.inference_mode()
    def reconstruct(inputs: Sequence[tuple[bytes, np.ndarray]]) -> list[Row]:
        mean = torch.from_numpy(np.stack([mean for _, mean in inputs])).to(device, vae.dtype)  # (B, 4, h, w)
        decoded = vae.decode(mean).sample.float().cpu().clamp(-1, 1)  # (B, 3, r, r)
        pixels = stack_pixels([(image, "centre") for image, _ in inputs], options)
        mse = ((decoded - pixels) / 2).square().mean(dim=(1, 2, 3))
        psnr = -10.0 * mse.clamp(min=1e-10).log10()
        return [{"psnr": value} for value in psnr.numpy()]

    return reconstruct


def main(params: Params) -> None:
    options = params.encode_images
    vae_config = load_vae(BASE).config
    side = latent_side(options, vae_config)
    views = ["centre", "flipped"] if options.horizontal_flip else ["centre"]
    recipe = {
        "model": component_fingerprint(BASE / "vae"),
        "resolution": options.resolution,
        "interpolation": options.interpolation,
        "dtype": options.dtype,
        "batch_size": options.batch_size,
        "code": source_fingerprint(build_encoder, load_pixels),
        **environment("diffusers", "pillow"),
    }
    moments = WorkStore(work_root(), "encode_images", recipe)
    sample_ids, hashes = image_index(IMAGES)
    keys = [f"{digest}-{view}" for digest in hashes for view in views]
    moments.damaged(keys)
    items = (
        (f"{digest}-{view}", f"{sample_id} ({view})", (image, view))
        for sample_id, image, digest in iter_images(IMAGES)
        for view in views
    )
    encode = functools.partial(build_encoder, options)
    encode_missing(moments, items, encode, options.batch_size, "encode images")

    attributes = {
        "scaling_factor": vae_config.scaling_factor,
        "shift_factor": getattr(vae_config, "shift_factor", None),
        "resolution": options.resolution,
        "views": views,
        "model_fingerprint": recipe["model"],
    }
    shape = (len(sample_ids), len(views), vae_config.latent_channels, side, side)
    write_latents(shape, attributes, sample_rows(moments, sample_ids, keys, len(views)))

    psnr = reconstruction_psnr(options, recipe, moments, dict(zip(sample_ids, hashes, strict=True)))
    metrics = {
        **channel_statistics(read_latents().mean.numpy()),
        "num_encoded_images": len(sample_ids),
        "reconstruction_psnr": psnr.mean(),
        "reconstruction_psnr_worst": psnr.min(),
    }
    write_json(Path("data/encode_images_metrics.json"), metrics)


def latent_side(options: EncodeImages, vae_config: Any) -> int:
    """Side of the square latents; StageError if the resolution does not divide."""
    factor = 2 ** (len(vae_config.block_out_channels) - 1)
    if options.resolution % factor:
        raise StageError(
            f"params.yaml: encode_images.resolution {options.resolution} is not a multiple of {factor}, "
            "the VAE's downsampling factor"
        )
    return options.resolution // factor


def write_latents(
    shape: tuple[int, ...], attributes: dict[str, Any], rows: Iterable[dict[str, np.ndarray]]
) -> None:
    """data/latents.zarr: moments of ``shape`` (N, V, 4, h, w) and the name of each sample."""
    dimensions = ("sample", "view", "channel", "height", "width")
    schema = {
        "mean": ArraySpec(shape, np.float16, dimensions),
        "logvar": ArraySpec(shape, np.float16, dimensions),
        "sample_id": ArraySpec(shape[:1], str, ("sample",)),
    }
    store = create_store(LATENTS, schema, attributes)
    write_rows(store, rows)
    finish_store(LATENTS, store)


def sample_rows(
    moments: WorkStore, sample_ids: list[str], keys: list[str], num_views: int
) -> Iterator[dict[str, np.ndarray]]:
    """The store's rows in ``sample_id`` order: each sample's views side by side, (V, 4, h, w)."""
    rows = moments.rows(keys)
    for sample_id in sample_ids:
        views = [next(rows) for _ in range(num_views)]
        yield {
            "mean": np.stack([view["mean"] for view in views]),
            "logvar": np.stack([view["logvar"] for view in views]),
            "sample_id": np.asarray(sample_id, np.dtypes.StringDType()),
        }


def reconstruction_psnr(
    options: EncodeImages, recipe: dict, moments: WorkStore, hash_of: dict[str, str]
) -> np.ndarray:
    """PSNR in dB of a fixed sample of images, chosen by sample_id alone: new images change few of them."""
    chosen = sorted(hash_of, key=lambda sample_id: unit_interval(0, "reconstruction", sample_id))
    chosen = sorted(chosen[: options.num_reconstructions])
    store = WorkStore(work_root(), "reconstruct_images", recipe)
    keys = [hash_of[sample_id] for sample_id in chosen]
    store.damaged(keys)
    images = read_images(IMAGES, chosen)
    means = (row["mean"] for row in moments.rows([f"{key}-centre" for key in keys]))
    items = (
        (key, sample_id, (images[sample_id], mean))
        for key, sample_id, mean in zip(keys, chosen, means, strict=True)
    )
    build = functools.partial(build_reconstructor, options)
    encode_missing(store, items, build, options.batch_size, "reconstruct images")
    return np.array([row["psnr"] for row in store.rows(keys)], np.float64)


if __name__ == "__main__":
    run_stage("encode_images", ("encode_images",), main)
