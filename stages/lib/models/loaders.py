"""The components of a base in memory. Each loader imports what it needs and nothing more."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.lib.frame.errors import StageError
from stages.lib.models.families.family import TextEncoder
from stages.lib.models.families.sd import SD
from stages.lib.models.layout import component_directory

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTokenizer


def load_tokenizer(base: Path, folder: str = "tokenizer") -> CLIPTokenizer:
    """A tokenizer of the base, with its own pad token (SD 1.x pads with EOS, SD 2.x, SDXL's 2nd with "!")."""
    from transformers import CLIPTokenizer

    directory = component_directory(base, folder)
    try:
        return CLIPTokenizer.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # the tokenizers library raises no type of its own
        raise StageError(
            f"{directory}: cannot be loaded as CLIPTokenizer: {error}; run `dvc repro -f -s fetch_base`"
        ) from error


def load_text_encoder(base: Path, encoder: TextEncoder = SD.text_encoders[0]) -> Any:
    """A text encoder of the base, a ``CLIPTextModel`` or with a projection: CPU, float32, eval mode."""
    import torch
    import transformers

    model_class = getattr(transformers, encoder.class_name)
    # transformers 5 would keep the checkpoint's own dtype.
    return _load_model(model_class, component_directory(base, encoder.folder), dtype=torch.float32)


def load_vae(base: Path) -> AutoencoderKL:
    """The base's VAE: CPU, float32, eval mode."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return _load_model(AutoencoderKL, component_directory(base, "vae"), torch_dtype=torch.float32)


def load_unet(base: Path) -> UNet2DConditionModel:
    """The UNet in ``base/unet``. CPU, float32, eval mode."""
    return load_unet_in(component_directory(base, "unet"))


def load_unet_in(directory: Path) -> UNet2DConditionModel:
    """The whole UNet in a directory of its own. CPU, float32, eval mode."""
    import torch
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    component_directory(directory.parent, directory.name)
    return _load_model(UNet2DConditionModel, directory, torch_dtype=torch.float32)


def _load_model(model_class: Any, directory: Path, **dtype: Any) -> Any:
    try:
        model, loading = model_class.from_pretrained(
            directory, use_safetensors=True, local_files_only=True, output_loading_info=True, **dtype
        )
    except MemoryError:
        raise
    except Exception as error:  # the libraries raise what they like for a damaged config or file
        raise StageError(f"{directory}: cannot be loaded as {model_class.__name__}: {error}") from error
    # The libraries only warn, and leave these weights random.
    if missing := sorted(loading["missing_keys"]):
        raise StageError(
            f"{directory}: the weights lack {len(missing)} of the tensors that config.json calls for, "
            f"e.g. {missing[0]}; fetch a whole checkpoint and run `dvc repro fetch_base`"
        )
    return model.eval()
