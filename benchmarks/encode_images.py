"""What it costs to encode images, and to encode them again.

    python benchmarks/encode_images.py throughput    # against the bare VAE and a plain loop
    python benchmarks/encode_images.py memory        # peak with 2,000 and with 20,000 images
    python benchmarks/encode_images.py incremental   # 2,000 images, then 20 more, 5 edited, 5 removed
    python benchmarks/encode_images.py kills         # SIGKILL to the encoding stage 20 times, and to dvc

Each writes benchmarks/results/encode_images_<name>.json. Images are OpenMoji artwork as JPEG files of
320 x 288 pixels, each with its number drawn into it, so that no two are the same. The VAE is Stable
Diffusion's (f8) with random weights and a quarter of its widths (throughput, incremental: 256 pixels)
or an eighth (memory, kills: 64 pixels); it encodes batches of 2. Run it on an idle machine.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch
import yaml
from PIL import Image, ImageDraw

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from stages import encode_images, fetch_base, prepare  # noqa: E402
from stages.lib.core.paths import BASE, PAIR_IMAGES  # noqa: E402
from stages.lib.data.image_shards import image_index, iter_images  # noqa: E402
from stages.lib.data.sources.opening import Reading, open_source  # noqa: E402
from stages.lib.encoding.autoencoder import build_image_encoder  # noqa: E402
from stages.lib.encoding.framing import allowed_sizes, frame_images  # noqa: E402
from stages.lib.frame.params import Params, read_params  # noqa: E402
from stages.lib.frame.start_up import keep_freed_memory  # noqa: E402
from stages.lib.models.layout import downsampling, read_vae_config  # noqa: E402
from stages.lib.store.blocks import Block  # noqa: E402
from stages.lib.store.work_store import WorkStore  # noqa: E402
from stages.lib.store.zarr_store import open_store  # noqa: E402
from tests.checkpoints import sd15_like  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
BATCH_SIZE, LOOP_BATCH_SIZE, NUM_WORKERS = 2, 16, os.cpu_count() or 1
KILL_SECONDS = 3.0  # after the first block; 600 images of 64 pixels take a little longer
DVC = [sys.executable, "-m", "dvc"]


def write_images(folder: Path, numbers: range, seed: int = 0) -> None:
    """JPEG files with a .txt beside each; another seed gives other images and the same captions."""
    folder.mkdir(parents=True, exist_ok=True)
    with open_source(ROOT / "data" / "openmoji", Reading("text", 288)) as source:
        rows = source.rows
        for number in numbers:
            row = rows[number % len(rows)]
            artwork = Image.open(io.BytesIO(source.read(row.sample_id)))
            picture = Image.new("RGB", (320, 288), "white")
            picture.paste(artwork, (16, 0))
            draw_number(picture, number + (seed << 16))
            picture.save(folder / f"{number:05d}.jpg", quality=92)
            (folder / f"{number:05d}.txt").write_text(row.captions[0])


def draw_number(picture: Image.Image, number: int) -> None:
    """24 bits as black and white blocks along the lower edge, inside the centre crop."""
    draw = ImageDraw.Draw(picture)
    for bit in range(24):
        left = 16 + 12 * bit
        draw.rectangle((left, 276, left + 11, 287), fill="black" if number >> bit & 1 else "white")


def write_params(directory: Path, **changes: dict) -> None:
    """params.yaml of the repository with ``changes``, for the base and the images of the benchmark."""
    document = yaml.safe_load((ROOT / "params.yaml").read_text())
    for section, values in changes.items():
        document[section] |= values
    document["fetch_base"]["directory"] = "base"
    document["prepare"]["source"] = "images"
    (directory / "params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


@contextlib.contextmanager
def project(num_images: int, resolution: int, width_divisor: int = 8, clone: bool = False) -> Iterator[Path]:
    """A directory with params.yaml, the base and the images; with ``clone`` a clone of the repository."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch) / "project"
        if clone:
            subprocess.run(["git", "clone", "--quiet", ROOT, directory], check=True)
        else:
            directory.mkdir()
        sd15_like(directory / "base", width_divisor)
        write_images(directory / "images", range(num_images))
        write_params(directory, encode_images={"resolution": resolution, "batch_size": BATCH_SIZE})
        os.chdir(directory)
        try:
            yield directory
        finally:
            os.chdir(before)


