"""The noise schedule: what is trained on, and what is sampled with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from stages.lib.frame.errors import StageError

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


def training_scheduler(
    config: Mapping[str, Any], prediction_type: str | None = None, rescale_betas_zero_snr: bool = False
) -> DDPMScheduler:
    """The noise schedule to train on: the base's betas, whatever its scheduler's class.

    Args:
        config: the base's scheduler_config.json.
        prediction_type: ``epsilon``, ``v_prediction`` or ``sample``; None keeps the base's.
        rescale_betas_zero_snr: end the schedule in pure noise (Lin et al. 2024, algorithm 1);
            false keeps the base's, which may be rescaled already.

    Raises:
        StageError: for an unknown prediction_type, and for ``epsilon`` on a schedule that ends in
            pure noise: there the noise is the whole input, and predicting it teaches nothing.
    """
    predicted: str = prediction_type or config.get("prediction_type", "epsilon")
    rescaled: bool = rescale_betas_zero_snr or config.get("rescale_betas_zero_snr", False)
    if predicted not in PREDICTION_TYPES:
        raise unknown_prediction_type(predicted)
    if rescaled and predicted == "epsilon":
        raise StageError(
            "rescale_betas_zero_snr (params.yaml: train, or data/base/scheduler): expected prediction_type "
            "v_prediction or sample, got epsilon: at zero signal-to-noise the noise is the input itself and "
            "nothing is learned; set train.prediction_type to v_prediction"
        )
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    return DDPMScheduler.from_config(dict(config), prediction_type=predicted, rescale_betas_zero_snr=rescaled)


def sampling_config(config: Mapping[str, Any], scheduler: DDPMScheduler) -> dict[str, Any]:
    """The scheduler_config.json to sample with after training on ``scheduler``, made from the base's.

    The base's sampler stays where it can. PNDM and others know no ``sample`` prediction and ignore
    ``rescale_betas_zero_snr``, so these go to DDIM; a rescaled schedule is sampled from its last
    timestep on, which "leading" spacing would never visit (Lin et al. 2024, section 3.3).
    """
    predicted = scheduler.config.prediction_type
    rescaled = scheduler.config.rescale_betas_zero_snr and not config.get("rescale_betas_zero_snr", False)
    sampling = {**config, "prediction_type": predicted}
    if predicted == "sample" or rescaled:
        # DDIM's default clips every sample to [-1, 1], which is meant for pixels.
        sampling |= {"_class_name": "DDIMScheduler", "clip_sample": False}
    if rescaled:
        sampling |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return sampling


def unknown_prediction_type(prediction_type: str) -> StageError:
    expected = " or ".join(PREDICTION_TYPES)
    return StageError(f"data/base/scheduler: expected prediction_type {expected}, got {prediction_type}")
