"""Peak memory, disk and time of each stage with a base of Stable Diffusion 1.5's size, weights random.

    python benchmarks/true_size.py [--lora-rank 8 | --full] [--resolution 256] [--steps 4]

A few drawn pictures go from fetch_base to export in a scratch project. Writes
benchmarks/results/true_size.json. Memory is the sum of the resident set sizes of a stage's processes, sampled
ten times a second; pages of files that are mapped count as well. Disk is what the stage's outputs hold.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import yaml
from default_run import resident
from small_project import MODULE_OF, ROOT, draw, environment, make, write_params

from tests.checkpoints import sd15_like
from tests.clips import bundled_clip

RESULT = ROOT / "benchmarks" / "results" / "true_size.json"
STAGES = (
    *(stage for stage in MODULE_OF if stage not in ("report", "gallery")),
    "export",
    "report",
    "gallery",
)


def measured(root: Path, stage: str) -> dict[str, float]:
    """Seconds and peak resident bytes of one stage, and the bytes of its outputs."""
    started, peak = time.monotonic(), 0
    module = MODULE_OF.get(stage, f"stages.{stage}")
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", module], cwd=root, stderr=errors, stdout=errors,
            env=environment(OMP_NUM_THREADS=str(os.cpu_count()), SD_WORKERS="1"),
        )  # fmt: skip
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            time.sleep(0.1)
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{stage}: {errors.read()[-3000:]}")
    seconds = time.monotonic() - started
    entry = yaml.safe_load((root / "dvc.yaml").read_text())["stages"].get(stage, {})
    outputs = [next(iter(each)) if isinstance(each, dict) else each for each in entry.get("outs", [])]
    return {
        "seconds": round(seconds, 1),
        "peak_gb": round(peak / 1e9, 2),
        "disk_gb": round(sum(size_of(root / output) for output in outputs) / 1e9, 4),
    }


def size_of(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--lora-rank", type=int, default=8)
    kind.add_argument("--full", action="store_true")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--formats", nargs="*", default=["lora_kohya", "lora_diffusers"])
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = make(Path(scratch) / "project")
        shutil.rmtree(root / "base")
        bundled_clip(sd15_like(root / "base", width_divisor=1) / "clip")
        draw(root, tuple(range(8)))
        write_params(
            root,
            encode_images={"resolution": options.resolution, "batch_size": 1, "num_reconstructions": 1},
            encode_captions={"batch_size": 2},
            train={
                "lora_rank": None if options.full else options.lora_rank,
                "train_batch_size": 2,
                "max_train_steps": options.steps,
                "lr_warmup_steps": 1,
                "validation_every_steps": options.steps,
                "checkpoint_every_steps": options.steps,
                "preview_every_steps": None,
            },
            validation={"num_timesteps": 1, "max_samples": 1, "batch_size": 1},
            evaluate={
                "prompts": ["red cat"],
                "seeds": [0],
                "num_inference_steps": [2],
                "batch_size": 1,
                "num_metric_samples": 2,
                "denoising_every_steps": None,
            },
            export={"formats": options.formats},
        )
        found = {}
        for stage in STAGES:
            found[stage] = measured(root, stage)
            print(stage, found[stage], flush=True)
    result = {
        "base": "Stable Diffusion 1.5's configs, random weights",
        "trained": "UNet" if options.full else f"LoRA, rank {options.lora_rank}",
        "resolution": options.resolution,
        "train_batch_size": 2,
        "formats": options.formats,
        "stages": found,
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "packages": {name: version(name) for name in ("torch", "diffusers", "transformers", "peft")},
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