def prepared() -> Params:
    """The stages before encode_images."""
    params = read_params()
    fetch_base.main(params)
    prepare.main(params)
    return params


# throughput


def bare_rate(num_images: int) -> float:
    """Images a second of the stage's workers on one batch that lies in memory, nothing else done."""
    context = get_context("spawn")
    barrier, done = context.Barrier(NUM_WORKERS + 1), context.Barrier(NUM_WORKERS + 1)
    num_batches = num_images // BATCH_SIZE // NUM_WORKERS
    workers = [
        context.Process(target=bare_worker, args=(barrier, done, num_batches)) for _ in range(NUM_WORKERS)
    ]
    for worker in workers:
        worker.start()
    barrier.wait()
    started = time.perf_counter()
    done.wait()
    seconds = time.perf_counter() - started
    for worker in workers:
        worker.join()
    return num_batches * NUM_WORKERS * BATCH_SIZE / seconds


def bare_worker(barrier: object, done: object, num_batches: int) -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    options = read_params().encode_images
    encode = build_image_encoder("cpu", "float32")
    images = list(itertools.islice(iter_images(PAIR_IMAGES), BATCH_SIZE))
    entries = image_index(PAIR_IMAGES)[:BATCH_SIZE]
    framed, _ = frame_images(entries, allowed_sizes(options, downsampling(read_vae_config(BASE))), options)
    pictures = [
        encode_images.load_view(options, (content, image.views[0]))
        for (_, content), image in zip(images, framed, strict=True)
    ]
    encode(pictures)
    barrier.wait()  # type: ignore[attr-defined]
    for _ in range(num_batches):
        encode(pictures)
    done.wait()  # type: ignore[attr-defined]


def stage_rates(num_images: int) -> tuple[float, float]:
    """Images a second from an empty work store: with the start of the workers, and after it."""
    options = read_params().encode_images
    entries = image_index(PAIR_IMAGES)[:num_images]
    images, _ = frame_images(entries, allowed_sizes(options, downsampling(read_vae_config(BASE))), options)
    finished: list[tuple[float, int]] = []
    put = WorkStore.put

    def recorded(self: WorkStore, keys: list[str], rows: list) -> None:
        put(self, keys, rows)
        finished.append((time.perf_counter(), len(keys)))

    WorkStore.put = recorded  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as root:
        started = time.perf_counter()
        encode_images.encode(WorkStore(Path(root), "encode_images", {}), images, options)
        whole = num_images / (time.perf_counter() - started)
    WorkStore.put = put  # type: ignore[method-assign]
    (first, _), (last, _) = finished[0], finished[-1]
    return whole, sum(count for _, count in finished[1:]) / (last - first)


def loop_rate(num_images: int) -> float:
    """Images a second of the usual script: decode, resize, `vae.encode` in batches, one process."""
    code = f"""
import io, sys, time
from pathlib import Path
import numpy as np, torch
from PIL import Image
from diffusers import AutoencoderKL
vae = AutoencoderKL.from_pretrained("data/base/vae").eval()
files = sorted(Path("images").glob("*.jpg"))[:{num_images}]
def pixels(file):
    image = Image.open(file).convert("RGB").resize((284, 256), Image.Resampling.LANCZOS)
    array = np.asarray(image.crop((14, 0, 270, 256)))
    return torch.from_numpy(array).permute(2, 0, 1).float() / 127.5 - 1
with torch.no_grad():
    for part in range(2):
        started, moments = time.perf_counter(), []
        for first in range(0, len(files) if part else {LOOP_BATCH_SIZE}, {LOOP_BATCH_SIZE}):
            batch = torch.stack([pixels(file) for file in files[first:first + {LOOP_BATCH_SIZE}]])
            posterior = vae.encode(batch).latent_dist
            moments.append((posterior.mean.half(), posterior.logvar.half()))
print(len(files) / (time.perf_counter() - started))
"""
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, env=environment)
    return float(output.stdout)


