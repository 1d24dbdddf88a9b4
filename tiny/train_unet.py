"""Train the tiny UNet2DConditionModel to predict the noise in latents of the emoji drawings.

Reads  tiny/data/emoji.npz, tiny/data/vae/, tiny/data/tokenizer/, tiny/data/clip/
Writes tiny/data/unet/ (EMA weights), tiny/data/scheduler/, tiny/data/unet.json
Params tiny/params.yaml: unet (and clip.style_dropout, the share of captions without style word)
Source: Ho et al. 2020, eq. 14; Hang et al. 2023 (Min-SNR), eq. 7 for noise prediction.
"""

from __future__ import annotations

import json
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPModel, CLIPTokenizer

from tiny.recipe import (
    Checkpoint,
    Progress,
    cosine_schedule,
    read_params,
    start,
    step_generator,
)
from tiny.train_vae import to_pixels

NUM_TRAIN_TIMESTEPS = 1000
HELD_OUT = 0.03  # share of names kept for the loss reported in the model card


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's scaled-linear betas, noise prediction."""
    return DDIMScheduler(
        num_train_timesteps=NUM_TRAIN_TIMESTEPS,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


def build_unet(params: dict, cross_attention_dim: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=params["block_out_channels"],
        down_block_types=["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=params["num_heads"],
    ).to(memory_format=torch.channels_last)


@torch.no_grad()
def encode_images(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 3, 64, 64) pixels in [0, 255] -> mean and std of the latents, (N, 4, 16, 16), unscaled."""
    posteriors = [vae.encode(to_pixels(batch)).latent_dist for batch in images.split(32)]
    return torch.cat([p.mean for p in posteriors]), torch.cat([p.std for p in posteriors])


@torch.no_grad()
def encode_captions(clip: CLIPModel, tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """Captions -> (N, 77, D) float32 last hidden states of the text tower."""
    input_ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return torch.cat([clip.text_model(batch).last_hidden_state for batch in input_ids.split(64)])


def held_out(name: str) -> bool:
    return zlib.crc32(name.encode()) % 10_000 < HELD_OUT * 10_000


def main() -> None:
    params = start("unet")
    style_dropout = read_params("clip")["style_dropout"]
    emoji = np.load("tiny/data/emoji.npz")
    names, styles = emoji["names"].tolist(), emoji["styles"].tolist()
    images = torch.from_numpy(emoji["images"]).permute(0, 3, 1, 2).float()
    images = F.interpolate(images, size=(64, 64), mode="bicubic", antialias=True).round().clamp(0, 255)
    vae = AutoencoderKL.from_pretrained("tiny/data/vae")
    means, stds = encode_images(vae, images)
    clip = CLIPModel.from_pretrained("tiny/data/clip", dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained("tiny/data/tokenizer")
    captions = ["", *sorted(set(names)), *(f"{s} {n}" for s, n in zip(styles, names, strict=True))]
    row = {caption: index for index, caption in enumerate(captions)}
    embeddings = encode_captions(clip, tokenizer, captions)  # (U, 77, D)

    split = np.array([held_out(name) for name in names])
    train_rows, held_out_rows = (torch.from_numpy(np.flatnonzero(mask)) for mask in (~split, split))
    scheduler = build_scheduler()
    torch.manual_seed(params["seed"])
    unet = build_unet(params, embeddings.shape[-1])
    data = TrainingData(
        means,
        stds,
        vae.config.scaling_factor,
        names,
        styles,
        train_rows,
        embeddings,
        row,
        params["caption_dropout"],
        style_dropout,
    )
    seconds, loss, first_step = 0.0, 0.0, 0
    for index, this in enumerate(params["rounds"]):
        so_far = params | {"rounds": params["rounds"][: index + 1]}
        loss, spent = train_round(unet, scheduler, data, so_far, first_step)
        seconds, first_step = seconds + spent, first_step + this["steps"]

    held_out_captions = [row[f"{styles[i]} {names[i]}"] for i in held_out_rows.tolist()]
    held_out_latents = means[held_out_rows] * vae.config.scaling_factor
    report = {
        "parameters": sum(p.numel() for p in unet.parameters()),
        "steps": first_step,
        "seconds": round(seconds),
        "last_loss": loss,
        "held_out_loss": evaluate(unet, scheduler, held_out_latents, embeddings[held_out_captions]),
    }
    unet.to(torch.float16, memory_format=torch.contiguous_format).save_pretrained("tiny/data/unet")
    scheduler.save_pretrained("tiny/data/scheduler")
    Path("tiny/data/unet.json").write_text(json.dumps(report, indent=2) + "\n")


@dataclass(frozen=True)
class TrainingData:
    """Latent moments (N, 4, 16, 16), the captions' embeddings (U, 77, D), and which samples to use."""

    means: torch.Tensor
    stds: torch.Tensor
    scaling_factor: float
    names: list[str]
    styles: list[str]
    rows: torch.Tensor
    embeddings: torch.Tensor
    caption_row: dict[str, int]
    caption_dropout: float
    style_dropout: float

    def draw(
        self, batch_size: int, high_noise: float, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """latents, noise (B, 4, 16, 16), timesteps (B,) and encoder_hidden_states (B, 77, D).

        A share ``high_noise`` of the timesteps comes from the noisiest fifth: there the caption decides what
        is drawn, and from uniform timesteps it is learned last.
        """
        pick = self.rows[torch.randint(len(self.rows), (batch_size,), generator=generator)]
        sampled = self.means[pick] + self.stds[pick] * torch.randn(
            self.means[pick].shape, generator=generator
        )
        latents = (sampled * self.scaling_factor).contiguous(memory_format=torch.channels_last)
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.randint(NUM_TRAIN_TIMESTEPS, (batch_size,), generator=generator)
        raised = timesteps[: round(high_noise * batch_size)]
        raised += (NUM_TRAIN_TIMESTEPS - raised) * 4 // 5  # [0, 1000) -> [800, 1000)
        choice = torch.rand(batch_size, generator=generator).tolist()
        captions = [self.caption(index, u) for index, u in zip(pick.tolist(), choice, strict=True)]
        return latents, noise, timesteps, self.embeddings[[self.caption_row[text] for text in captions]]

    def caption(self, index: int, u: float) -> str:
        """Nothing, the bare name, or style and name, by ``u`` in [0, 1)."""
        if u < self.caption_dropout:
            return ""
        if u < self.caption_dropout + self.style_dropout:
            return self.names[index]
        return f"{self.styles[index]} {self.names[index]}"


def train_round(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    data: TrainingData,
    params: dict,
    first_step: int,
) -> tuple[float, float]:
    """The last of ``params["rounds"]``: warm-up, a cosine, and the average's weights rounded to float16.

    A later round starts from what the one before shipped, with a new optimizer, so that a base
    that has shipped can be trained further.

    Returns:
        The last loss and the seconds spent.
    """
    this = params["rounds"][-1]
    steps, schedule_steps = this["steps"], this["schedule_steps"]
    ema = [p.detach().clone() for p in unet.parameters()]
    optimizer = torch.optim.AdamW(unet.parameters(), weight_decay=1e-2, fused=True)
    inputs = [f"tiny/data/{name}" for name in ("emoji.npz", "vae", "clip", "tokenizer")]
    checkpoint = Checkpoint(f"unet-{first_step}", params, inputs)
    step, seconds = 0, 0.0
    if state := checkpoint.load():
        unet.load_state_dict(state["unet"])
        optimizer.load_state_dict(state["optimizer"])
        ema, step, seconds = [p.detach() for p in state["ema"]], state["step"], state["seconds"]
    progress, begun = Progress(steps, params["batch_size"]), time.monotonic()
    loss = torch.tensor(0.0)
    while step < steps:
        generator = step_generator(params["seed"], first_step + step)
        latents, noise, timesteps, encoder_hidden_states = data.draw(
            params["batch_size"], this["high_noise"], generator
        )
        noisy_latents = scheduler.add_noise(latents, noise, timesteps)
        model_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample
        weights = loss_weights(scheduler.alphas_cumprod[timesteps], params["snr_gamma"], this["loss"])
        loss = (F.mse_loss(model_pred, noise, reduction="none").mean((1, 2, 3)) * weights).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = params["learning_rate"] * cosine_schedule(
                step, schedule_steps, params["lr_warmup_steps"]
            )
        optimizer.step()
        optimizer.zero_grad()
        decay = min(params["ema_decay"], (step + 1) / (step + 10))
        torch._foreach_lerp_(ema, [p.detach() for p in unet.parameters()], 1 - decay)
        step += 1
        progress.log(step, loss=loss.detach())
        if step % 250 == 0 or step == steps:
            elapsed = seconds + time.monotonic() - begun
            checkpoint.save(
                step, unet=unet.state_dict(), ema=ema, optimizer=optimizer.state_dict(), seconds=elapsed
            )
    with torch.no_grad():
        for parameter, average in zip(unet.parameters(), ema, strict=True):
            parameter.copy_(average.half().float())
    return loss.item(), seconds + time.monotonic() - begun


def loss_weights(alphas_cumprod: torch.Tensor, snr_gamma: float, loss: str) -> torch.Tensor:
    """Weight of each sample's squared error of the noise, (B,): min(snr, gamma) / snr (Hang et al. 2023).

    With the ``velocity`` loss the error is that of v, 1 + 1 / snr times that of the noise (Salimans and
    Ho 2022, section 4): without it, what a picture shows is decided at noise levels that hardly weigh.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    weights = snr.clamp(max=snr_gamma) / snr
    return weights * (1 + 1 / snr) if loss == "velocity" else weights


@torch.no_grad()
def evaluate(
    unet: UNet2DConditionModel, scheduler: DDIMScheduler, latents: torch.Tensor, embeddings: torch.Tensor
) -> float:
    """Unweighted noise-prediction loss on held-out names at ten evenly spaced timesteps."""
    losses = []
    for timestep in range(50, NUM_TRAIN_TIMESTEPS, 100):
        noise = torch.randn(latents.shape, generator=step_generator(1, timestep))
        timesteps = torch.full((len(latents),), timestep)
        model_pred = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, embeddings).sample
        losses.append(float(F.mse_loss(model_pred, noise)))
    return float(np.mean(losses))


if __name__ == "__main__":
    main()
