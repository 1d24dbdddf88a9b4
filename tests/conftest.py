"""A small project in a temporary directory: real stages, a random base, a few drawn images."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
import yaml
from accelerate.state import AcceleratorState
from PIL import Image, ImageDraw

from stages import encode_captions, encode_images, fetch_base, invert, prepare, tokenize_captions, train
from stages.lib.core.sums import write_sums
from stages.lib.frame.params import Params, read_params
from stages.lib.frame.sections.section import Section
from tests.checkpoints import tiny_pipeline

if "PYTEST_XDIST_WORKER" in os.environ:  # a thread for each process and for what it starts
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

REPOSITORY = Path(__file__).parent.parent
CAPTIONS = ("red cat", "dog", "rocket", "photo of a heart")
SMALL = {
    "prepare": {"source": "images", "validation_fraction": 0.3},
    "encode_images": {"batch_size": 4, "num_reconstructions": 4},
    "encode_captions": {"batch_size": 4},
    "train": {
        "train_batch_size": 4,
        "max_train_steps": 6,
        "learning_rate": 3e-4,
        "lr_warmup_steps": 2,
        "log_every_steps": 1,
        "validation_every_steps": 3,
        "checkpoint_every_steps": 2,
        "preview_every_steps": 3,
        "num_previews": 2,
    },
    "validation": {"num_timesteps": 2, "batch_size": 4},
    "evaluate": {
        "prompts": ["red cat", "a dog of a rocket"],
        "seeds": [0, 1],
        "guidance_scale": [3.0],
        "num_inference_steps": [2],
        "batch_size": 3,
        "num_contact_samples": 4,
    },
}


def draw_image(seed: int, size: tuple[int, int] = (80, 72)) -> Image.Image:
    """A picture of its own for each seed."""
    random = np.random.default_rng(seed)
    image = Image.new("RGB", size, tuple(random.integers(0, 255, 3).tolist()))
    left, top = random.integers(0, 30, 2).tolist()
    ImageDraw.Draw(image).ellipse(
        (left, top, left + 40, top + 40), tuple(random.integers(0, 255, 3).tolist())
    )
    return image


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_params(**changes: dict) -> Params:
    """params.yaml of the repository with `SMALL` and ``changes`` over it."""
    document = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    for section in document:
        document[section] |= SMALL.get(section, {}) | changes.get(section, {})
    Path("params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    return read_params()


def make_project(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Enter ``root`` with params.yaml, a base in data/base and a folder of 12 images with captions."""
    enter(root, monkeypatch)
    tiny_pipeline(root / "data" / "tiny")
    (root / "images").mkdir()
    for seed in range(12):
        draw_image(seed).save(root / "images" / f"{seed:02d}.png")
        (root / "images" / f"{seed:02d}.txt").write_text(CAPTIONS[seed % len(CAPTIONS)])
    params = write_params()
    fetch_base.main(params)
    return root


def enter(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in ``root``, with a work directory of its own and one encoder process."""
    monkeypatch.chdir(root)
    monkeypatch.setenv("SD_WORK", str(root / ".work"))
    monkeypatch.setenv("SD_WORKERS", "1")


def run_encoders(params: Params) -> None:
    """All stages between the pairs and training, and the one that learns a word where it is asked for."""
    prepare.main(params)
    tokenize_captions.main(params)
    encode_captions.main(params)
    encode_images.main(params)
    invert.main(params)


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Here and in what is started, so that an encoder has to set its one thread itself."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="session")
def made_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `project` copies."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        return make_project(tmp_path_factory.mktemp("project"), monkeypatch)


@pytest.fixture(scope="session")
def made_encoded(made_project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `encoded` copies."""
    root = shutil.copytree(made_project, tmp_path_factory.mktemp("encoded"), dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as monkeypatch:
        enter(root, monkeypatch)
        run_encoders(read_params())
    return root


@pytest.fixture
def project(made_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh project; no stage but fetch_base has run."""
    enter(shutil.copytree(made_project, tmp_path, dirs_exist_ok=True), monkeypatch)
    return tmp_path


@pytest.fixture
def encoded(made_encoded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """As `project`, with everything encoded."""
    enter(shutil.copytree(made_encoded, tmp_path, dirs_exist_ok=True), monkeypatch)
    return tmp_path


def changed(values: Any, **changes: object) -> Any:
    """A copy of a section of the parameters, or of another frozen object, with other values."""
    if isinstance(values, Section):
        return values.model_copy(update=changes)
    return dataclasses.replace(values, **changes)


def reseal() -> None:
    """Make the recorded hashes those of what is there now: of another base, not of a damaged one."""
    base = Path("data/base")
    for directory in (*sorted(path for path in base.iterdir() if path.is_dir()), base):
        write_sums(directory)
    if Path("data/unet").exists():
        write_sums(Path("data/unet"))
        train.write_hashes()


def run_train(**changes: object) -> None:
    """Train in this process with `SMALL` and ``changes`` of the train section."""
    params = read_params()
    AcceleratorState._reset_state(reset_partial_state=True)  # a process has one; each run is its own process
    with torch.random.fork_rng():
        train.main(changed(params, train=changed(params.train, **changes)))


def read_lineage(unet: Path = Path("data/unet")) -> dict[str, str]:
    """The metadata of the trained weights."""
    (path,) = unet.glob("*.safetensors")
    with safetensors.safe_open(path, framework="pt") as weights:
        return {name: text for name, text in weights.metadata().items() if name != "header_sha256"}


def content_fingerprint(directory: Path) -> str:
    """Hash of a directory's files: equal for equal content, whenever and wherever it was made."""
    digest = hashlib.sha256()
    for path in sorted(entry for entry in directory.rglob("*") if entry.is_file()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(directory).as_posix()} {content}\n".encode())
    return digest.hexdigest()
