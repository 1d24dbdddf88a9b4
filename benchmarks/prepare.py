"""How fast `prepare` takes images from Parquet, against decoding alone, and whether its memory is flat.

    python benchmarks/prepare.py --num-images 2000 20000 100000 --output benchmarks/results/prepare.json

Makes Parquet files of JPEGs that all differ (photographs of scikit-image, cropped at random), runs the stage
on each number of images, and decodes the same files with Pillow in as many processes, reading nothing else.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from default_run import resident
from PIL import Image
from skimage import data

ROOT = Path(__file__).parent.parent
SIDE = 512
FILE_ROWS = 1000


def jpegs(first: int) -> list[bytes]:
    """FILE_ROWS JPEGs, each another crop of a photograph."""
    photographs = [Image.fromarray(each).resize((1024, 1024)) for each in (data.astronaut(), data.chelsea())]
    random, found = np.random.default_rng(first), []
    for _ in range(FILE_ROWS):
        left, top = random.integers(0, 1024 - SIDE, 2).tolist()
        buffer = io.BytesIO()
        photograph = photographs[random.integers(len(photographs))]
        photograph.crop((left, top, left + SIDE, top + SIDE)).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


def write_file(directory: Path, number: int) -> None:
    rows = jpegs(number)
    table = pa.table(
        {
            "image": pa.array([{"bytes": row, "path": None} for row in rows],
                              pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            "text": [f"picture {number} {row}" for row in range(len(rows))],
        }
    )  # fmt: skip
    pq.write_table(table, directory / f"{number:05d}.parquet")


def decode_file(path: Path) -> int:
    images = pq.read_table(path, columns=["image"])["image"].to_pylist()
    for image in images:
        Image.open(io.BytesIO(image["bytes"])).load()
    return len(images)


def run_stage(source: Path) -> dict[str, float]:
    """Seconds of the stage, and the peak of its processes' resident sets together, in bytes."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        document = yaml.safe_load((ROOT / "params.yaml").read_text())
        document["prepare"]["source"] = str(source)
        (root / "params.yaml").write_text(yaml.safe_dump(document))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        started, peak = time.monotonic(), 0
        process = subprocess.Popen([sys.executable, "-m", "stages.prepare"], cwd=root, env=environment,
                                   stderr=subprocess.DEVNULL)  # fmt: skip
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            time.sleep(0.1)
        assert process.returncode == 0, process.returncode
        return {"seconds": time.monotonic() - started, "peak_bytes": peak}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-images", type=int, nargs="+", default=[2000, 20000, 100000])
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    found = []
    with tempfile.TemporaryDirectory() as directory, ProcessPoolExecutor(cores) as pool:
        for num_images in options.num_images:
            source = Path(directory) / str(num_images)
            source.mkdir()
            list(pool.map(write_file, [source] * (num_images // FILE_ROWS), range(num_images // FILE_ROWS)))
            stage = run_stage(source)
            started = time.monotonic()
            list(pool.map(decode_file, sorted(source.glob("*.parquet"))))
            decoding = time.monotonic() - started
            row = {
                "num_images": num_images,
                "source_bytes": sum(path.stat().st_size for path in source.iterdir()),
                "stage_images_a_second": num_images / stage["seconds"],
                "decoding_alone_images_a_second": num_images / decoding,
                "ratio": decoding / stage["seconds"],
                "peak_bytes": stage["peak_bytes"],
            }
            print({name: round(value, 3) for name, value in row.items()}, flush=True)
            found.append(row)
    if options.output:
        machine = {"processor": platform.processor() or platform.machine(), "cores": cores, "side": SIDE}
        options.output.write_text(json.dumps({"machine": machine, "runs": found}, indent=1) + "\n")
    print("peak of this process", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024, "MiB")


if __name__ == "__main__":
    main()
