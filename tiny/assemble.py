"""Put the trained parts together as a diffusers pipeline directory.

Reads  tiny/data/{vae,unet,scheduler,tokenizer,clip}
Writes tiny/data/base/{vae,unet,scheduler,tokenizer,text_encoder}, model_index.json, clip/ (both towers, its
       tokenizer and what prepares its pictures)
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

PARTS, OUTPUT = Path("tiny/data"), Path("tiny/data/base")
PREPROCESSOR = {  # as train_clip shows drawings: 72 pixels in [-1, 1], 64 of them seen
    "crop_size": {"height": 64, "width": 64},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 72},
}


def main() -> None:
    clip = CLIPModel.from_pretrained(PARTS / "clip", dtype=torch.float32)
    text_encoder = CLIPTextModel(clip.config.text_config)
    text_encoder.load_state_dict(clip.text_model.state_dict())
    shutil.rmtree(OUTPUT, ignore_errors=True)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(PARTS / "vae"),
        text_encoder=text_encoder,
        tokenizer=CLIPTokenizer.from_pretrained(PARTS / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(PARTS / "unet", torch_dtype=torch.float16),
        scheduler=DDIMScheduler.from_pretrained(PARTS / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(OUTPUT, safe_serialization=True)
    # Half precision halves what every clone downloads; loaders widen it to float32 again.
    clip.half().save_pretrained(OUTPUT / "clip")
    pipeline.tokenizer.save_pretrained(OUTPUT / "clip")
    preprocessor = json.dumps(PREPROCESSOR, indent=2, sort_keys=True) + "\n"
    (OUTPUT / "clip" / "preprocessor_config.json").write_text(preprocessor, encoding="utf-8")


if __name__ == "__main__":
    main()
