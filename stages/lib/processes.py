"""What several training processes have to agree on."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list, gather_object

from stages.lib.errors import StageError
from stages.lib.params import Train

_KNOWN = {DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP}


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
