"""What a run is made of: the lineage in its weights, and the fingerprint of its checkpoints."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from stages.lib.core.fingerprints import environment, fingerprint
from stages.lib.data.pairs import SampleCaptions
from stages.lib.encoding.conditioning import Conditioning
from stages.lib.encoding.latents import Latents
from stages.lib.frame.params import Params
from stages.lib.models.layout import read_config
from stages.lib.models.weights import component_fingerprint

# Parameters of `train` that change no weight and no curve: a run goes on under another value of them.
WITHOUT_EFFECT = ("export", "max_resident_bytes")


def lineage_of(
    params: Params,
    base: Path,
    prediction_type: str,
    samples: list[SampleCaptions],
    latents: Latents,
    conditioning: Conditioning,
) -> dict[str, str]:
    """What the trained weights were made from, as texts; it travels in their safetensors metadata."""
    sections = {"train": vars(params.train), "validation": vars(params.validation)}
    return {
        "base_unet": component_fingerprint(base / "unet"),
        "scheduler": fingerprint(read_config(base / "scheduler" / "scheduler_config.json")),
        "prediction_type": prediction_type,
        "latents": latents.fingerprint,
        "captions": conditioning.fingerprint,
        "pairs": fingerprint([dataclasses.astuple(sample) for sample in samples]),
        "params": json.dumps(sections, sort_keys=True),
    }


def run_fingerprint(lineage: dict[str, str], accelerator: Accelerator, code: str) -> str:
    """Hash of everything that determines a run: its lineage, this code, and the machine it runs on."""
    sections = json.loads(lineage["params"])
    for name in WITHOUT_EFFECT:
        del sections["train"][name]
    machine = _machine(accelerator, sections["train"])
    return fingerprint([{**lineage, "params": sections}, machine, code])


def _machine(accelerator: Accelerator, train: dict[str, Any]) -> dict[str, str | int]:
    """What changes floating-point results, so that a checkpoint is resumed only where it was made."""
    adapters = [] if train["lora_rank"] is None else ["peft"]
    eight_bit = ["bitsandbytes"] if train["optimizer"] == "adamw_8bit" else []
    return {
        **environment("diffusers", "accelerate", "transformers", *adapters, *eight_bit),
        "device": accelerator.device.type,
        "num_threads": torch.get_num_threads(),
        "num_processes": accelerator.num_processes,
        "sharded": accelerator.distributed_type == DistributedType.FSDP,
    }
