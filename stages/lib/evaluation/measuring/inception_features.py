"""What Inception v3 sees in pictures: the 2048 features that FID is defined on (Heusel et al. 2017).

The network and its resizing are torch-fidelity's, which match the original TensorFlow program; its weights
are a file of the user's. torch-fidelity is no dependency: it asks for torchvision, of which it needs nothing
here, and which has to match the build of torch.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import itertools
import pickle
import re
import struct
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from PIL import Image

from stages.lib.frame.errors import StageError

NUM_FEATURES = 2048
# Of every forward pass, short batches are padded: a row's bits do not depend on its neighbours then.
BATCH_SIZE = 16
# What reading a file that is something else, or the weights of something else, fails with.
NOT_THE_WEIGHTS = (
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
    struct.error,
)
INSTALL = "pip install --no-deps torch-fidelity==0.4.0"
WEIGHTS = "weights-inception-2015-12-05-6726825d.pth of torch-fidelity's release v0.2.0"


@dataclass(frozen=True)
class Inception:
    """torch-fidelity's Inception v3, and the SHA-256 of the file its weights came from."""

    model: torch.nn.Module
    fingerprint: str


def load_inception(weights: Path) -> Inception:
    """The network, on the GPU where there is one.

    Args:
        weights: a file of tensors alone, as torch-fidelity and torchmetrics download it.

    Raises:
        StageError: if torch-fidelity is not installed, or the file is missing, holds anything but
            tensors, or those of another network.
    """
    extractor = _extractor_module().FeatureExtractorInceptionV3
    try:
        content = weights.read_bytes()
    except OSError as error:
        raise StageError(
            f"{weights} (evaluate.inception_weights): {error.strerror}; expected {WEIGHTS}"
        ) from error
    _check_hash_in_name(weights, content)
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        with tempfile.TemporaryDirectory() as directory:
            # Its constructor unpickles whatever the file holds: it gets a copy of what was read safely.
            copied = Path(directory) / "weights.pth"
            torch.save(state, copied)
            model = extractor("inception", [str(NUM_FEATURES)], feature_extractor_weights_path=str(copied))
    except NOT_THE_WEIGHTS as error:
        first_line = str(error).strip().split("\n")[0]
        raise StageError(
            f"{weights} (evaluate.inception_weights): expected {WEIGHTS}; got {first_line}"
        ) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Inception(model.to(device), hashlib.sha256(content).hexdigest())


@torch.inference_mode()
def inception_features(inception: Inception, pictures: Iterable[Image.Image]) -> torch.Tensor:
    """Features of pictures of one size, whatever it is, taken one batch at a time.

    Returns:
        (N, 2048) float32 on the CPU.
    """
    device = next(inception.model.buffers()).device
    rows = [torch.empty(0, NUM_FEATURES)]
    for batch in _batches(pictures):
        padded = batch + [batch[-1]] * (BATCH_SIZE - len(batch))
        pixels = torch.from_numpy(np.stack([np.asarray(picture.convert("RGB")) for picture in padded]))
        (features,) = inception.model(
            pixels.permute(0, 3, 1, 2).contiguous().to(device)
        )  # (B, 3, H, W) uint8
        rows.append(features[: len(batch)].cpu())
    return torch.cat(rows)


def _batches(pictures: Iterable[Image.Image]) -> Iterator[list[Image.Image]]:
    iterator = iter(pictures)
    while batch := list(itertools.islice(iterator, BATCH_SIZE)):
        yield batch


def _check_hash_in_name(weights: Path, content: bytes) -> None:
    """Raise StageError if the file is not the one whose hash its name ends in, as torch.hub names them."""
    named = re.search(r"-([0-9a-f]{8,})\.pth$", weights.name)
    found = hashlib.sha256(content).hexdigest()
    if named and not found.startswith(named[1]):
        raise StageError(
            f"{weights} (evaluate.inception_weights): expected a file whose SHA-256 begins with {named[1]}, "
            f"as its name says, got {found[:8]}: it is damaged; fetch it again"
        )


def _extractor_module() -> ModuleType:
    """torch-fidelity's module of the network, without the package's own imports: they ask for torchvision."""
    name = "torch_fidelity"
    if name not in sys.modules:
        found = importlib.util.find_spec(name)
        if found is None:
            raise StageError(f"evaluate.inception_weights: FID needs torch-fidelity; run `{INSTALL}`")
        sys.modules[name] = importlib.util.module_from_spec(found)  # not executed
    return importlib.import_module(f"{name}.feature_extractor_inceptionv3")