def throughput(num_images: int = 192, rounds: int = 3) -> dict:
    with project(num_images, 256, width_divisor=4):
        prepared()
        runs = []
        for _ in range(rounds):
            whole, steady = stage_rates(num_images)
            runs.append(
                {
                    "bare_vae": bare_rate(num_images),
                    "stage": steady,
                    "stage_with_start": whole,
                    "plain_loop": loop_rate(num_images),
                }
            )
            print(runs[-1], flush=True)
    totals = {name: sum(1 / run[name] for run in runs) for name in runs[0]}
    return {
        "num_images": num_images,
        "images_per_second": runs,
        "stage_over_bare_vae": totals["bare_vae"] / totals["stage"],
        "stage_over_plain_loop": totals["plain_loop"] / totals["stage"],
        "stage_with_start_over_plain_loop": totals["plain_loop"] / totals["stage_with_start"],
    }


# memory


def peak_of(command: list[str]) -> tuple[float, dict[str, int]]:
    """Wall time, and peak resident MiB: the sum over processes, and of the stage's own process."""
    started, most, own = time.monotonic(), 0, 0
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    root = psutil.Process(process.pid)
    while process.poll() is None:
        sizes = []
        for each in [root, *root.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                sizes.append(each.memory_info().rss)
        most, own = max(most, sum(sizes)), max(own, *sizes[:1], 0)
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"{command}: exit status {process.returncode}")
    return time.monotonic() - started, {"all_processes": most >> 20, "stage_process": own >> 20}


def memory() -> dict:
    """At 64 pixels, where the images are many and the VAE is quick."""
    result: dict = {"peak_mib": {}, "seconds": {}}
    for num_images in (2_000, 20_000):
        with project(num_images, 64):
            prepared()
            seconds, peaks = peak_of([sys.executable, "-m", "stages.encode_images"])
        result["peak_mib"][str(num_images)], result["seconds"][str(num_images)] = peaks, round(seconds)
        print(num_images, peaks, round(seconds), flush=True)
    few, many = result["peak_mib"].values()
    return {**result, "growth": {name: many[name] / few[name] for name in few}}


# incremental


