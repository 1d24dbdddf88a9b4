"""What the training steps of the tiny base share: parameters, seeds, schedule, resumable state."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import yaml

from stages.lib.frame.start_up import keep_freed_memory

CHECKPOINTS = Path(".work/tiny")


def read_params(section: str) -> dict:
    return yaml.safe_load(Path("tiny/params.yaml").read_text())[section]


def start(section: str) -> dict:
    """Logging, threads and allocator for a training step; returns its parameters."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    keep_freed_memory()
    torch.set_num_threads(int(os.environ.get("TINY_THREADS", os.cpu_count() or 1)))
    return read_params(section)


def step_generator(seed: int, step: int) -> torch.Generator:
    """A generator that depends on (seed, step) alone, so that a resumed run draws the same."""
    entropy = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(entropy >> 1))


def cosine_schedule(step: int, max_train_steps: int, lr_warmup_steps: int) -> float:
    """Learning-rate factor in [0, 1]: linear warm-up, then half a cosine to zero."""
    if step < lr_warmup_steps:
        return (step + 1) / lr_warmup_steps
    progress = (step - lr_warmup_steps) / max(1, max_train_steps - lr_warmup_steps)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


class Checkpoint:
    """The newest state of one training step, under the hash of what determines it.

    Args:
        name: of the step.
        params: its section of params.yaml.
        inputs: files and directories it reads.
    """

    def __init__(self, name: str, params: dict, inputs: Sequence[str]) -> None:
        digest = hashlib.sha256(json.dumps(params, sort_keys=True).encode())
        for path in sorted(file for name in inputs for file in _files(Path(name))):
            digest.update(path.as_posix().encode() + path.read_bytes())
        self.path = CHECKPOINTS / f"{name}-{digest.hexdigest()[:16]}.pt"

    def save(self, step: int, **state: object) -> None:
        """Replace the checkpoint atomically."""
        CHECKPOINTS.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        torch.save({"step": step, **state}, partial)
        os.replace(partial, self.path)

    def load(self) -> dict | None:
        """The saved state, None at the start."""
        return torch.load(self.path, weights_only=True) if self.path.exists() else None


def _files(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


class Progress:
    """One log line every ``every`` steps with the mean of what was reported since."""

    def __init__(self, max_train_steps: int, batch_size: int, every: int = 100) -> None:
        self.max_train_steps, self.batch_size, self.every = max_train_steps, batch_size, every
        self.values: dict[str, list[float]] = {}
        self.started = time.monotonic()
        self.count = 0

    def log(self, step: int, **values: float) -> None:
        for key, value in values.items():
            self.values.setdefault(key, []).append(float(value))
        self.count += 1
        if step % self.every == 0 or step == self.max_train_steps:
            rate = self.count * self.batch_size / (time.monotonic() - self.started)
            left = (self.max_train_steps - step) * self.batch_size / rate / 60
            means = "  ".join(f"{key} {np.mean(series):.4f}" for key, series in self.values.items())
            logging.info(
                "step %d/%d  %s  %.1f images/s  %.0f min left", step, self.max_train_steps, means, rate, left
            )
            self.values.clear()
