"""What each trick of stages/lib/frame/start_up.py gains: whole processes with it and without, in turn.

`python benchmarks/start_up.py [--rounds 5]` writes benchmarks/results/start_up.json: for each trick the
seconds of every run and the ratio with / without of each pair of runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
UNET = "from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel"
ENCODE = """
import torch
from diffusers import AutoencoderKL
torch.set_num_threads(1)
blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
vae = AutoencoderKL(block_out_channels=(64, 128, 128, 128), **blocks).eval()
vae = vae.to(memory_format=torch.channels_last)
pixels = torch.randn(2, 3, 256, 256).to(memory_format=torch.channels_last)
with torch.inference_mode():
    for _ in range(40):
        vae.encode(pixels)
"""
# name -> (what it is measured on, with, without)
TRICKS = {
    "look_for_cycles_less_often, while importing": (
        "import of torch and diffusers' UNet",
        f"import gc; gc.set_threshold(10_000, 10, 10)\n{UNET}",
        f"import gc; gc.set_threshold(700, 10, 10)\n{UNET}",
    ),
    "look_for_cycles_less_often, at the end": (
        "the same, to the end of the process",
        f"import atexit, gc; gc.set_threshold(10_000, 10, 10); atexit.register(gc.freeze)\n{UNET}",
        f"import gc; gc.set_threshold(10_000, 10, 10)\n{UNET}",
    ),
    "leave_out": (
        "the same, without pandas, peft, scipy and transformers",
        f"import stages\nfrom stages.lib.frame.start_up import leave_out\n"
        f"leave_out('pandas', 'peft', 'scipy', 'transformers')\n{UNET}",
        f"import stages\n{UNET}",
    ),
    "keep_freed_memory": (
        "imports and 40 batches of 2 pictures of 256 pixels through an f8 VAE, one thread",
        f"from stages.lib.frame.start_up import keep_freed_memory\nkeep_freed_memory()\n{ENCODE}",
        ENCODE,
    ),
}


def seconds(code: str) -> float:
    """Wall time of a process that runs ``code``."""
    started = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=environment)
    return time.monotonic() - started


def measure(with_it: str, without: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of runs in turn, after one of each that does not count."""
    seconds(with_it), seconds(without)
    pairs = [(seconds(with_it), seconds(without)) for _ in range(rounds)]
    return {"with": [pair[0] for pair in pairs], "without": [pair[1] for pair in pairs]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    results = {}
    for name, (what, with_it, without) in TRICKS.items():
        found = measure(with_it, without, rounds)
        ratio = statistics.median(a / b for a, b in zip(found["with"], found["without"], strict=True))
        print(f"{name}: {ratio:.2f} of the time without ({what})")
        results[name] = {"measured_on": what, "ratio": ratio, **found}
    machine = {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        **{package: version(package) for package in ("torch", "diffusers", "transformers")},
    }
    target = ROOT / "benchmarks/results/start_up.json"
    target.write_text(json.dumps({"machine": machine, "tricks": results}, indent=2) + "\n")
