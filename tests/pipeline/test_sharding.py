"""Training under FSDP with the configuration that ships, in two CPU processes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

from tests.conftest import REPOSITORY, write_params
from tests.pipeline.test_run_options import curve, outputs, run_process, weights

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


def run_sharded(work: str, check: bool = True) -> str:
    launcher = "torch.distributed.run", "--standalone", "--nproc-per-node", "2"
    done = subprocess.run(
        [sys.executable, "-m", *launcher, REPOSITORY / "tests" / "sharded_training.py"],
        env={**os.environ, **fsdp_environment(), "PYTHONPATH": str(REPOSITORY), "SD_WORK": work},
        capture_output=True,
        text=True,
    )
    assert not check or done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.slow
def test_sharded_training_agrees_to_rounding_and_resumes_bit_for_bit(encoded):
    write_params(train=SHARDED)
    run_process("one")
    alone, losses = weights(), curve("validation_loss")
    run_sharded("undisturbed")
    undisturbed, sharded = outputs(), weights()
    base = load_file("data/base/unet/diffusion_pytorch_model.safetensors")
    moved = max((alone[name] - base[name]).abs().max() for name in alone)
    apart = max((alone[name] - value).abs().max() for name, value in sharded.items())
    assert sharded.keys() == alone.keys()
    assert apart < 0.02 * moved
    assert curve("validation_loss") == pytest.approx(losses, rel=1e-4)

    (directory,) = Path("undisturbed/train").iterdir()
    (directory / "step-00000008.safetensors").unlink()
    assert "resuming at step 6" in run_sharded("undisturbed")
    assert outputs() == undisturbed


def test_what_does_not_go_with_sharding_is_named_at_once(encoded):
    write_params(train={**SHARDED, "channels_last": True, "optimizer": "adafactor"})
    message = run_sharded("refused", check=False)
    assert "train.channels_last True, expected False; train.optimizer adafactor, expected adamw" in message
