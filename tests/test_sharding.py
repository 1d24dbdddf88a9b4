"""Training under FSDP with the configuration that ships, in two CPU processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from tests.conftest import REPOSITORY, content_fingerprint, write_params

SHARDED = {
    "channels_last": False,
    "max_train_steps": 8,
    "checkpoint_every_steps": 3,
    "validation_every_steps": 4,
    "preview_every_steps": 4,
    "gradient_accumulation_steps": 2,
    "export": "best",
}


def fsdp_environment() -> dict[str, str]:
    """What `accelerate launch --config_file fsdp.yaml` tells the processes."""
    words = ["--config_file", str(REPOSITORY / "fsdp.yaml"), "--num_processes", "2", "stages.train"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    told = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in told.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def run(work: str, *launcher: str, check: bool = True, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *launcher],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "SD_WORK": work, **environment},
        capture_output=True,
        text=True,
    )
    assert not check or done.returncode == 0, done.stderr
    return done.stderr


def run_sharded(work: str, check: bool = True) -> str:
    launcher = "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    driver = str(REPOSITORY / "tests" / "sharded_training.py")
    return run(work, *launcher, driver, check=check, **fsdp_environment())


def outputs() -> str:
    return content_fingerprint(Path("data/unet")) + content_fingerprint(Path("data/training"))


def validation_losses() -> list[float]:
    lines = Path("data/training/plots/metrics/validation_loss.tsv").read_text().splitlines()[1:]
    return [float(line.split("\t")[1]) for line in lines]


def test_sharded_training_agrees_to_rounding_and_resumes_bit_for_bit(encoded):
    write_params(train=SHARDED)
    run("one", "-m", "stages.train")
    weights = Path("data/unet/diffusion_pytorch_model.safetensors")
    alone, losses = load_file(weights), validation_losses()
    run_sharded("undisturbed")
    undisturbed, sharded = outputs(), load_file(weights)
    base = load_file("data/base/unet/diffusion_pytorch_model.safetensors")
    moved = max((alone[name] - base[name]).abs().max() for name in alone)
    apart = max((alone[name] - value).abs().max() for name, value in sharded.items())
    assert sharded.keys() == alone.keys()
    assert apart < 0.02 * moved
    assert validation_losses() == pytest.approx(losses, rel=1e-4)

    (directory,) = Path("undisturbed/train").iterdir()
    (directory / "step-00000008.pt").unlink()
    assert "resuming at step 6" in run_sharded("undisturbed")
    assert outputs() == undisturbed


def test_what_does_not_go_with_sharding_is_named_at_once(encoded):
    write_params(train={**SHARDED, "channels_last": True, "optimizer": "adafactor"})
    message = run_sharded("refused", check=False)
    assert "train.channels_last True, expected False; train.optimizer adafactor, expected adamw" in message
