"""Pictures from a UNet, through diffusers' own pipeline of the base's family.

A picture is a function of its prompt, seed and setting and of ``batch_size``: in a batch of one shape a
row's bits depend neither on its neighbours nor on its place. Another batch shape sums floats in another
order, which moves single pixels by a level or two of 255.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

from stages.lib.encoding.text_encoder import encode_prompt
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import Evaluate
from stages.lib.frame.progress import progress_bar
from stages.lib.frame.start_up import left_out
from stages.lib.inversion.placeholder import Placeholder, install
from stages.lib.models.families.chosen import family_of, zeros_for_no_caption
from stages.lib.models.families.family import Family
from stages.lib.models.layout import read_config
from stages.lib.models.trained import load_trained_unet

SAMPLERS = {
    "ddim": "DDIMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
}


@dataclass(frozen=True)
class Setting:
    """One way to sample; ``scheduler`` is one of `SAMPLERS`, or ``base`` for the model's own."""

    scheduler: str
    guidance_scale: float
    num_inference_steps: int

    @property
    def name(self) -> str:
        """Part of file names, e.g. ``base_guidance5_steps25``."""
        return f"{self.scheduler}_guidance{self.guidance_scale:g}_steps{self.num_inference_steps}"

    @property
    def description(self) -> str:
        """For headings."""
        sampler = "" if self.scheduler == "base" else f"{self.scheduler}, "
        return f"{sampler}guidance {self.guidance_scale:g}, {self.num_inference_steps} steps"


def settings(options: Evaluate) -> list[Setting]:
    """Every combination of scheduler, guidance_scale and num_inference_steps."""
    return list(
        itertools.starmap(
            Setting,
            itertools.product(options.scheduler, options.guidance_scale, options.num_inference_steps),
        )
    )


class Request(NamedTuple):
    """A picture to make. It starts from ``torch.Generator().manual_seed(seed)`` alone."""

    prompt: str
    seed: int


class Rendered(NamedTuple):
    """A picture, and the latents on the way to it, scaled, each (4, h, w); the last are the picture's."""

    picture: Image.Image
    path: list[torch.Tensor]


@dataclass(frozen=True)
class Renderer:
    """A pipeline and what all pictures of an evaluation share.

    Attributes:
        pipeline: in float32.
        family: of the base.
        conditions: text -> what the UNet is told of it, by name, float32; each text encoded once.
        negative_prompt: one of the texts.
        resolution: pixels, side of a picture.
        batch_size: pictures a forward pass; shorter batches are padded.
        clip_skip, num_chunks: as the training captions were encoded.
        zeros_for_no_caption: as the base was trained.
        placeholder: a learned word that the pipeline knows, None for none.
    """

    pipeline: Any
    family: Family
    conditions: Mapping[str, Mapping[str, torch.Tensor]]
    negative_prompt: str
    resolution: int
    batch_size: int
    clip_skip: int | None
    num_chunks: int
    zeros_for_no_caption: bool
    placeholder: Placeholder | None = None


def sampler_config(base: Path, unet: Path) -> dict[str, Any]:
    """The scheduler_config.json beside a trained UNet's weights, else that of the base."""
    trained = unet / "scheduler_config.json"
    return read_config(trained if trained.exists() else base / "scheduler" / "scheduler_config.json")


def own_sampler(base: Path, unet: Path) -> Any:
    """The scheduler that a UNet's own `sampler_config` asks for; StageError if diffusers has none such."""
    config = sampler_config(base, unet)
    return _scheduler_class(config.get("_class_name", "PNDMScheduler"), unet).from_config(config)


def unused_libraries(config: Mapping[str, Any]) -> list[str]:
    """What diffusers imports where it is installed, a second of a start, and does not need here.

    Args:
        config: scheduler_config.json of the sampler; two kinds of them compute with scipy.
    """
    needs_scipy = config.get("use_beta_sigmas") or config.get("_class_name") == "LMSDiscreteScheduler"
    return ["peft"] if needs_scipy else ["peft", "scipy"]


def load_renderer(
    base: Path,
    unet: Path,
    options: Evaluate,
    texts: Iterable[str],
    resolution: int,
    clip_skip: int | None,
    num_chunks: int,
    placeholder: Placeholder | None = None,
) -> Renderer:
    """The base's pipeline with the UNet of ``unet`` and its scheduler, on the GPU where there is one.

    Args:
        base: directory of the base model.
        unet: directory of the UNet.
        texts: every prompt that will be asked for.
        resolution: pixels, side of a picture.
        clip_skip, num_chunks: as the training captions were encoded.
        placeholder: a learned word that prompts may hold.

    Raises:
        StageError: if a part is missing, damaged, or the scheduler is none of diffusers'.
    """
    config, family = sampler_config(base, unet), family_of(base)
    with left_out(*unused_libraries(config)):
        import diffusers

        pipeline_class = getattr(diffusers, family.pipeline)
    pipeline = pipeline_class.from_pretrained(
        base,
        unet=load_trained_unet(base, unet),
        scheduler=own_sampler(base, unet),
        **family.unused,
        use_safetensors=True,
        local_files_only=True,
        torch_dtype=torch.float32,
    )
    pipeline.set_progress_bar_config(disable=True)
    pipeline.vae.to(memory_format=torch.channels_last)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    if placeholder is not None:
        install(pipeline.tokenizer, pipeline.text_encoder, placeholder)
    zeros, size = zeros_for_no_caption(base), options.batch_size
    renderer = Renderer(pipeline, family, {}, "", resolution, size, clip_skip, num_chunks, zeros, placeholder)
    return with_texts(renderer, texts, options.negative_prompt)


