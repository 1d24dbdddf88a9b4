"""Where everything under data/ lies, relative to the repository: each path once, each under one name."""

from __future__ import annotations

from pathlib import Path

DATA = Path("data")

# fetch_base
BASE = DATA / "base"
BASE_UNET = BASE / "unet"
BASE_CLIP = BASE / "clip"

# prepare
PAIRS = DATA / "pairs"
PAIR_IMAGES = PAIRS / "images"
PAIR_MASKS = PAIRS / "masks"
PAIR_CAPTIONS = PAIRS / "captions.parquet"
REJECTED_PAIRS = PAIRS / "rejected.jsonl"
PREPARE_METRICS = DATA / "prepare_metrics.json"

# tokenize, encode_captions, encode_images
TOKENS = DATA / "tokens.zarr"
TRUNCATED_CAPTIONS = DATA / "truncated_captions.jsonl"
TOKENIZE_METRICS = DATA / "tokenize_metrics.json"
ENCODED_CAPTIONS = DATA / "captions.zarr"
ENCODE_CAPTIONS_METRICS = DATA / "encode_captions_metrics.json"
LATENTS = DATA / "latents.zarr"
ENCODING_REPORT = DATA / "encode_images_report"
ENCODE_IMAGES_METRICS = DATA / "encode_images_metrics.json"

# train
TRAINED_UNET = DATA / "unet"
SNAPSHOTS = DATA / "snapshots"
TRAINING = DATA / "training"
PLOTS = TRAINING / "plots"
CURVES = PLOTS / "metrics"
PREVIEWS = TRAINING / "previews"
RUN_FILE = "run.json"  # in the two above: which weights they belong to
TRAINING_SPEED = DATA / "training_speed.json"  # this machine's, no output of DVC's

# invert
EMBEDDINGS = DATA / "embeddings"
LEARNED_EMBEDDINGS = EMBEDDINGS / "learned_embeds.safetensors"  # diffusers' form
A1111_EMBEDDINGS = EMBEDDINGS / "a1111.safetensors"
EMBEDDINGS_CURVES = EMBEDDINGS / "plots" / "metrics"

# baseline, evaluate, report, gallery
BASELINE = DATA / "baseline"
BASELINE_MEASUREMENTS = BASELINE / "measurements.safetensors"
BASELINE_METRICS = BASELINE / "metrics.json"
EVALUATION = DATA / "evaluation"
EVALUATION_MEASUREMENTS = EVALUATION / "measurements.safetensors"
EVALUATION_PICTURES = EVALUATION / "pictures.json"
EVALUATION_METRICS = EVALUATION / "metrics.json"
EVALUATION_SUMMARY = EVALUATION / "summary.json"
EVALUATION_REPORT = EVALUATION / "report.json"
GALLERY_PAGE = EVALUATION / "index.html"
COMPARISON_PAGE = DATA / "comparison.html"
PLOTS_PAGE = DATA / "plots_page.html"

# export
EXPORT = DATA / "export"
EXPORTED_PIPELINE = EXPORT / "pipeline"
MODEL_CARD = EXPORT / "README.md"
