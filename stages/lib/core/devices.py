"""The device that computes, and what it computes with."""

from __future__ import annotations

import torch


def use_same_kernels(allow_tf32: bool = False) -> None:
    """Let cuDNN give the same bytes each time; TF32 in float32 matrices and convolutions only if allowed."""
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allow_tf32


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``tensor`` on ``device``; a copy to a GPU is put in its queue, and not waited for."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
