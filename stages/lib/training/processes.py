"""The processes that train, and what they have to agree on."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import DistributedType, DynamoBackend, broadcast_object_list, gather_object

from stages.lib.core.devices import use_same_kernels
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import Train
from stages.lib.training.sharding import sharding_plugin

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
    for name, expected in (
        ("channels_last", False), ("lora_rank", None), ("optimizer", "adamw"), ("torch_compile", False),
    ):  # fmt: skip
        if getattr(options, name) != expected:
            problems.append(f"train.{name} {getattr(options, name)}, expected {expected}")
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
