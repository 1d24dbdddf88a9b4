"""Time and peak memory of each stage of a cold default run, in a fresh clone of this repository.

    python benchmarks/default_run.py [CHECKOUT]

With CHECKOUT, a checkout without outputs and without .work is used in place of a clone.
Writes benchmarks/results/default_run.json. Memory is the sum of the resident set sizes of a
stage's processes, dvc included, sampled ten times a second.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import psutil
import yaml

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "default_run.json"
DVC = [sys.executable, "-m", "dvc", "repro"]


def measure(command: list[str], directory: Path) -> tuple[float, int, str]:
    """Wall time in seconds, peak resident bytes of the process tree, and standard output."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SD_")}
    started, peak = time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, cwd=directory, env={**environment, "PATH": path}, stdout=output)
        while process.poll() is None:
            peak = max(peak, resident(process.pid))
            time.sleep(0.1)
        output.seek(0)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
        return time.monotonic() - started, peak, output.read()


def resident(pid: int) -> int:
    total = 0
    try:
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            total += process.memory_info().rss
    except psutil.NoSuchProcess:
        pass
    return total


def measure_stages(checkout: Path, result: dict) -> None:
    for stage in yaml.safe_load((checkout / "dvc.yaml").read_text())["stages"]:
        seconds, peak, _ = measure([*DVC, "--single-item", stage], checkout)
        result["stages"][stage] = {"seconds": round(seconds, 1), "peak_mib": round(peak / 2**20)}
        print(stage, result["stages"][stage], flush=True)
    seconds, _, output = measure(DVC, checkout)
    if "up to date" not in output:
        raise SystemExit(f"a second dvc repro had something to do:\n{output}")
    result["second_run_seconds"] = round(seconds, 1)


def main() -> None:
    result: dict = {"stages": {}}
    if len(sys.argv) > 1:
        measure_stages(Path(sys.argv[1]), result)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            clone = Path(scratch) / "clone"
            subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
            measure_stages(clone, result)
    result["total_seconds"] = round(sum(stage["seconds"] for stage in result["stages"].values()), 1)
    result["machine"] = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    result["packages"] = {
        name: version(name) for name in ("torch", "diffusers", "transformers", "dvc", "zarr")
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
