"""Train the tiny tokenizer and CLIP: emoji drawings against their names, contrastively.

Reads  tiny/data/emoji.npz
Writes tiny/data/tokenizer/ (CLIPTokenizer), tiny/data/clip/ (CLIPModel), tiny/data/clip.json
Params tiny/params.yaml: clip
Source: Radford et al. 2021, the symmetric cross-entropy of figure 3.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from tiny.recipe import Checkpoint, Progress, cosine_schedule, start, step_generator
from tiny.train_vae import augment_position, to_pixels

MAX_LENGTH = 77
TRAIN_LENGTH = 24  # tokens; the encoder is causal, so padding after the end changes no earlier row


def build_tokenizer(captions: list[str], vocab_size: int) -> CLIPTokenizer:
    """Byte-level BPE with CLIP's own normaliser and splitting, learnt on the captions."""
    reference = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = reference.normalizer, reference.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    learner.train_from_iterator(sorted(set(captions)), trainer)
    learnt = json.loads(learner.to_str())["model"]
    tokens = sorted(learnt["vocab"], key=learnt["vocab"].get)
    # Every byte must also exist as the last letter of a word, or rare captions hit <unk>.
    tokens += [byte + "</w>" for byte in alphabet if byte + "</w>" not in learnt["vocab"]]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    merges = [
        tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in learnt["merges"]
    ]
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_LENGTH)


def build_clip(params: dict, tokenizer: CLIPTokenizer) -> CLIPModel:
    towers = {"num_hidden_layers": params["num_layers"], "num_attention_heads": params["num_heads"]}
    special = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    return CLIPModel(
        CLIPConfig(
            text_config={
                **towers,
                **special,
                "pad_token_id": tokenizer.pad_token_id,
                "vocab_size": len(tokenizer),
                "hidden_size": params["hidden_size"],
                "intermediate_size": 4 * params["hidden_size"],
                "max_position_embeddings": MAX_LENGTH,
                "projection_dim": params["projection_dim"],
            },
            vision_config={
                **towers,
                "hidden_size": params["vision_hidden_size"],
                "intermediate_size": 4 * params["vision_hidden_size"],
                "image_size": 64,
                "patch_size": params["patch_size"],
                "projection_dim": params["projection_dim"],
            },
            projection_dim=params["projection_dim"],
        )
    )


def caption_batch(names: list[str], styles: list[str], drop: torch.Tensor) -> list[str]:
    """Style word first, then the name; where ``drop`` is set the name alone."""
    return [
        name if gone else f"{style} {name}" for name, style, gone in zip(names, styles, drop, strict=True)
    ]


def main() -> None:
    params = start("clip")
    emoji = np.load("tiny/data/emoji.npz")
    images = torch.from_numpy(emoji["images"]).permute(0, 3, 1, 2)
    images = (
        F.interpolate(images.float(), size=(72, 72), mode="bicubic", antialias=True).round().clamp(0, 255)
    )
    names, styles = emoji["names"].tolist(), emoji["styles"].tolist()
    full = [f"{style} {name}" for name, style in zip(names, styles, strict=True)]
    tokenizer = build_tokenizer(full, params["vocab_size"])
    Path("tiny/data").mkdir(exist_ok=True)
    tokenizer.save_pretrained("tiny/data/tokenizer")
    torch.manual_seed(params["seed"])
    clip = build_clip(params, tokenizer)
    optimizer = torch.optim.AdamW(clip.parameters(), betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    steps, batch_size = params["max_train_steps"], params["batch_size"]
    step, seconds = 0, 0.0
    checkpoint = Checkpoint("clip", params, ["tiny/data/emoji.npz"])
    if state := checkpoint.load():
        clip.load_state_dict(state["clip"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds = state["step"], state["seconds"]
    progress, begun = Progress(steps, batch_size, every=50), time.monotonic()
    loss = accuracy = torch.tensor(0.0)
    while step < steps:
        generator = step_generator(params["seed"], step)
        pick = torch.randperm(len(images), generator=generator)[:batch_size]
        drop = torch.rand(batch_size, generator=generator) < params["style_dropout"]
        captions = caption_batch([names[i] for i in pick], [styles[i] for i in pick], drop)
        input_ids = tokenizer(
            captions, padding="max_length", truncation=True, max_length=TRAIN_LENGTH, return_tensors="pt"
        ).input_ids
        pixels = augment_position(to_pixels(images[pick]), generator)
        output = clip(input_ids=input_ids, pixel_values=pixels)
        labels = torch.arange(batch_size)
        logits = output.logits_per_image
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
        loss.backward()
        torch.nn.utils.clip_grad_norm_(clip.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = params["learning_rate"] * cosine_schedule(step, steps, 100)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            clip.logit_scale.clamp_(max=np.log(100.0))
            accuracy = (logits.argmax(dim=1) == labels).float().mean()
        step += 1
        progress.log(step, loss=loss.detach(), accuracy=accuracy)
        if step % 200 == 0 or step == steps:
            elapsed = seconds + time.monotonic() - begun
            checkpoint.save(step, clip=clip.state_dict(), optimizer=optimizer.state_dict(), seconds=elapsed)
    seconds += time.monotonic() - begun
    clip.eval().save_pretrained("tiny/data/clip")
    report = {
        "parameters": sum(p.numel() for p in clip.parameters()),
        "tokens": len(tokenizer),
        "steps": step,
        "seconds": round(seconds),
        "last_loss": float(loss),
        "last_accuracy_in_batch": float(accuracy),
    }
    Path("tiny/data/clip.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
