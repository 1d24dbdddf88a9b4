"""The processes that train: how they start, what they agree on, and tensors that lie in parts over them.

Under FSDP `torch.distributed.fsdp.fully_shard` (Zhao et al. 2023) makes every parameter a DTensor, of which
each process holds some rows; its gradient, moments and average lie the same way. Checkpoints and the
exported UNet hold wholes, so they are those of a run that is not sharded. What gathers a tensor has
to be called by all processes at once; a tensor that is not in parts is taken as it is.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, FullyShardedDataParallelPlugin
from accelerate.utils import DistributedType, DynamoBackend, broadcast_object_list, gather_object
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from stages.lib.core.devices import use_same_kernels
from stages.lib.frame.errors import StageError
from stages.lib.frame.launch import check_one_checkout, process_index
from stages.lib.frame.params import Train
from stages.lib.models.loaders import load_unet
from stages.lib.training.optimizers import OPTIMIZERS

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

_KNOWN = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP}


def start_accelerator(options: Train) -> Accelerator:
    """Devices, processes and precision, as `accelerate` and the params configure them.

    Raises:
        StageError: if the two contradict each other, or the device cannot do what is asked for.
    """
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # else accelerate takes each of several for the only one
        mixed_precision=options.mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        fsdp_plugin=sharding_plugin(options.mixed_precision),
        # DDP would regroup the gradients after the first step, also after that of a resumed run, and
        # with them the order in which three processes and more sum them.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if options.mixed_precision == "fp16" and accelerator.scaler is None:
        raise StageError(
            f"params.yaml: train.mixed_precision fp16 needs a GPU, this is {accelerator.device}; "
            'use bf16 or "no"'
        )
    check_one_checkout()
    check_launch(accelerator, options)
    use_same_kernels(options.allow_tf32)
    return accelerator


def check_launch(accelerator: Accelerator, options: Train) -> None:
    """Raise StageError if accelerate's own configuration trains otherwise than params.yaml says."""
    kind, parts = accelerator.distributed_type, accelerator.gradient_accumulation_steps
    if kind not in _KNOWN:
        raise StageError(
            f"accelerate: expected one process, data-parallel ones (DDP) or sharded ones (FSDP 2), got "
            f"{kind.value}; take DeepSpeed and others out of accelerate's configuration"
        )
    if kind == DistributedType.FSDP:
        _check_sharding(accelerator, options)
    if parts != options.gradient_accumulation_steps:
        raise StageError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS: expected train.gradient_accumulation_steps "
            f"{options.gradient_accumulation_steps}, got {parts}; unset it"
        )
    backend = accelerator.state.dynamo_plugin.backend
    if backend != DynamoBackend.NO:
        raise StageError(
            f"accelerate: expected no dynamo backend, got {backend.value.lower()}; take it out of its "
            "configuration or ACCELERATE_DYNAMO_BACKEND, and set train.torch_compile instead"
        )


def _check_sharding(accelerator: Accelerator, options: Train) -> None:
    """Raise StageError, naming all that does not go with FSDP."""
    version = accelerator.state.fsdp_plugin.fsdp_version
    problems = [] if version == 2 else [f"accelerate's fsdp_version {version}, expected 2"]
    for name, expected in (("channels_last", False), ("lora_rank", None), ("torch_compile", False)):
        if getattr(options, name) != expected:
            problems.append(f"train.{name} {getattr(options, name)}, expected {expected}")
    if not OPTIMIZERS[options.optimizer].can_be_sharded:
        able = " or ".join(name for name, kind in OPTIMIZERS.items() if kind.can_be_sharded)
        problems.append(f"train.optimizer {options.optimizer}, expected {able}")
    if options.mixed_precision == "fp16":
        problems.append('train.mixed_precision fp16, expected bf16 or "no"')
    if problems:
        raise StageError(f"FSDP: {'; '.join(problems)}; change it, or launch without FSDP")


def of_first_process(value: Any) -> Any:
    """The first process's ``value``: floating-point results of another may differ in the last bit."""
    return broadcast_object_list([value])[0]


def check_same_step(global_step: int) -> None:
    """Raise StageError if the processes found different checkpoints."""
    steps = gather_object([global_step])
    if len(set(steps)) > 1:
        raise StageError(
            f"checkpoints: the processes would resume at different steps, {steps}; "
            "let SD_WORK name one directory that all of them see"
        )


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

    def gathering(*inputs: torch.Tensor, **conditions: Any) -> Any:
        output = model(*inputs, **conditions)
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
    """This process's part of ``whole``, which every process has, as a tensor that lies as ``like`` does.

    In memory too: a fused optimizer takes weights and moments element by element as they lie.
    """
    if whole.shape != like.shape:
        return whole
    if not isinstance(like, DTensor):
        return torch.empty_like(like, dtype=whole.dtype, device=whole.device).copy_(whole)
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
