"""Training under FSDP: tensors that lie in parts over the processes, as wholes and back.

`torch.distributed.fsdp.fully_shard` (Zhao et al. 2023) makes every parameter a DTensor, of which each
process holds some rows; its gradient, moments and average lie the same way. Checkpoints and the
exported UNet hold wholes, so they are those of a run that is not sharded. What gathers a tensor has
to be called by all processes at once; a tensor that is not in parts is taken as it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import FullyShardedDataParallelPlugin
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from stages.lib.frame.launch import process_index
from stages.lib.models.loaders import load_unet

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel


def sharding_plugin(mixed_precision: str) -> FullyShardedDataParallelPlugin | None:
    """What accelerate's configuration says of FSDP, None if nothing; gradients are summed in float32."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    dtype = torch.bfloat16 if mixed_precision == "bf16" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
    return FullyShardedDataParallelPlugin(mixed_precision_policy=policy)


def plain_forward(model: torch.nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` for validation and previews; of a sharded model its own, which gathers the weights."""
    if not isinstance(model, FSDPModule):
        return forward

    def gathering(*inputs: torch.Tensor) -> Any:
        output = model(*inputs)
        model.reshard()  # without a backward pass it would keep these weights for the next step
        return output

    return gathering


def full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor, in every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(value: Any) -> Any:
    """A state with its tensors as wholes on the CPU of the first process, one at a time; empty in others."""
    if isinstance(value, DTensor):
        whole = value.full_tensor()
        return whole.cpu() if process_index() == 0 else whole.new_empty(0)
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    if isinstance(value, list):
        return [gathered(item) for item in value]
    return value


def spread_like(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """This process's part of ``whole``, which every process has, as a tensor that lies as ``like`` does."""
    if not isinstance(like, DTensor) or whole.shape != like.shape:
        return whole
    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def unsharded(unet: UNet2DConditionModel, base: Path) -> UNet2DConditionModel:
    """The UNet itself, or in the first process one with its weights as wholes."""
    sharded = isinstance(unet, FSDPModule)
    if not sharded:
        return unet
    weights = gathered(unet.state_dict())
    if process_index() > 0:
        return unet
    whole = load_unet(base)
    whole.load_state_dict(weights)
    return whole
