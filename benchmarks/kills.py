"""Signals to every stage at many moments: afterwards the same bytes, no process left, no traceback.

    python benchmarks/kills.py [--kills 11] [--only STAGE]

A small project is made once. Then each stage is started again and again on an empty work directory, and a
signal is sent at some moment of its run:

    SIGKILL, SIGTERM, SIGHUP to the stage; SIGINT to its whole process group, as Ctrl-C does
    SIGSTOP and SIGCONT a second later, after which it has to finish by itself
    each of these to one encoder process, and to one of two processes of a launcher
    SIGKILL to the launcher, and to dvc alone

After each, what is left of the stage is waited for, then it runs undisturbed. Writes
benchmarks/results/kills.json. Exit status 1 if bytes differ, a process is left, or a traceback was printed.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent))

import small_project as small

RESULT = small.ROOT / "benchmarks" / "results" / "kills.json"
TORCHRUN = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2"
SIGNALS = ("SIGTERM", "SIGHUP", "SIGINT", "SIGSTOP")
LAUNCHED = ("encode_captions", "encode_images", "train")
PATIENCE_SECONDS = 15.0


class Trial:
    """One disturbed run of a stage and the undisturbed one after it.

    Args:
        root: of the project, as its stages left it.
        stage: to run.
        changes: environment of the disturbed run.
    """

    def __init__(self, root: Path, stage: str, **changes: str) -> None:
        self.root, self.stage = root, stage
        for directory in (root / ".work", root / ".pids"):
            shutil.rmtree(directory, ignore_errors=True)
        command = [sys.executable, "-m", small.MODULE_OF[stage]]
        if changes.pop("DVC", ""):
            command = [sys.executable, "-m", "dvc", "repro", "-f", "-s", stage]
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, cwd=root, env=small.environment(**changes), start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=self.errors, stderr=self.errors,
        )  # fmt: skip

    def tree(self) -> list[psutil.Process]:
        """The process and all below it."""
        try:
            process = psutil.Process(self.process.pid)
            return [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def wait_for(self, what: str) -> psutil.Process | None:
        """The first process below whose command line holds ``what``."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.process.poll() is None and time.monotonic() < deadline:
            for process in self.tree()[1:]:
                try:
                    if what in " ".join(process.cmdline()) and "resource_tracker" not in process.cmdline():
                        return process
                except psutil.Error:
                    continue
            time.sleep(0.02)
        return None

    def end(self, seen: list[psutil.Process]) -> tuple[list[str], str]:
        """Wait for the disturbed run's end; names of processes that outlive it, and what it printed."""
        try:
            self.process.wait(120)
        except subprocess.TimeoutExpired:
            return ["hangs"], ""
        _, alive = psutil.wait_procs(seen, PATIENCE_SECONDS)
        left = []
        for process in alive:
            try:
                if process.status() != psutil.STATUS_ZOMBIE:
                    left.append(" ".join(process.cmdline())[:80])
                    process.kill()
            except psutil.NoSuchProcess:
                continue
        self.errors.seek(0)
        return left, self.errors.read()


def send(trial: Trial, name: str, target: psutil.Process | None) -> list[psutil.Process]:
    """Send a signal; gives back what ran until then."""
    seen = trial.tree()
    number = getattr(signal, name)
    try:
        if name == "SIGINT" and target is None:
            os.killpg(trial.process.pid, number)
        else:
            os.kill(trial.process.pid if target is None else target.pid, number)
            if name == "SIGSTOP":
                time.sleep(1.0)
                os.kill(trial.process.pid if target is None else target.pid, signal.SIGCONT)
    except ProcessLookupError:  # it has ended before
        pass
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=11, help="SIGKILLs to each stage")
    parser.add_argument("--only", default="", help="stages, with commas between them")
    arguments = parser.parse_args()
    root = small.make(Path(tempfile.mkdtemp()) / "project", tuple(range(40)))
    small.must(small.dvc(root, "repro"))
    ends = set()
    for stage in small.STAGES if not arguments.only else arguments.only.split(","):
        rows = trials(root, stage, arguments.kills)
        ends |= {row["outcome"] for row in rows}
        record(stage, rows)
    sys.exit(ends != {"equal bytes"})