def dvc_environment(**changes: str) -> dict[str, str]:
    """With this Python as the stages' ``python``."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, **changes}


def repro(*arguments: str) -> tuple[float, str]:
    """Seconds and standard error of `dvc repro`."""
    started = time.monotonic()
    done = subprocess.run(
        [*DVC, "repro", *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=dvc_environment(),
    )
    return time.monotonic() - started, done.stderr + done.stdout


def rows_encoded(log: str) -> dict[str, int]:
    """What the stages said: how many were encoded, by description."""
    found = {}
    for line in log.splitlines():
        for name in ("encode images", "encode captions"):
            if line.startswith(f"{name}: ") and " encoded, " in line:
                found[name] = int(line.split(": ")[1].split()[0])
    return found


def fingerprints() -> dict[str, str]:
    stores = {"encode_captions": "captions", "encode_images": "latents"}
    return {
        name: open_store(Path(f"data/{name}.zarr"), stage).attrs["fingerprint"]
        for stage, name in stores.items()
    }


def incremental(num_images: int = 2_000, width_divisor: int = 4) -> dict:
    with project(num_images, 256, width_divisor, clone=True) as directory:
        repro("prepare", "fetch_base")
        cold_seconds, log = repro("encode_images", "encode_captions")
        cold = {"seconds": round(cold_seconds, 1), "rows": rows_encoded(log)}
        print(cold, flush=True)
        write_images(directory / "images", range(num_images, num_images + 20))
        write_images(directory / "images", range(100, 105), seed=7)
        for number in range(200, 205):
            (directory / "images" / f"{number:05d}.jpg").unlink()
            (directory / "images" / f"{number:05d}.txt").unlink()
        (directory / "images" / "00300.txt").write_text("a caption nobody had")
        prepare_seconds, _ = repro("prepare")
        seconds, log = repro("encode_images", "encode_captions")
        warm = {
            "seconds": round(seconds, 1),
            "rows": rows_encoded(log),
            "prepare_seconds": round(prepare_seconds, 1),
        }
        print(warm, flush=True)
        found = fingerprints()
        shutil.rmtree(".work")
        repro("--force", "--single-item", "encode_images")
        repro("--force", "--single-item", "encode_captions")
        same = fingerprints() == found
    return {
        "num_images": num_images,
        "vae": f"Stable Diffusion's, widths / {width_divisor}, 256 pixels",
        "cold": cold,
        "after_the_change": warm,
        "allowed_seconds": round(0.05 * cold_seconds + 5, 1),
        "bytes_equal_a_cold_rebuild": same,
    }


# kills


def kills(num_images: int = 600, num_kills: int = 20) -> dict:
    """SIGKILL to the whole stage while it encodes, each time from an empty store; then to dvc alone."""
    with project(num_images, 64, clone=True):
        show_every_batch()
        repro("prepare", "fetch_base")
        repro("encode_images", "encode_captions")
        undisturbed = fingerprints()
        moments, found = random.Random(0), []
        for number in range(num_kills):
            found.append(kill_and_continue(moments.uniform(0, KILL_SECONDS), undisturbed))
            print(f"kill {number + 1}: {found[-1]}", flush=True)
        dvc_killed = kill_dvc(undisturbed)
    return {
        "num_images": num_images,
        "num_kills": num_kills,
        "num_kills_while_encoding": sum(each["rows_kept"] < num_images for each in found),
        "rows_encoded_and_not_kept_at_most": max(each["rows_encoded"] - each["rows_kept"] for each in found),
        "kept_rows_encoded_again": sum(
            each["rows_encoded_after"] + each["rows_kept"] - num_images for each in found
        ),
        "same_bytes_after_every_kill": all(each["same_bytes"] for each in found),
        "kills": found,
        "dvc_killed": dvc_killed,
    }


def show_every_batch() -> None:
    """Let the stages of this clone print a line of progress for each batch, not only every ten seconds."""
    path, seconds = Path("stages/lib/frame/progress.py"), "LINE_SECONDS = 10.0"
    text = path.read_text()
    if seconds not in text:
        sys.exit(f"{path}: expected {seconds!r}")
    path.write_text(text.replace(seconds, "LINE_SECONDS = 0.0"))


def kill_and_continue(seconds: float, undisturbed: dict[str, str]) -> dict:
    """Kill the stage ``seconds`` after its first block, and run it again to its end."""
    shutil.rmtree(".work/encode_images")
    command, log = [sys.executable, "-m", "stages.encode_images"], Path("killed.log")
    with open(log, "w") as handle:
        stage = subprocess.Popen(command, start_new_session=True, stderr=handle)
        while not rows_in_store():
            if stage.poll() is not None:
                sys.exit(f"the stage ended before its first block:\n{log.read_text()}")
            time.sleep(0.02)
        time.sleep(seconds)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(stage.pid, signal.SIGKILL)
        stage.wait()
    encoded = re.findall(r"^encode images: .*encoded=(\d+)", log.read_text(), re.MULTILINE)
    kept = rows_in_store()
    after = subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)
    return {
        "seconds_after_first_block": round(seconds, 2),
        "rows_encoded": int(encoded[-1]),
        "rows_kept": kept,
        "rows_encoded_after": rows_encoded(after.stderr)["encode images"],
        "same_bytes": fingerprints() == undisturbed,
    }


def rows_in_store() -> int:
    count = 0
    for path in Path(".work").glob("encode_images/*/*.safetensors"):
        with Block(path) as block:
            count += len(block.keys)
    return count


def kill_dvc(undisturbed: dict[str, str]) -> dict:
    """SIGKILL to dvc while its stage encodes; the next run waits for the stage that is left."""
    shutil.rmtree(".work")
    first = subprocess.Popen(
        [*DVC, "repro", "--force", "--single-item", "encode_images"],
        stderr=subprocess.DEVNULL,
        env=dvc_environment(SD_WORKERS="1"),  # so that it still encodes when the next run starts
    )
    while not rows_in_store():
        time.sleep(0.1)
    first.kill()
    first.wait()
    _, log = repro("--force", "--single-item", "encode_images")
    waited = [line.split("; lock")[0] for line in log.splitlines() if line.startswith("waiting")]
    return {"message": waited, "same_bytes": fingerprints() == undisturbed}


def main() -> None:
    parts = {"throughput": throughput, "memory": memory, "incremental": incremental, "kills": kills}
    if len(sys.argv) != 2 or sys.argv[1] not in parts:
        sys.exit(f"usage: python benchmarks/encode_images.py {'|'.join(parts)}")
    os.environ.pop("SD_WORK", None)
    result = {"batch_size": BATCH_SIZE, **parts[sys.argv[1]]()}
    result["machine"] = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    result["packages"] = {name: version(name) for name in ("torch", "diffusers", "zarr", "dvc", "pillow")}
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"encode_images_{sys.argv[1]}.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
