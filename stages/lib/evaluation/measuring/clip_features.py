"""What a CLIP model sees in pictures and texts: the features that the evaluation's metrics stand on.

Any `CLIPModel` of transformers from a local directory, laid out as on the Hub: config.json, safetensors,
preprocessor_config.json and the tokenizer's files.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from stages.lib.frame.errors import StageError
from stages.lib.frame.start_up import left_out
from stages.lib.models.layout import read_config

if TYPE_CHECKING:
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

# Of every forward pass, short batches are padded: a row's bits do not depend on its neighbours then.
BATCH_SIZE = 32


@dataclass(frozen=True)
class Clip:
    """A CLIP model in float32 and eval mode, with what prepares its input."""

    model: CLIPModel
    image_processor: CLIPImageProcessorPil
    tokenizer: CLIPTokenizer


def load_clip(directory: Path) -> Clip:
    """The CLIP in ``directory``, on the GPU where there is one.

    Images go through PIL whether torchvision is installed or not, so that features do not depend on it.

    Raises:
        StageError: if something is missing, damaged, or does not fit together.
    """
    if problems := list(_problems(directory)):
        raise StageError(
            f"{directory}: {'; '.join(problems)}; "
            "take a directory that CLIPModel and CLIPProcessor of transformers load"
        )
    with left_out("scipy"):  # transformers would import it for the losses of other models
        from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer
    try:
        image_processor = CLIPImageProcessorPil.from_pretrained(directory, local_files_only=True)
        tokenizer = CLIPTokenizer.from_pretrained(directory, local_files_only=True)
        model, loading = CLIPModel.from_pretrained(
            directory,
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except MemoryError:
        raise
    except Exception as error:  # the libraries raise what they like for a damaged file
        raise StageError(f"{directory}: cannot be loaded as a CLIP with safetensors: {error}") from error
    # transformers only warns, and leaves these weights random.
    if missing := sorted(loading["missing_keys"]):
        raise StageError(
            f"{directory}: the weights lack {len(missing)} of the tensors that config.json calls for, "
            f"e.g. {missing[0]}; take a whole CLIP, with both towers and their projections"
        )
    if problems := list(_misfits(model.config, image_processor, tokenizer)):
        raise StageError(f"{directory}: {'; '.join(problems)}; take its parts from one checkpoint")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Clip(model.eval().to(device), image_processor, tokenizer)


@torch.inference_mode()
def image_features(clip: Clip, pictures: Iterable[Image.Image]) -> torch.Tensor:
    """Projected features of pictures, taken one batch at a time.

    Returns:
        (N, D) float32 on the CPU, as `CLIPModel.get_image_features` has them: not normalised.
    """
    rows = [torch.empty(0, clip.model.config.projection_dim)]
    for batch in _batches(pictures):
        pixel_values = clip.image_processor(_padded(batch), return_tensors="pt").pixel_values  # (B, 3, H, W)
        features = clip.model.get_image_features(pixel_values.to(clip.model.device)).pooler_output
        rows.append(features[: len(batch)].cpu())
    return torch.cat(rows)


@torch.inference_mode()
def text_features(clip: Clip, texts: Sequence[str]) -> torch.Tensor:
    """Projected features of texts; what exceeds the model's positions, usually 77 tokens, is cut off.

    Returns:
        (N, D) float32 on the CPU, as `CLIPModel.get_text_features` has them: not normalised.
    """
    rows = [torch.empty(0, clip.model.config.projection_dim)]
    for batch in _batches(texts):
        input_ids = clip.tokenizer(
            _padded(batch),
            padding="max_length",
            max_length=clip.model.config.text_config.max_position_embeddings,
            truncation=True,
            return_tensors="pt",
        ).input_ids  # (B, 77)
        features = clip.model.get_text_features(input_ids.to(clip.model.device)).pooler_output
        rows.append(features[: len(batch)].cpu())
    return torch.cat(rows)


def _batches(items: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, BATCH_SIZE)):
        yield batch


def _padded(batch: list[Any]) -> list[Any]:
    return batch + [batch[-1]] * (BATCH_SIZE - len(batch))


def _problems(directory: Path) -> Iterator[str]:
    """What transformers would pass over without an error."""
    if not directory.is_dir():
        yield "no such directory"
        return
    model_type = read_config(directory / "config.json").get("model_type")
    if model_type != "clip":
        yield f"config.json: expected model_type 'clip', got {model_type!r}"
    names = {path.name for path in directory.iterdir()}
    if "tokenizer.json" not in names and not {"vocab.json", "merges.txt"} <= names:
        yield "expected tokenizer.json, or vocab.json and merges.txt, found neither"


def _misfits(config: Any, image_processor: Any, tokenizer: Any) -> Iterator[str]:
    side = config.vision_config.image_size
    blank = Image.new("RGB", (side + 2, side + 1))
    _, height, width = image_processor(blank, return_tensors="np").pixel_values[0].shape
    if (height, width) != (side, side):
        yield (
            f"preprocessor_config.json: expected pictures of {side} x {side}, the model's image_size, "
            f"got {width} x {height}"
        )
    if len(tokenizer) > config.text_config.vocab_size:
        yield (
            f"the tokenizer: expected at most {config.text_config.vocab_size} tokens, the model's "
            f"vocab_size, got {len(tokenizer)}"
        )
