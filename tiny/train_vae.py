"""Train the tiny AutoencoderKL: 64 x 64 RGB <-> 16 x 16 x 4 latents.

Reads  tiny/data/emoji.npz
Writes tiny/data/vae/ (diffusers AutoencoderKL), tiny/data/vae.json (losses, seconds)
Params tiny/params.yaml: vae

The drawings are cropped at four zooms and their colours mixed at random, so that the
autoencoder learns edges and colours rather than these sets. A second phase draws half of its
samples with black outlines, so that it learns line art too. Afterwards every latent channel is
shifted and scaled, exactly, inside the two 1x1 quant convolutions: zero mean and one standard
deviation for all, the scale of Stable Diffusion's own latents.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL

from tiny.recipe import Checkpoint, Progress, cosine_schedule, start, step_generator

RESOLUTION = 64
ZOOMS = (64, 80, 96, 128)  # pixels the whole drawing is scaled to before a 64-pixel crop


def build_vae(block_out_channels: list[int]) -> AutoencoderKL:
    depth = len(block_out_channels)
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * depth,
        up_block_types=["UpDecoderBlock2D"] * depth,
        block_out_channels=block_out_channels,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=RESOLUTION,
    ).to(memory_format=torch.channels_last)


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) uint8 -> float32 in [-1, 1]."""
    return images.float() / 127.5 - 1.0


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(B, 3, 128, 128) uint8 -> (B, 3, 64, 64) float32: random zoom, crop, flip and colours."""
    crops = []
    for image in images:
        zoom = ZOOMS[int(torch.randint(len(ZOOMS), (), generator=generator))]
        pixels = to_pixels(image[None])
        if zoom != pixels.shape[-1]:
            pixels = F.interpolate(pixels, size=(zoom, zoom), mode="bicubic", antialias=True)
        top, left = (int(torch.randint(zoom - RESOLUTION + 1, (), generator=generator)) for _ in range(2))
        pixels = pixels[..., top : top + RESOLUTION, left : left + RESOLUTION]
        kind = torch.rand((), generator=generator)
        if kind < 0.2:  # negative
            pixels = -pixels
        elif kind < 0.5:  # other inks
            pixels = pixels[:, torch.randperm(3, generator=generator)]
        elif kind < 0.65:  # other saturation, down to grey
            grey = pixels.mean(dim=1, keepdim=True)
            pixels = grey + (pixels - grey) * torch.rand((), generator=generator) * 1.3
        if torch.rand((), generator=generator) < 0.5:
            pixels = pixels.flip(-1)
        crops.append(pixels)
    return torch.cat(crops).clamp(-1, 1).contiguous(memory_format=torch.channels_last)


def augment_position(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 3, 64, 64): each image cropped at its own random place."""
    room = pixels.shape[-1] - RESOLUTION + 1
    corners = torch.randint(room, (len(pixels), 2), generator=generator).tolist()
    crops = [
        image[:, top : top + RESOLUTION, left : left + RESOLUTION]
        for image, (top, left) in zip(pixels, corners, strict=True)
    ]
    return torch.stack(crops)


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, images: torch.Tensor, latent_std: float) -> None:
    """Fold a per-channel affine map into the quant convolutions: mean 0, std ``latent_std``.

    mean' = a * mean + b, logvar' = logvar + 2 ln a, and the decoder undoes it: the
    autoencoder computes the same function.
    """
    means = torch.cat([vae.encode(to_pixels(batch)).latent_dist.mean for batch in images.split(32)])
    mu, sigma = means.mean((0, 2, 3)), means.std((0, 2, 3))
    gain = latent_std / sigma
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    weight[:4] *= gain[:, None, None, None]
    bias[:4] = (bias[:4] - mu) * gain
    bias[4:] += 2 * gain.log()
    post_weight, post_bias = vae.post_quant_conv.weight, vae.post_quant_conv.bias
    post_bias += post_weight[:, :, 0, 0] @ mu
    post_weight /= gain[None, :, None, None]
    vae.register_to_config(scaling_factor=round(1.0 / latent_std, 5))


@torch.no_grad()
def mean_psnr(vae: AutoencoderKL, images: torch.Tensor) -> float:
    """Mean over images of the PSNR of decode(mean), dB, on the 8-bit range."""
    scores = []
    for batch in images.split(32):
        decoded = vae.decode(vae.encode(to_pixels(batch)).latent_dist.mean).sample.clamp(-1, 1)
        error = ((decoded - to_pixels(batch)) / 2).square().mean((1, 2, 3))
        scores.append(-10 * error.log10())
    return float(torch.cat(scores).mean())


def learning_rate(step: int, params: dict) -> float:
    """Two phases, each a warm-up and half a cosine; the second peaks at half the rate of the first."""
    peak, warmup, plain_steps = params["learning_rate"], params["lr_warmup_steps"], params["plain_steps"]
    if step < plain_steps:
        return peak * cosine_schedule(step, plain_steps, warmup)
    return 0.5 * peak * cosine_schedule(step - plain_steps, params["outlined_steps"], warmup)


def main() -> None:
    params = start("vae")
    emoji = np.load("tiny/data/emoji.npz")
    images, outlined = (torch.from_numpy(emoji[key]).permute(0, 3, 1, 2) for key in ("images", "outlined"))
    torch.manual_seed(params["seed"])
    vae = build_vae(params["block_out_channels"])
    optimizer = torch.optim.AdamW(vae.parameters(), betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    batch_size = params["batch_size"]
    plain_steps, steps = params["plain_steps"], params["plain_steps"] + params["outlined_steps"]
    step, seconds = 0, 0.0
    checkpoint = Checkpoint("vae", params, ["tiny/data/emoji.npz"])
    if state := checkpoint.load():
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
    progress, begun = Progress(steps, batch_size), time.monotonic()
    reconstruction = kl = torch.tensor(0.0)
    while step < steps:
        generator = step_generator(params["seed"], step)
        pick = torch.randint(len(images), (batch_size,), generator=generator)
        chosen = images[pick]  # (B, 3, 128, 128)
        if step >= plain_steps:
            chosen[: batch_size // 2] = outlined[pick[: batch_size // 2]]
        pixels = augment(chosen, generator)
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        error = decoded - pixels
        reconstruction = error.abs().mean() + error.square().mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        (reconstruction + params["kl_weight"] * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, params)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        psnr = -10 * (error.detach() / 2).square().mean((1, 2, 3)).log10().mean()
        progress.log(step, reconstruction=reconstruction.detach(), kl=kl.detach(), psnr=psnr)
        if step % 200 == 0 or step == steps:
            elapsed = seconds + time.monotonic() - begun
            checkpoint.save(step, vae=vae.state_dict(), optimizer=optimizer.state_dict(), seconds=elapsed)
    seconds += time.monotonic() - begun

    vae.eval()
    small = F.interpolate(images.float(), size=(64, 64), mode="bicubic", antialias=True).round().clamp(0, 255)
    standardise_latents(vae, small, params["latent_std"])
    output = Path("tiny/data/vae")
    vae.to(memory_format=torch.contiguous_format).save_pretrained(output)
    report = {
        "parameters": sum(p.numel() for p in vae.parameters()),
        "steps": step,
        "seconds": round(seconds),
        "last_reconstruction_loss": float(reconstruction),
        "last_kl_nats_per_value": float(kl),
        "psnr_own_styles_db": mean_psnr(vae, small[:: max(1, len(small) // 512)]),
    }
    Path("tiny/data/vae.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
