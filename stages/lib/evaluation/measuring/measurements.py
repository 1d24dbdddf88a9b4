"""What was measured of a UNet and of the data, before any statistics, and the file that it lies in.

baseline and evaluate write it, report reads it: numbers and intervals are made without any model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from stages.lib.core.paths import BASELINE_MEASUREMENTS, EVALUATION_MEASUREMENTS
from stages.lib.core.tensors import read_checked, write_checked
from stages.lib.diffusion.held_out import HeldOutLosses
from stages.lib.frame.errors import StageError


@dataclass(frozen=True)
class Reference:
    """Features of the data, (N, D) float32, in the order of the sample_ids: CLIP's, but for the last.

    Attributes:
        training: images of the training split.
        held_out: images of the validation split.
        held_out_captions: the first captions of those.
        held_out_inception: Inception's features of the held-out images, where FID is asked for.
    """

    training: torch.Tensor
    held_out: torch.Tensor
    held_out_captions: torch.Tensor
    held_out_inception: torch.Tensor | None = None


@dataclass(frozen=True)
class Measurements:
    """What was measured of one UNet.

    Attributes:
        losses: of held-out samples.
        prediction_type: what the UNet predicts.
        alphas_cumprod: (num_train_timesteps,) of its noise schedule.
        captions: M held-out captions that pictures were made of.
        picture_features: (N, D) of the pictures it made, those of the captions first; None without CLIP.
        caption_features: (M, D) of the captions.
        inception_features: (M, 2048) of the pictures of the captions, where FID is asked for.
        inception_fingerprint: of the Inception that saw them.
        made_from: hashes of what it was measured with and on, by name; equal for UNets that compare.
        files: path -> hash of the pictures that were made with it, in the directory of the file.
    """

    losses: HeldOutLosses
    prediction_type: str
    alphas_cumprod: torch.Tensor
    captions: Sequence[str]
    picture_features: torch.Tensor | None
    caption_features: torch.Tensor | None
    inception_features: torch.Tensor | None = None
    inception_fingerprint: str = ""
    made_from: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)

    def compares_with(self, other: Measurements) -> bool:
        """Whether the losses are of the same problems: equal targets on equal noise schedules."""
        return self.prediction_type == other.prediction_type and torch.equal(
            self.alphas_cumprod, other.alphas_cumprod
        )


def write_measurements(path: Path, measurements: Measurements, reference: Reference | None = None) -> None:
    """Write a safetensors file; the same values give the same bytes."""
    losses = measurements.losses
    tensors = {
        "validation_losses": losses.losses,  # computed in float32: nothing is lost
        "alphas_cumprod": measurements.alphas_cumprod,
        "picture_features": measurements.picture_features,
        "caption_features": measurements.caption_features,
        "inception_features": measurements.inception_features,
    }
    if reference is not None:
        tensors |= {
            "training_features": reference.training,
            "held_out_features": reference.held_out,
            "held_out_caption_features": reference.held_out_captions,
            "held_out_inception_features": reference.held_out_inception,
        }
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    metadata = {
        "prediction_type": measurements.prediction_type,
        "sample_ids": json.dumps(losses.sample_ids),
        "timesteps": json.dumps(losses.timesteps),
        "num_train_timesteps": str(losses.num_train_timesteps),
        "captions": json.dumps(list(measurements.captions)),
        "inception_fingerprint": measurements.inception_fingerprint,
        "made_from": json.dumps(measurements.made_from, sort_keys=True),
        "files": json.dumps(measurements.files, sort_keys=True),
    }
    as_float32 = {name: tensor.float() for name, tensor in present.items()}
    write_checked(path, as_float32, metadata)


def read_measurements(path: Path, stage: str) -> tuple[Measurements, Reference | None]:
    """What `write_measurements` wrote.

    Args:
        path: of the file.
        stage: that writes it, named in errors.

    Raises:
        StageError: if there is no such file, or it is damaged or of another version of the project.
    """
    if not path.exists():
        raise StageError(f"{path}: not found; run `dvc repro {stage}`")
    try:
        tensors, metadata = read_checked(path)
        losses = HeldOutLosses(
            json.loads(metadata["sample_ids"]),
            json.loads(metadata["timesteps"]),
            tensors["validation_losses"].double(),
            int(metadata["num_train_timesteps"]),
        )
        measurements = Measurements(
            losses,
            metadata["prediction_type"],
            tensors["alphas_cumprod"],
            json.loads(metadata["captions"]),
            tensors.get("picture_features"),
            tensors.get("caption_features"),
            tensors.get("inception_features"),
            metadata["inception_fingerprint"],
            json.loads(metadata["made_from"]),
            json.loads(metadata["files"]),
        )
        return measurements, _reference(tensors)
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise StageError(
            f"{path}: expected the measurements that this version's {stage} writes, got {error!r}; "
            f"run `dvc repro -f -s {stage}`"
        ) from error


def check_same_problems(base: Measurements, tuned: Measurements) -> None:
    """Raise StageError if two UNets were not measured with and on the same."""
    if differing := sorted(
        name
        for name in base.made_from.keys() | tuned.made_from.keys()
        if base.made_from.get(name) != tuned.made_from.get(name)
    ):
        raise StageError(
            f"{BASELINE_MEASUREMENTS}, {EVALUATION_MEASUREMENTS}: expected base and fine-tuned UNet measured "
            f"with the same, got different {', '.join(differing)}; run `dvc repro -f -s baseline`, then "
            "`dvc repro -f -s evaluate`"
        )
    for what, one, other in (
        ("held-out samples", base.losses.sample_ids, tuned.losses.sample_ids),
        ("timesteps", base.losses.timesteps, tuned.losses.timesteps),
        ("captions", base.captions, tuned.captions),
    ):
        if list(one) != list(other):
            raise StageError(
                f"{BASELINE_MEASUREMENTS}, {EVALUATION_MEASUREMENTS}: base and fine-tuned UNet measured on "
                f"different {what} ({len(one)}, {len(other)}); run `dvc repro baseline evaluate`"
            )


def _reference(tensors: dict[str, torch.Tensor]) -> Reference | None:
    if "training_features" not in tensors:
        return None
    return Reference(
        tensors["training_features"],
        tensors["held_out_features"],
        tensors["held_out_caption_features"],
        tensors.get("held_out_inception_features"),
    )