def with_texts(renderer: Renderer, texts: Iterable[str], negative_prompt: str) -> Renderer:
    """The same renderer for other prompts, each encoded once."""
    distinct = list(dict.fromkeys([*texts, negative_prompt]))
    known = {text: conditions_of(renderer, text) for text in distinct}
    return dataclasses.replace(renderer, conditions=known, negative_prompt=negative_prompt)


@torch.inference_mode()
def conditions_of(renderer: Renderer, text: str) -> dict[str, torch.Tensor]:
    """A text's conditions as training captions were encoded; a learned word stands for all of its tokens."""
    spelled = text if renderer.placeholder is None else renderer.placeholder.spelled(text)
    return encode_prompt(
        renderer.family, renderer.pipeline, spelled,
        renderer.clip_skip, renderer.num_chunks, renderer.zeros_for_no_caption,
    )  # fmt: skip


def render(
    renderer: Renderer,
    setting: Setting,
    requests: Sequence[Request],
    description: str,
    every_steps: int | None = None,
) -> Iterator[Rendered]:
    """Make pictures, in the order of ``requests``, in batches of one fixed shape.

    Args:
        renderer: knows every prompt.
        setting: how to sample.
        requests: what to make.
        description: of the progress bar.
        every_steps: sampler steps between two latents kept on the way; None keeps none.
    """
    pipeline = renderer.pipeline
    own = pipeline.scheduler
    pipeline.scheduler = _sampler(setting.scheduler, own)
    try:
        with progress_bar(description, "pictures", len(requests)) as bar:
            for batch in _batches(requests, renderer.batch_size):
                yield from _render_batch(renderer, setting, batch, every_steps)
                bar.update(len(batch))
    finally:
        pipeline.scheduler = own


@torch.inference_mode()
def decode(renderer: Renderer, latents: Sequence[torch.Tensor]) -> list[Image.Image]:
    """Scaled latents, each (4, h, w), to pictures, in batches of one fixed shape."""
    vae, processor = renderer.pipeline.vae, renderer.pipeline.image_processor
    pictures: dict[int, Image.Image] = {}
    for shape in dict.fromkeys(each.shape for each in latents):
        rows = [row for row, each in enumerate(latents) if each.shape == shape]
        for batch in _batches(rows, renderer.batch_size):
            padded = [latents[row] for row in _padded(batch, renderer.batch_size)]
            scaled = torch.stack(padded).to(renderer.pipeline.device)  # (B, 4, h, w)
            unscaled = scaled / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
            decoded = processor.postprocess(vae.decode(unscaled).sample, output_type="pil")
            pictures |= zip(batch, decoded, strict=False)
    return [pictures[row] for row in range(len(latents))]


@torch.inference_mode()
def _render_batch(
    renderer: Renderer, setting: Setting, batch: list[Request], every_steps: int | None
) -> list[Rendered]:
    padded = _padded(batch, renderer.batch_size)
    asked = _stacked([renderer.conditions[request.prompt] for request in padded])
    negative = _stacked([renderer.conditions[renderer.negative_prompt]] * len(padded))
    kept: list[torch.Tensor] = []  # each (B, 4, h, w)

    def keep(
        pipeline: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        is_last = step + 1 == pipeline.num_timesteps
        if every_steps is not None and (is_last or (step + 1) % every_steps == 0):
            kept.append(tensors["latents"].clone())
        return {}

    final = renderer.pipeline(
        **renderer.family.pipeline_inputs(asked, negative),
        generator=[torch.Generator().manual_seed(request.seed) for request in padded],
        guidance_scale=setting.guidance_scale,
        num_inference_steps=setting.num_inference_steps,
        height=renderer.resolution,
        width=renderer.resolution,
        callback_on_step_end=keep,
        output_type="latent",  # the pipeline's own decoding leaves out a VAE's shift_factor
    ).images  # (B, 4, h, w)
    pictures = decode(renderer, list(final[: len(batch)]))
    return [Rendered(pictures[row], [latents[row] for latents in kept]) for row in range(len(batch))]


def _sampler(name: str, own: Any) -> Any:
    """A fresh scheduler with the model's betas, prediction_type and timestep_spacing."""
    if name == "base":
        return own
    import diffusers

    # DDIM's default clips every sample to [-1, 1], which is meant for pixels.
    changes = {"clip_sample": False} if name == "ddim" else {}
    return getattr(diffusers, SAMPLERS[name]).from_config(own.config, **changes)


def _scheduler_class(name: str, unet: Path) -> Any:
    import diffusers

    found = getattr(diffusers, name, None)
    if not name.endswith("Scheduler") or found is None:
        raise StageError(
            f"{unet}: expected a scheduler of diffusers {diffusers.__version__}, got {name}; "
            "run `dvc repro fetch_base`"
        )
    return found


def _stacked(conditions: Sequence[Mapping[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([each[name] for each in conditions]) for name in conditions[0]}


def _batches(items: Sequence[Any], batch_size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), batch_size):
        yield list(items[start : start + batch_size])


def _padded(batch: list[Any], batch_size: int) -> list[Any]:
    return batch + [batch[-1]] * (batch_size - len(batch))
