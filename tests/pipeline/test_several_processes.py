"""Stages started through SD_LAUNCH as two processes, as `dvc repro` starts them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stages import prepare, tokenize_captions
from stages.lib.frame.params import read_params
from tests.conftest import REPOSITORY, content_fingerprint, run_encoders
from tests.unit.frame.test_launch import ACCELERATE

TORCHRUN = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2"
pytestmark = pytest.mark.usefixtures("two_threads")


def run(module: str, launcher: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "SD_LAUNCH": launcher, "SD_WORKERS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", module], env=environment, check=True, capture_output=True, text=True
    )
    return done.stderr


@pytest.mark.slow
def test_encoders_write_the_bytes_of_one_process(project):
    params = read_params()
    run_encoders(params)
    stores = [Path("data/latents.zarr"), Path("data/captions.zarr")]
    alone = [content_fingerprint(store) for store in stores]
    report = content_fingerprint(Path("data/encode_images_report"))
    for path in (*stores, Path(".work"), Path("data/encode_images_report")):
        shutil.rmtree(path)
    prepare.main(params)
    tokenize_captions.main(params)
    blocks_before = set(Path(".work").rglob("*.safetensors"))
    run("stages.encode_captions", TORCHRUN)
    log = run("stages.encode_images", ACCELERATE)
    assert [content_fingerprint(store) for store in stores] == alone
    assert content_fingerprint(Path("data/encode_images_report")) == report
    assert "encode images: 12 images encoded, 0 reused" in log
    assert len(set(Path(".work").glob("encode_images/*/*.safetensors")) - blocks_before) == 2
