"""Writes down when each optimizer step of a program ended, without a change to the program.

Python imports this module at its start where its directory is on PYTHONPATH. A hook that PyTorch
calls after every step of any optimizer notes the time; at exit the times go to a file.

STEP_TIMES        path of the JSON file: times in seconds of the monotonic clock, peak GPU memory
STEP_TIMES_SYNC   numbers of the steps after which the GPU is waited for: the first and the last timed
"""

import atexit
import json
import os
import time


def note_step_times(path: str, synchronized: set[int]) -> None:
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    found: dict = {"times": [], "peak_gpu_bytes": None}

    def after_step(*_: object) -> None:
        if len(found["times"]) + 1 in synchronized and torch.cuda.is_initialized():
            torch.cuda.synchronize()
            found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
        found["times"].append(time.monotonic())

    def write() -> None:
        if found["times"]:  # not in a helper process
            with open(path, "w", encoding="utf-8") as file:
                json.dump(found, file)

    register_optimizer_step_post_hook(after_step)
    atexit.register(write)


def load_torchvision() -> None:
    """Torchvision's Python code works on any PyTorch, but its import looks for its compiled operators.

    The registry's wheels are compiled for CUDA: beside a PyTorch without it, two operators that it
    registers shapes for are missing. The script needs transforms alone, so their names will do.
    """
    import torch

    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou) -> Tensor")


if "STEP_TIMES" in os.environ:
    note_step_times(os.environ["STEP_TIMES"], set(map(int, os.environ["STEP_TIMES_SYNC"].split(","))))
    if "STEP_TIMES_TORCHVISION" in os.environ:
        load_torchvision()
