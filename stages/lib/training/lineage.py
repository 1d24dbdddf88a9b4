"""What a run is made of: its identity, which names its checkpoints, and the environments it passed through.

The identity is what determines the weights in exact arithmetic: the base, the data, the parameters that
matter and the code that computes. The environment moves their last bits. A run goes on under another
environment, says so, and keeps the list of all in the lineage of its weights.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from stages.lib.core.fingerprints import environment, fingerprint
from stages.lib.data.pairs import SampleCaptions
from stages.lib.encoding.conditioning import Conditioning
from stages.lib.encoding.latents import Latents
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import Params, Train
from stages.lib.models.layout import read_config
from stages.lib.models.weights import component_fingerprint
from stages.lib.training.optimizers import OPTIMIZERS

logger = logging.getLogger(__name__)

Environment = dict[str, str]

# Of `train`: when something is looked at or kept, what of the run is exported, where data lie meanwhile.
CHANGES_NO_WEIGHT = frozenset(
    {
        "checkpoint_every_steps",
        "export",
        "export_ema",
        "log_every_steps",
        "max_resident_bytes",
        "num_previews",
        "preview_every_steps",
        "preview_guidance_scale",
        "snapshot_every_steps",
        "validate_ema",
        "validation_every_steps",
    }
)
# Of `train`: equal in exact arithmetic, whatever they are; part of the environment.
MOVES_BITS = frozenset(
    {"channels_last", "gradient_accumulation_steps", "gradient_checkpointing", "torch_compile"}
)
EXACT = "SD_EXACT_RESUME"


def lineage_of(
    params: Params,
    base: Path,
    prediction_type: str,
    samples: Sequence[SampleCaptions],
    latents: Latents,
    conditioning: Conditioning,
    code: str,
) -> dict[str, str]:
    """What determines the weights, as texts; it travels in their safetensors metadata.

    Args:
        params: sections train and validation.
        base: directory of the base model.
        prediction_type: what the UNet learns to predict.
        samples: of both splits.
        latents, conditioning: what is trained on.
        code: hash of the code that computes, see `code_identity`.
    """
    return {
        **lineage_of_inputs(base, samples, latents, conditioning),
        "prediction_type": prediction_type,
        "params": json.dumps(determining_params(params), sort_keys=True),
        "code": code,
    }


def lineage_of_inputs(
    base: Path, samples: Sequence[SampleCaptions], latents: Latents, conditioning: Conditioning
) -> dict[str, str]:
    """Of what is learned from: the base's UNet and schedule, and the data set."""
    return {
        "base_unet": component_fingerprint(base / "unet"),
        "scheduler": fingerprint(read_config(base / "scheduler" / "scheduler_config.json")),
        "latents": latents.fingerprint,
        "captions": conditioning.fingerprint,
        "pairs": fingerprint([dataclasses.astuple(sample) for sample in samples]),
    }


def run_identity(lineage: Mapping[str, str]) -> str:
    """Hash that names a run's directory."""
    return fingerprint(dict(lineage))


def determining_params(params: Params) -> dict[str, Any]:
    """The parameters that determine the weights, by section.

    How the held-out loss is measured counts where it ends the run.
    """
    train = {
        name: value
        for name, value in vars(params.train).items()
        if name not in CHANGES_NO_WEIGHT | MOVES_BITS | _without_effect(params.train)
    }
    alpha = train["lora_alpha"]
    if isinstance(alpha, float) and alpha.is_integer():
        train["lora_alpha"] = int(alpha)  # as in the runs of before it could be a fraction
    if "lora_by_module" in train:
        train["lora_by_module"] = [each.model_dump() for each in params.train.lora_by_module or ()]
    found: dict[str, Any] = {"train": train}
    if params.train.early_stopping_patience is not None:
        found |= yardstick(params)
    return found


def _without_effect(train: Train) -> set[str]:
    """Parameters that change nothing as they are; a run of before they were there keeps its name."""
    is_lora = train.lora_rank is None or train.adapter == "lora"
    is_even = train.lora_rank is None or train.lora_by_module is None
    return {name for name, left_out in (("adapter", is_lora), ("lora_by_module", is_even)) if left_out}


def measure(params: Params) -> dict[str, Any]:
    """How a held-out loss is measured: two that are measured alike compare."""
    return {"validate_ema": params.train.validate_ema, **vars(params.validation)}


def yardstick(params: Params) -> dict[str, Any]:
    """How the best weights of a run are told from the others: how and when held-out losses are measured."""
    when = {name: getattr(params.train, name) for name in ("validation_every_steps", "export_ema")}
    return {"validation": {**measure(params), **when}}


def environment_of(accelerator: Accelerator, train: Train) -> Environment:
    """What changes the last bits of a training run, as texts."""
    adapters = [] if train.lora_rank is None else ["peft"]
    packages = {"diffusers", "accelerate", "transformers", *adapters, *OPTIMIZERS[train.optimizer].packages}
    found = {
        **environment(*sorted(packages)),
        "device": accelerator.device.type,
        "num_threads": torch.get_num_threads(),
        "num_processes": accelerator.num_processes,
        "sharded": accelerator.distributed_type == DistributedType.FSDP,
        **{name: getattr(train, name) for name in MOVES_BITS},
    }
    return {name: str(value) for name, value in sorted(found.items())}


def passed_through(earlier: Sequence[Environment], now: Environment) -> list[Environment]:
    """The environments of a run that goes on in this one; a warning names what differs.

    Raises:
        StageError: if something differs and SD_EXACT_RESUME is 1.
    """
    if not earlier or earlier[-1] == now:
        return [*earlier] or [now]
    changed = sorted(
        name for name in earlier[-1].keys() | now.keys() if earlier[-1].get(name) != now.get(name)
    )
    difference = ", ".join(
        f"{name} {earlier[-1].get(name, 'absent')} -> {now.get(name, 'absent')}" for name in changed
    )
    if os.environ.get(EXACT, "").strip() not in ("", "0"):
        raise StageError(
            f"the checkpoint was made in another environment ({difference}), and {EXACT} is set: the "
            f"weights would differ in their last bits; go back to that environment, or unset {EXACT} "
            "to go on in this one"
        )
    logger.warning(
        "the run goes on in another environment (%s): equal but for rounding; %s=1 refuses instead",
        difference,
        EXACT,
    )
    return [*earlier, now]


def exported_lineage(
    lineage: Mapping[str, str], environments: Sequence[Environment], train: Train, global_step: int | None
) -> dict[str, str]:
    """The lineage in the exported weights: what determines them, which they are, and where they were made."""
    exported = {"weights": train.export, "averaged": train.use_ema and train.export_ema, "step": global_step}
    return {
        **lineage,
        "environments": json.dumps(list(environments), sort_keys=True),
        "exported": json.dumps(exported, sort_keys=True),
    }
