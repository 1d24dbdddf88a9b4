"""The bundled CLIP, whole, and what it sees in OpenMoji."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from stages.lib.data.sources.opening import Reading, read_folder
from stages.lib.evaluation.measuring.clip_features import image_features, load_clip
from tests.conftest import REPOSITORY
from tiny.assemble import PREPROCESSOR


def bundled_clip(directory: Path) -> Path:
    """A copy with the tokenizer and preprocessor_config.json that assemble puts beside the weights."""
    shutil.copytree(REPOSITORY / "data/tiny/clip", directory)
    shutil.copytree(REPOSITORY / "data/tiny/tokenizer", directory, dirs_exist_ok=True)
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return directory


def value_of(
    metric: Callable[..., Callable[..., torch.Tensor]], generated: torch.Tensor, reference: torch.Tensor
) -> float:
    """A distance of two sets of features, every picture with weight 1."""
    weights = (torch.ones(1, len(features)).double() for features in (generated, reference))
    return metric(generated, reference)(*weights).item()


def emoji_features(directory: Path) -> SimpleNamespace:
    """OpenMoji at 64 pixels in two halves of 64, variations of the first, and noise; features of each."""
    source = read_folder(REPOSITORY / "data/openmoji", Reading("text", 64))
    rows = [source.rows[number] for number in torch.linspace(0, len(source.rows) - 1, 128).int().tolist()]
    pictures = [Image.open(io.BytesIO(source.read(row.sample_id))).convert("RGB") for row in rows]
    clip = load_clip(directory)
    first, second = pictures[::2], pictures[1::2]
    random = np.random.default_rng(0)
    groups = {
        "first": first,
        "second": second,
        "recoloured": [
            Image.merge("RGB", (blue, red, green)) for red, green, blue in map(Image.Image.split, first)
        ],
        "noise": [Image.fromarray(random.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in first],
    }
    features = {name: image_features(clip, group) for name, group in groups.items()}
    captions = [row.captions[0] for row in rows[::2]]
    return SimpleNamespace(clip=clip, first_pictures=first, captions=captions, **features)
