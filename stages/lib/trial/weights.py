"""Which weights can be tried, and weights between those of the base and those of a run."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from stages.lib.core.paths import SNAPSHOTS, TRAINED_UNET
from stages.lib.frame.errors import StageError

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

TRAINED = "fine-tuned"


def tried_weights() -> dict[str, Path]:
    """Name -> directory of what training has left: its result first, then its snapshots by step.

    Raises:
        StageError: if nothing has been trained.
    """
    found = {TRAINED: TRAINED_UNET} if TRAINED_UNET.is_dir() else {}
    snapshots = SNAPSHOTS.glob("step-*") if SNAPSHOTS.is_dir() else []
    found |= {f"step {int(path.name.removeprefix('step-'))}": path for path in sorted(snapshots)}
    if not found:
        raise StageError(f"{TRAINED_UNET}: expected a trained UNet, got none; run `dvc repro train`")
    return found


@torch.no_grad()
def between(
    base: Mapping[str, torch.Tensor],
    trained: Mapping[str, torch.Tensor],
    strength: float,
    into: torch.nn.Module,
) -> None:
    """Give ``into`` the weights base + strength * (trained - base), computed in float32.

    Of adapters whose update is linear in their scale, as LoRA's is (Hu et al. 2022), this is that scale; of
    a UNet trained as a whole it is the interpolation of Wortsman et al. 2022, and beyond 1 its extrapolation.

    Args:
        base, trained: weights of the same names and shapes.
        strength: 0 gives the base's, 1 the trained ones, bit for bit.
        into: a module with these weights; changed in place.
    """
    for name, weight in into.state_dict().items():
        whole = {0.0: base[name], 1.0: trained[name]}.get(strength)
        weight.copy_(whole if whole is not None else torch.lerp(base[name], trained[name], strength))


def weights_of(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """Its weights, apart from the module's own, which may be changed."""
    return copy.deepcopy(unet.state_dict())
