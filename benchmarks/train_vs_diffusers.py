"""The train stage against diffusers' own script, examples/text_to_image/train_text_to_image.py.

    python benchmarks/train_vs_diffusers.py cpu --diffusers-script train_text_to_image.py
    python benchmarks/train_vs_diffusers.py gpu --diffusers-script train_text_to_image.py

The script is not part of this repository, and runs unchanged; without it the command says where to
get it. It imports torchvision, which this project does without: a directory made with
`pip install --no-deps --target DIRECTORY torchvision==...` and named with --torchvision is seen by the
script alone.

Both train the same UNet with AdamW in the same precision on the same images, by turns. Steps are timed
from outside by a hook on optimizer steps (benchmarks/probe), warm-up steps left out; neither validates,
saves or averages weights in between. A third program runs the UNet forward and backward and nothing else.

cpu: the bundled base and a UNet of 17.8 M parameters at 128 and 256 pixels, batch 4, float32. gpu: Stable
Diffusion 1.5's true config with random weights at 256 and 512 pixels, bf16; --smoke tries that on a CPU
with an eighth of the widths. Results go to benchmarks/results/train_vs_diffusers.json and .svg.
Run it on an idle machine (cpu: about 13 minutes on two cores), in an environment without the extra
`lora`: where peft is installed diffusers imports it, which takes memory.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import html
import itertools
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml
from PIL import Image

ROOT = Path(__file__).parent.parent
PROBE = ROOT / "benchmarks" / "probe"
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "datasets")
ENCODING = ("encode_captions", "encode_images")
BEFORE = ("fetch_base", "prepare", "tokenize_captions", *ENCODING)
STAGE = [sys.executable, "-m", "stages.train"]
BARE = [sys.executable, str(Path(__file__).resolve()), "bare"]


@dataclass(frozen=True)
class Case:
    """One comparison; times are taken over the steps after the warm-up."""

    base: str  # tiny | mid | sd15
    resolution: int
    rounds: int
    num_warmup_steps: int
    num_timed_steps: int
    train_batch_size: int = 4
    num_images: int = 64
    mixed_precision: str = "no"
    width_divisor: int = 1

    @property
    def num_steps(self) -> int:
        return self.num_warmup_steps + self.num_timed_steps


CASES = {
    "cpu": {
        "tiny-128": Case("tiny", 128, 2, 3, 12),
        "tiny-256": Case("tiny", 256, 2, 2, 4, num_images=32),
        "mid-128": Case("mid", 128, 3, 3, 25),
        "mid-256": Case("mid", 256, 3, 3, 10),
    },
    "gpu": {
        "sd15-256": Case("sd15", 256, 3, 200, 100, 64, 1024, "bf16"),
        "sd15-512": Case("sd15", 512, 3, 200, 50, 32, 1024, "bf16"),
    },
}

# A UNet of 17.8 M parameters. VAE and text encoder have Stable Diffusion 1.5's depth, and widths that
# cost about as much beside this UNet as they do in SD 1.5: the result's `flops` has the shares.
MID_UNET = {
    "sample_size": 32,
    "block_out_channels": [64, 128, 256],
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 2,
    "cross_attention_dim": 128,
    "attention_head_dim": 4,
}
MID_VAE = {
    "sample_size": 256,
    "block_out_channels": [24, 48, 96, 96],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
    "norm_num_groups": 8,
}
MID_TEXT_ENCODER = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 12}


def main() -> None:
    arguments = parse_arguments()
    script = diffusers_script(arguments.diffusers_script)
    torchvision = torchvision_directory(arguments.torchvision)
    measured: dict[str, Any] = {}
    for name, case in chosen_cases(arguments).items():
        with tempfile.TemporaryDirectory() as scratch:
            project = Project(Path(scratch), case, script, torchvision, arguments.settings)
            rounds = measure_case(project, arguments.workers or ([8] if arguments.mode == "gpu" else [0]))
            measured[name] = {
                "base": case.base,
                "resolution": case.resolution,
                "train_batch_size": case.train_batch_size,
                "mixed_precision": case.mixed_precision,
                **summary(rounds, case, project.flops(), project.encode_seconds, arguments.peak_tflops),
                "settings": arguments.settings,
                "script_sha256": hashlib.sha256(script.read_bytes()).hexdigest(),
                "machine": machine(),
                "packages": {package: version(package) for package in PACKAGES},
                "peft_installed": find_spec("peft") is not None,
            }
        print(name, json.dumps(measured[name], indent=2), flush=True)
    if arguments.output:
        write_results(arguments.output, measured)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="The train stage against diffusers' script.")
    parser.add_argument("mode", choices=list(CASES))
    parser.add_argument("--diffusers-script", type=Path, help="path of train_text_to_image.py")
    parser.add_argument("--torchvision", type=Path, help="directory that torchvision was installed into")
    parser.add_argument("--case", nargs="+", help="which cases; all of them if left out")
    parser.add_argument("--rounds", type=int, help="how often each program runs")
    parser.add_argument("--timed-steps", type=int)
    parser.add_argument("--train-batch-size", type=int, help="of every case")
    parser.add_argument(
        "--workers",
        type=int,
        nargs="+",
        help="the script's --dataloader_num_workers; of several the first round finds the fastest",
    )
    parser.add_argument(
        "--set", dest="settings", nargs="+", default=[], metavar="KEY=VALUE", help="of the section train"
    )
    parser.add_argument("--peak-tflops", type=float, default=790.0, help="bf16, of the GPU; 790 is an H200")
    parser.add_argument("--smoke", action="store_true", help="a few small steps, wherever it runs")
    parser.add_argument("--output", type=Path, help="directory of the results")
    arguments = parser.parse_args()
    if arguments.mode == "gpu" and not torch.cuda.is_available() and not arguments.smoke:
        sys.exit("gpu: no GPU here; --smoke tries the same on a CPU with a small model")
    if arguments.mode == "cpu" and torch.cuda.is_available():
        sys.exit("cpu: both programs would take the GPU; run it with CUDA_VISIBLE_DEVICES=''")
    if arguments.output is None and not arguments.smoke:
        arguments.output = RESULTS
    return arguments


def chosen_cases(arguments: argparse.Namespace) -> dict[str, Case]:
    known = CASES[arguments.mode]
    if unknown := set(arguments.case or ()) - set(known):
        sys.exit(f"--case: expected {', '.join(known)}, got {', '.join(sorted(unknown))}")
    chosen = {name: known[name] for name in arguments.case or known}
    changes: dict[str, Any] = {}
    if arguments.smoke:
        changes = {"rounds": 1, "num_warmup_steps": 1, "num_timed_steps": 2, "train_batch_size": 2}
        changes |= {"num_images": 4, "mixed_precision": "no", "resolution": 64}
        changes |= {"width_divisor": 8}
    options = {
        "rounds": arguments.rounds,
        "num_timed_steps": arguments.timed_steps,
        "train_batch_size": arguments.train_batch_size,
    }
    changes |= {name: value for name, value in options.items() if value is not None}
    return {name: replace(case, **changes) for name, case in chosen.items()}


def diffusers_script(path: Path | None) -> Path:
    if path is not None and path.is_file():
        return path.resolve()
    tag = f"v{version('diffusers')}"
    sys.exit(
        f"--diffusers-script: expected the path of train_text_to_image.py, got {path}; it is not part of "
        f"this project. Get the one of the diffusers installed here, {tag}:\n"
        f"  curl -LO https://raw.githubusercontent.com/huggingface/diffusers/{tag}/"
        "examples/text_to_image/train_text_to_image.py"
    )


def torchvision_directory(path: Path | None) -> Path | None:
    if path is not None and (path / "torchvision").is_dir():
        return path.resolve()
    if path is None and find_spec("torchvision"):
        return None
    sys.exit(
        f"--torchvision: expected a directory with torchvision in it, which diffusers' script imports, got "
        f"{path}. Keep it apart from this project's environment:\n"
        f"  pip install --no-deps --target torchvision torchvision=={matching_torchvision()}"
    )


def matching_torchvision() -> str:
    """The release made for this PyTorch: 2.13 and 0.28 came together, and so on."""
    major, minor = version("torch").split("+")[0].split(".")[:2]
    return f"0.{int(minor) + 15}.*" if major == "2" else "..."


# the project both train in


class Project:
    """A directory with a base, images and everything encoded, and how to run each program in it."""

    def __init__(
        self, directory: Path, case: Case, script: Path, torchvision: Path | None, settings: list[str]
    ) -> None:
        self.directory, self.case = directory, case
        self.script, self.torchvision = script, torchvision
        write_base(directory / "base", case)
        write_images(directory / "images", case.num_images, case.resolution)
        copy_images(directory / "images", directory / "epochs", self.num_epochs)
        write_params(directory, case, settings)
        seconds = {stage: self.run_stage(stage) for stage in BEFORE}
        self.encode_seconds = sum(seconds[stage] for stage in ENCODING)

    @property
    def num_epochs(self) -> int:
        """So many copies of the images make one epoch of the whole run: the script's loader starts once."""
        return math.ceil(self.case.num_steps * self.case.train_batch_size / self.case.num_images)

    def run_stage(self, stage: str) -> float:
        started = time.monotonic()
        command = [sys.executable, "-m", f"stages.{stage}"]
        done = subprocess.run(
            command, cwd=self.directory, env=environment(ROOT), capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{' '.join(command)}: exit status {done.returncode}\n{done.stderr[-3000:]}")
        return time.monotonic() - started

    def run_train(self) -> dict[str, float]:
        # A work directory of its own for each run, or a finished checkpoint would be all of it.
        with tempfile.TemporaryDirectory() as work:
            figures = measure(STAGE, self.directory, self.case, environment(PROBE, ROOT) | {"SD_WORK": work})
        own = json.loads((self.directory / "data" / "training_speed.json").read_text())
        wait = own["data_wait_fraction"]  # None in a run too short to tell
        return figures | ({} if wait is None else {"data_wait_fraction": wait})

    def run_bare(self) -> dict[str, float]:
        return measure(BARE, self.directory, self.case, environment(PROBE, ROOT))

    def run_script(self, num_workers: int) -> dict[str, float]:
        paths = [PROBE, *([self.torchvision] if self.torchvision else [])]
        caches = {"HF_HOME": str(self.directory / "cache"), "HF_HUB_OFFLINE": "1"}
        variables = environment(*paths) | caches | {"STEP_TIMES_TORCHVISION": "1"}
        with tempfile.TemporaryDirectory() as output:
            command = script_command(self.script, self.case, output, num_workers)
            return measure(command, self.directory, self.case, variables)

    def flops(self) -> dict[str, float]:
        return count_flops(self.directory / "data" / "base", self.case.resolution)


def script_command(script: Path, case: Case, output: str, num_workers: int) -> list[str]:
    """Everything else is the script's default, and the project's: AdamW, its betas, decay and clipping."""
    options = {
        "pretrained_model_name_or_path": "data/base",
        "train_data_dir": "epochs",
        "output_dir": output,
        "resolution": case.resolution,
        "train_batch_size": case.train_batch_size,
        "max_train_steps": case.num_steps,
        "checkpointing_steps": 10 * case.num_steps,
        "mixed_precision": case.mixed_precision,
        "dataloader_num_workers": num_workers,
        "lr_warmup_steps": 0,
        "learning_rate": 1e-5,
        "seed": 0,
    }
    command = [sys.executable, str(script), "--center_crop"]
    if case.base == "sd15":
        command.append("--allow_tf32")
    return [*command, *(f"--{name}={value}" for name, value in options.items())]


def write_params(directory: Path, case: Case, settings: list[str]) -> None:
    """params.yaml of the repository, with what makes the two programs do the same."""
    document = yaml.safe_load((ROOT / "params.yaml").read_text())
    document["fetch_base"]["directory"] = "base"
    document["prepare"] |= {"source": "images", "validation_fraction": 0}
    document["encode_images"] |= {"resolution": case.resolution, "num_reconstructions": 1}
    never = 10 * case.num_steps
    document["train"] |= {
        "train_batch_size": case.train_batch_size,
        "max_train_steps": case.num_steps,
        "learning_rate": 1e-5,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "use_ema": False,
        "caption_dropout": 0.0,
        "mixed_precision": case.mixed_precision,
        "allow_tf32": case.base == "sd15",
        "validation_every_steps": never,
        "checkpoint_every_steps": never,
        "preview_every_steps": None,
    }
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in document["train"]:
            sys.exit(f"--set: no key {key!r} in section train of params.yaml")
        document["train"][key] = yaml.safe_load(value)
    (directory / "params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


def write_images(folder: Path, num_images: int, resolution: int) -> None:
    """JPEG files a quarter wider than what is trained on, smooth colours with grain, and captions."""
    folder.mkdir()
    random = np.random.default_rng(0)
    size = (5 * resolution // 4, 9 * resolution // 8)
    lines = []
    for number in range(num_images):
        colours = random.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC), np.float32)
        grain = random.normal(0, 8, (*smooth.shape[:2], 1))
        picture = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{number:05d}.jpg", quality=92)
        lines.append(json.dumps({"file_name": f"{number:05d}.jpg", "text": f"a photo of cloud {number}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def copy_images(source: Path, target: Path, num_copies: int) -> None:
    for number in range(num_copies):
        shutil.copytree(source, target / f"{number:03d}", copy_function=os.link)


def write_base(directory: Path, case: Case) -> None:
    if case.base == "tiny":
        directory.symlink_to(ROOT / "data" / "tiny", target_is_directory=True)
    elif case.base == "sd15":
        sys.path.insert(0, str(ROOT))
        from tests.checkpoints import sd15_like

        sd15_like(directory, case.width_divisor)
    else:
        write_mid_base(directory)


def write_mid_base(directory: Path) -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tiny = ROOT / "data" / "tiny"
    text_config = CLIPTextConfig.from_pretrained(tiny / "text_encoder", **MID_TEXT_ENCODER)
    UNet2DConditionModel.from_config(MID_UNET).save_pretrained(directory / "unet")
    AutoencoderKL.from_config(MID_VAE).save_pretrained(directory / "vae")
    CLIPTextModel(text_config).save_pretrained(directory / "text_encoder")
    for component in ("tokenizer", "scheduler"):
        shutil.copytree(tiny / component, directory / component)
    shutil.copy(tiny / "model_index.json", directory)


def count_flops(base: Path, resolution: int) -> dict[str, float]:
    """Floating-point operations an image: the UNet forward and backward, and what the script adds."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(base / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(base / "vae"))
        text_encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(base / "text_encoder"))
        side = resolution // 2 ** (len(vae.config.block_out_channels) - 1)
        states = torch.empty(1, 77, unet.config.cross_attention_dim)
        with FlopCounterMode(display=False) as unet_flops:
            unet(torch.empty(1, 4, side, side), torch.empty(1), states).sample.mean().backward()
        with FlopCounterMode(display=False) as vae_flops, torch.no_grad():
            vae.encode(torch.empty(1, 3, resolution, resolution))
        with FlopCounterMode(display=False) as text_flops, torch.no_grad():
            text_encoder(torch.zeros(1, 77, dtype=torch.int64))
    return {
        "unet_forward_backward": unet_flops.get_total_flops(),
        "vae_encode": vae_flops.get_total_flops(),
        "text_encoder": text_flops.get_total_flops(),
    }


# measurement


def environment(*paths: Path) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("SD_")}
    return own | {"PYTHONPATH": os.pathsep.join(map(str, paths))}


def measure(command: list[str], directory: Path, case: Case, variables: dict[str, str]) -> dict[str, float]:
    """Seconds a step, and peak memory, of a program that takes ``case.num_steps`` optimizer steps."""
    with tempfile.TemporaryDirectory() as scratch:
        times_file, log = Path(scratch) / "times.json", Path(scratch) / "log"
        steps = {
            "STEP_TIMES": str(times_file),
            "STEP_TIMES_SYNC": f"{case.num_warmup_steps},{case.num_steps}",
        }
        with open(log, "wb") as output:
            process = subprocess.Popen(
                command, cwd=directory, env=variables | steps, stdout=output, stderr=subprocess.STDOUT
            )
            resident = []
            while process.poll() is None:
                resident.append((time.monotonic(), resident_bytes(process.pid)))
                time.sleep(0.1)
        tail = log.read_text(errors="replace")[-3000:]
        if process.returncode:
            sys.exit(f"{' '.join(command)}: exit status {process.returncode}\n{tail}")
        if not times_file.exists():
            sys.exit(f"{' '.join(command)}: took no optimizer step\n{tail}")
        found = json.loads(times_file.read_text())
    return run_figures(found["times"], resident, found["peak_gpu_bytes"], case)


def run_figures(
    times: list[float], resident: list[tuple[float, int]], peak_gpu_bytes: int | None, case: Case
) -> dict[str, float]:
    """Figures of one run.

    Args:
        times: when each step ended, seconds.
        resident: moments and bytes.
        peak_gpu_bytes: allocated by the end of the last step.
    """
    if len(times) != case.num_steps:
        sys.exit(f"expected {case.num_steps} optimizer steps, got {len(times)}")
    timed = times[case.num_warmup_steps - 1 :]
    lengths = [later - earlier for earlier, later in itertools.pairwise(timed)]
    training = [size for moment, size in resident if times[0] <= moment <= times[-1]]
    figures = {
        "seconds_per_step": (timed[-1] - timed[0]) / case.num_timed_steps,
        "median_seconds_per_step": statistics.median(lengths),
        "peak_mib": max(size for _, size in resident) / 2**20,
        "training_peak_mib": max(training, default=0) / 2**20,
    }
    if peak_gpu_bytes is not None:
        figures["peak_gpu_mib"] = peak_gpu_bytes / 2**20
    return figures


def resident_bytes(pid: int) -> int:
    """Of the program, and what its helper processes do not share with it."""
    try:
        process = psutil.Process(pid)
        helpers = sum(child.memory_full_info().uss for child in process.children(recursive=True))
        return process.memory_info().rss + helpers
    except psutil.NoSuchProcess:
        return 0


def measure_case(project: Project, workers: list[int]) -> dict[str, Any]:
    """The three programs by turns; the script with the number of loader workers that suits it best."""
    tried = {number: project.run_script(number) for number in workers} if len(workers) > 1 else {}
    fastest = min(workers, key=lambda number: tried[number]["seconds_per_step"] if tried else 0)
    rounds: dict[str, Any] = {"script": [], "stage": [], "bare": []}
    for _ in range(project.case.rounds):
        rounds["script"].append(project.run_script(fastest))
        rounds["stage"].append(project.run_train())
        rounds["bare"].append(project.run_bare())
        print({name: round(runs[-1]["seconds_per_step"], 4) for name, runs in rounds.items()}, flush=True)
    tried_seconds = {number: rounded(run["seconds_per_step"]) for number, run in tried.items()}
    return rounds | {"dataloader_num_workers": fastest, "seconds_by_workers": tried_seconds}


def summary(
    rounds: dict[str, Any], case: Case, flops: dict[str, float], encode_seconds: float, peak_tflops: float
) -> dict[str, Any]:
    """Ratios round by round and their medians, so that a drift of the machine's speed cancels out."""

    def ratios(program: str, other: str, figure: str) -> list[float]:
        pairs = zip(rounds[program], rounds[other], strict=True)
        return [rounded(a[figure] / b[figure]) for a, b in pairs]

    def middle(program: str, figure: str) -> float:
        return statistics.median(run[figure] for run in rounds[program])

    memory = "peak_gpu_mib" if "peak_gpu_mib" in rounds["stage"][0] else "peak_mib"
    speedups = ratios("script", "stage", "seconds_per_step")
    overheads = ratios("stage", "bare", "seconds_per_step")
    memories = ratios("stage", "script", memory)
    rates = {
        name: case.train_batch_size / middle(name, "seconds_per_step") for name in ("script", "stage", "bare")
    }
    saved = middle("script", "seconds_per_step") - middle("stage", "seconds_per_step")
    result = {
        "images_per_second": {name: rounded(rate) for name, rate in rates.items()},
        "stage_over_script": {"median": rounded(statistics.median(speedups)), "rounds": speedups},
        "step_over_bare_unet": {"median": rounded(statistics.median(overheads)), "rounds": overheads},
        "memory_over_script": {"median": rounded(statistics.median(memories)), "rounds": memories},
        "memory_measured": memory,
        "one_time_encode_seconds": rounded(encode_seconds),
        "break_even_steps": math.ceil(encode_seconds / saved) if saved > 0 else None,
        "num_images": case.num_images,
        "gflops_per_image": {name: rounded(count / 1e9) for name, count in flops.items()},
        "num_warmup_steps": case.num_warmup_steps,
        "num_timed_steps": case.num_timed_steps,
        **{key: rounds[key] for key in ("dataloader_num_workers", "seconds_by_workers")},
        "runs": {
            name: [{figure: rounded(value) for figure, value in run.items()} for run in rounds[name]]
            for name in rates
        },
    }
    if case.base == "sd15":
        share = flops["unet_forward_backward"] / (peak_tflops * 1e12)
        result["share_of_peak"] = {name: rounded(rate * share) for name, rate in rates.items()}
        result["peak_tflops"] = peak_tflops
    return result


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def machine() -> dict[str, Any]:
    found: dict[str, Any] = {"processor": processor(), "cores": os.cpu_count()}
    found["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


# the bare UNet


def bare() -> None:
    """Forward and backward of the stage's UNet on one batch of the stores' shapes, as the stage runs it."""
    from stages.lib.frame.params import read_params
    from stages.lib.frame.start_up import keep_freed_memory
    from stages.lib.models.layout import BASE
    from stages.lib.models.loaders import load_unet
    from stages.lib.store.zarr_store import open_store

    keep_freed_memory()
    options = read_params().train
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    unet = load_unet(BASE).train().to(device, memory_format=layout)
    mean = open_store(Path("data/latents.zarr"), "encode_images")["mean"]
    states = open_store(Path("data/captions.zarr"), "encode_captions")["encoder_hidden_states"]
    size = options.train_batch_size
    noisy_latents = torch.randn(size, *mean.shape[2:], device=device)
    encoder_hidden_states = torch.randn(size, *states.shape[1:], device=device)
    timesteps = torch.randint(1000, (size,), device=device)
    precision = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(options.mixed_precision)
    synchronized = set(map(int, os.environ["STEP_TIMES_SYNC"].split(",")))
    times = []
    for step in range(1, max(synchronized) + 1):
        with torch.autocast(device.type, precision, enabled=precision is not None):
            model_pred = unet(noisy_latents, timesteps, encoder_hidden_states).sample
        model_pred.float().square().mean().backward()
        unet.zero_grad()
        if step in synchronized and device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.monotonic())
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    Path(os.environ["STEP_TIMES"]).write_text(json.dumps({"times": times, "peak_gpu_bytes": peak}))


# the result


def write_results(directory: Path, measured: dict[str, Any]) -> None:
    """Cases measured now replace those of the same name; the others stay."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "train_vs_diffusers.json"
    cases = (json.loads(path.read_text()) if path.exists() else {}) | measured
    order = [name for known in CASES.values() for name in known if name in cases]
    path.write_text(json.dumps({name: cases[name] for name in order}, indent=2) + "\n")
    path.with_suffix(".svg").write_text(chart({name: cases[name] for name in order}))


def chart(cases: dict[str, Any]) -> str:
    """Images a second and peak memory of each case, the script above and the stage below it, as SVG."""
    row, left, width, gap = 58, 96, 250, 120
    panels = (
        ("images a second", "images_per_second", "stage_over_script", "times as many"),
        ("peak memory, MiB", None, "memory_over_script", "of it"),
    )
    height = 64 + row * len(cases)
    total = left + len(panels) * (width + gap)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{height}" '
        f'viewBox="0 0 {total} {height}" font-family="sans-serif" font-size="13" fill="#24292f">',
        "<title>The train stage against diffusers' train_text_to_image.py</title>",
        f'<rect width="{total}" height="{height}" fill="#ffffff"/>',
        f'<rect x="{left}" y="10" width="12" height="12" fill="#b7bfc8"/>',
        f'<text x="{left + 18}" y="21">diffusers\' train_text_to_image.py</text>',
        f'<rect x="{left + width}" y="10" width="12" height="12" fill="#2f6feb"/>',
        f'<text x="{left + width + 18}" y="21">this project\'s train stage</text>',
    ]
    for panel, (title, figure, ratio, unit) in enumerate(panels):
        start = left + panel * (width + gap)
        parts.append(f'<text x="{start}" y="48" font-weight="bold">{title}</text>')
        for number, (name, case) in enumerate(cases.items()):
            top = 58 + row * number
            if panel == 0:
                parts.append(f'<text x="8" y="{top + 25}" font-weight="bold">{html.escape(name)}</text>')
            values = {program: bar_value(case, program, figure) for program in ("script", "stage")}
            longest = max(values.values())
            for place, (program, colour) in enumerate((("script", "#b7bfc8"), ("stage", "#2f6feb"))):
                y, value = top + 20 * place, values[program]
                length = width * value / longest
                label = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
                if program == "stage":
                    label += f" ({case[ratio]['median']:.2f} {unit})"
                inside = length > 0.6 * width
                x, anchor = (start + length - 6, "end") if inside else (start + length + 6, "start")
                ink = "#ffffff" if inside and program == "stage" else "#24292f"
                parts.append(
                    f'<rect x="{start}" y="{y}" width="{length:.1f}" height="18" fill="{colour}"/>'
                    f'<text x="{x:.1f}" y="{y + 13}" text-anchor="{anchor}" fill="{ink}">{label}</text>'
                )
    return "\n".join([*parts, "</svg>"]) + "\n"


def bar_value(case: dict[str, Any], program: str, figure: str | None) -> float:
    if figure:
        return case[figure][program]
    return statistics.median(run[case["memory_measured"]] for run in case["runs"][program])


if __name__ == "__main__":
    bare() if sys.argv[1:] == ["bare"] else main()