def record(stage: str, rows: list[dict[str, object]]) -> None:
    """Put a stage's rows in the place of those that the result has of it."""
    found = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    found = [row for row in found if row["stage"] != stage] + rows
    found.sort(key=lambda row: small.STAGES.index(row["stage"]))
    other = [row for row in found if row["outcome"] != "equal bytes"]
    counts = collections.Counter(f"{row['target']} {row['signal']}" for row in found)
    summary = {
        "signals": len(found),
        "other_ends": len(other),
        "counts": dict(sorted(counts.items())),
        "rows": found,
    }
    RESULT.write_text(json.dumps(summary, indent=1) + "\n")


def trials(root: Path, stage: str, num_kills: int) -> list[dict[str, object]]:
    """Every signal to a stage; at the end it has run undisturbed in one process."""
    rows = []
    started = time.monotonic()
    shutil.rmtree(root / ".work", ignore_errors=True)
    small.must(small.run_stage(root, stage))
    seconds, expected = time.monotonic() - started, small.outputs(root)
    for index in range(num_kills):
        rows.append(trial(root, expected, stage, "stage", "SIGKILL", (index + 0.5) / num_kills * seconds))
    for name in SIGNALS:
        for share in (0.05, 0.3, 0.6, 0.9):
            rows.append(trial(root, expected, stage, "stage", name, share * seconds))
    rows.append(trial(root, expected, stage, "dvc", "SIGKILL", 1.5 + 0.5 * seconds, DVC="1"))
    if stage.startswith("encode"):
        for name in ("SIGKILL", *SIGNALS):
            for wait in (0.05, 1.5):
                rows.append(trial(root, expected, stage, "worker", name, wait, "spawn_main"))
    if stage in LAUNCHED:
        shutil.rmtree(root / ".work", ignore_errors=True)
        small.must(small.run_stage(root, stage, SD_LAUNCH=TORCHRUN))
        of_two = small.outputs(root)  # training in two processes sums in another order
        for name in ("SIGKILL", *SIGNALS):
            for wait in (0.3, 4.0):
                below = f"-m {small.MODULE_OF[stage]}"
                rows.append(trial(root, of_two, stage, "rank", name, wait, below, SD_LAUNCH=TORCHRUN))
        for wait in (0.05, 1.0, 5.0):
            rows.append(trial(root, of_two, stage, "launcher", "SIGKILL", wait, SD_LAUNCH=TORCHRUN))
        shutil.rmtree(root / ".work", ignore_errors=True)
        small.must(small.run_stage(root, stage))
    return rows


def trial(
    root: Path,
    expected: dict[str, bytes],
    stage: str,
    target: str,
    name: str,
    moment: float,
    below: str = "",
    **changes: str,
) -> dict[str, object]:
    """One signal, and what came of it."""
    workers = {"SD_WORKERS": "2"} if target == "worker" else {}
    disturbed = Trial(root, stage, **changes, **workers)
    process = disturbed.wait_for(below) if below else None
    time.sleep(moment)
    seen = send(disturbed, name, process)
    left, printed = disturbed.end(seen)
    after = small.run_stage(root, stage, SD_LAUNCH=changes.get("SD_LAUNCH", ""))
    problems = [f"left: {each}" for each in left]
    # torchrun's own report of a process that failed is a traceback of torchrun.
    own = printed.split("torch/distributed/elastic")[0] if "torch/distributed/elastic" in printed else printed
    if "Traceback" in own or "Exception ignored" in own:
        problems.append(f"traceback: {own[-600:]}")
    if after.returncode:
        problems.append(f"fails afterwards: {after.stderr[-400:]}")
    elif differing := [each for each in expected if small.outputs(root).get(each) != expected[each]]:
        problems.append(f"other bytes: {differing[:3]}")
    row = {
        "stage": stage, "target": target, "signal": name, "after_seconds": round(moment, 2),
        "outcome": "; ".join(problems) or "equal bytes",
    }  # fmt: skip
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
