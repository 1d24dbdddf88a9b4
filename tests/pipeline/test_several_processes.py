"""Stages started through SD_LAUNCH as two processes, as `dvc repro` starts them."""

import os
import platform
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from stages import prepare, tokenize_captions
from stages.lib.frame.params import read_params
from tests.conftest import REPOSITORY, content_fingerprint, read_lineage, run_encoders, write_params
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


@pytest.mark.slow
def test_processes_of_two_checkouts_are_refused_before_any_work(project, tmp_path_factory):
    """Two launchers, each in a checkout and with a work directory of its own."""
    params = read_params()
    prepare.main(params)
    shutil.rmtree(".work", ignore_errors=True)
    other = shutil.copytree(project, tmp_path_factory.mktemp("other"), dirs_exist_ok=True)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "stages.encode_images"], cwd=root, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), "SD_WORKERS": "1",
                 "SD_WORK": str(root / ".work"),
                 "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"},
        )
        for rank, root in enumerate((project, other))
    ]  # fmt: skip
    for process in started:
        errors = process.communicate()[1]
        assert process.returncode == 1
        assert f"process 1 on {platform.node()} in {other} sees another checkout and another work" in errors
        assert "Traceback" not in errors
    assert not list(project.glob(".work/encode_images/*/*.safetensors"))


@pytest.mark.slow
def test_the_same_training_twice_at_once_is_trained_once(encoded, tmp_path_factory):
    """Runs of `dvc queue` that differ in what they export, or in how they are evaluated alone."""
    params = write_params()
    other = shutil.copytree(encoded, tmp_path_factory.mktemp("other"), dirs_exist_ok=True)
    text = Path("params.yaml").read_text()
    (other / "params.yaml").write_text(text.replace("export: last", "export: best"))
    assert params.train.export == "last"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "SD_WORK": str(encoded / ".work")}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "stages.train"],
            cwd=root,
            env=environment,
            text=True,
            stderr=subprocess.PIPE,
        )
        for root in (encoded, other)
    ]
    logs = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], logs
    assert sum("resuming at step 6 from" in log for log in logs) == 1
    run("stages.train", "")
    assert len({read_lineage(root / "data/unet")["exported"] for root in (encoded, other)}) == 2
