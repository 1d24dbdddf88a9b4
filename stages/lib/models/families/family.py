"""What is asked of a family; `sd` and `sdxl` give one each, and `chosen` finds that of a base."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

STATES, TEXT_EMBEDS, TIME_IDS = "encoder_hidden_states", "text_embeds", "time_ids"  # as diffusers calls them


@dataclass(frozen=True)
class TextEncoder:
    """One of a base's text encoders.

    Attributes:
        folder, tokenizer: its components in a pipeline directory.
        class_name: of transformers.
        input_ids: the array of data/tokens.zarr with its token ids.
        layers_left_out: at its end, before any that clip_skip leaves out.
        final_norm: whether its final LayerNorm is applied to what the last layer kept gives.
        pooled: whether its projection of a whole caption, `TEXT_EMBEDS`, is taken too.
    """

    folder: str = "text_encoder"
    tokenizer: str = "tokenizer"
    class_name: str = "CLIPTextModel"
    input_ids: str = "input_ids"
    layers_left_out: int = 0
    final_norm: bool = True
    pooled: bool = False


class View(NamedTuple):
    """What is told of a picture, each of it (height, width) or (top, left) in pixels.

    Attributes:
        original: size of the image that was resized.
        corner: where the resized one was cropped, after it was mirrored if it was.
        target: size of the crop.
    """

    original: tuple[int, int]
    corner: tuple[int, int]
    target: tuple[int, int]


@dataclass(frozen=True)
class Family:
    """A kind of base model.

    Attributes:
        name: in the attributes of the stores.
        pipeline: class of diffusers.
        unused: components of that class that are not used, and what is passed for them.
        text_encoders: whose states stand side by side in `STATES`.
        components: of the directory, in the order of their download.
        view_conditions: a view -> arrays by name that the UNet is conditioned on beside its caption's.
        follows_force_zeros: whether its bases say in model_index.json that no caption is zeros.
        unet_inputs: conditions by name, (B, ...) each -> keyword arguments of the UNet's forward.
        pipeline_inputs: conditions with and without the caption -> keyword arguments of the pipeline.
    """

    name: str
    pipeline: str
    unused: Mapping[str, Any]
    text_encoders: tuple[TextEncoder, ...]
    components: tuple[str, ...]
    view_conditions: Callable[[View], dict[str, list[int]]]
    unet_inputs: Callable[[Mapping[str, torch.Tensor]], dict[str, Any]]
    pipeline_inputs: Callable[[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]], dict[str, Any]]
    follows_force_zeros: bool = False

    @property
    def of_caption(self) -> tuple[str, ...]:
        """Names of a caption's conditions."""
        return (STATES, TEXT_EMBEDS) if any(each.pooled for each in self.text_encoders) else (STATES,)

    @property
    def of_view(self) -> dict[str, int]:
        """Names of a view's conditions, and how many numbers each has."""
        anything = View((1, 1), (0, 0), (1, 1))
        return {name: len(numbers) for name, numbers in self.view_conditions(anything).items()}


def whole_picture(height: int, width: int) -> View:
    """A picture that was neither resized nor cropped: what is asked for when one is made."""
    return View((height, width), (0, 0), (height, width))
