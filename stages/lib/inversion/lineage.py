"""What learned embeddings are made of: the identity of their run, and the environments it passed through."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from stages.lib.core.fingerprints import environment, fingerprint
from stages.lib.core.paths import BASE
from stages.lib.data.pairs import SampleCaptions
from stages.lib.encoding.conditioning import Conditioning
from stages.lib.encoding.latents import Latents
from stages.lib.frame.params import Params
from stages.lib.frame.sections.invert import Invert
from stages.lib.models.weights import component_fingerprint
from stages.lib.training.checkpoints import Resumed
from stages.lib.training.lineage import lineage_of_inputs, passed_through

# Of `invert`: when something is looked at or kept.
CHANGES_NO_VECTOR = frozenset({"checkpoint_every_steps", "log_every_steps", "validation_every_steps"})


def lineage_of(
    params: Params,
    samples: Sequence[SampleCaptions],
    latents: Latents,
    conditioning: Conditioning,
    code: str,
) -> dict[str, str]:
    """What determines the vectors, as texts; it travels in the metadata of their files.

    Args:
        params: sections invert and validation.
        samples: with the texts that hold the placeholder.
        latents, conditioning: of the data set.
        code: hash of the code that computes.
    """
    return {
        **lineage_of_inputs(BASE, samples, latents, conditioning),
        "base_text_encoder": component_fingerprint(BASE / "text_encoder"),
        "params": json.dumps({"invert": determining_params(params.invert)}, sort_keys=True),
        "validation": fingerprint(vars(params.validation)),  # of the curves, which are kept beside
        "code": code,
    }


def identity_of(lineage: Mapping[str, str]) -> str:
    """Hash that names a run's directory."""
    return fingerprint({"kind": "inversion", **lineage})


def determining_params(options: Invert) -> dict[str, Any]:
    """The parameters that determine the vectors."""
    return {name: value for name, value in vars(options).items() if name not in CHANGES_NO_VECTOR}


def environments_of(resumed: Resumed, options: Invert, device: torch.device) -> list[dict[str, str]]:
    """Those that the run has passed through, with this one where steps are left.

    Raises:
        StageError: if this one differs from the last and SD_EXACT_RESUME is 1.
    """
    if resumed.global_step >= options.max_train_steps:
        return resumed.environments
    found = {
        **environment("diffusers", "transformers"),
        "device": device.type,
        "num_threads": torch.get_num_threads(),
    }
    now = {name: str(value) for name, value in sorted(found.items())}
    return passed_through(resumed.environments, now)
