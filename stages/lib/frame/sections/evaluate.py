"""Section evaluate of params.yaml."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import Field

from stages.lib.frame.sections.section import Number, Section, Several, Text, Whole


class Evaluate(Section):
    """Which pictures are made, and how sure the numbers are that are measured on them."""

    section: ClassVar[str] = "evaluate"

    prompts: Several[Text] = Field(description="one row of the grid each")
    negative_prompt: Text = Field(description="prompt of the unconditional half of guidance")
    seeds: Several[Annotated[Whole, Ge(0)]] = Field(description="one picture each, side by side")
    scheduler: Several[Literal["base", "ddim", "dpmsolver++", "euler", "unipc"]] = Field(
        description="base | ddim | dpmsolver++ | euler | unipc; base is the model's own; one grid each"
    )
    guidance_scale: Several[Annotated[Number, Ge(1)]] = Field(description="one grid each; 1 is no guidance")
    num_inference_steps: Several[Annotated[Whole, Ge(1)]] = Field(description="sampler steps; one grid each")
    batch_size: Annotated[Whole, Ge(1)] = Field(description="pictures a forward pass")
    num_contact_samples: Annotated[Whole, Ge(1)] = Field(description="training images on the contact sheet")
    denoising_every_steps: Annotated[Whole, Ge(1)] | None = Field(
        description="sampler steps between two pictures of the denoising strip; null draws none"
    )
    num_metric_samples: Annotated[Whole, Ge(2)] = Field(
        description="held-out captions whose pictures are measured, with the first setting"
    )
    inception_weights: Text | None = Field(
        description="file of torch-fidelity's Inception weights, for FID; null leaves FID out"
    )
    memorisation_threshold: Annotated[Number, Ge(-1), Le(1)] = Field(
        description="cosine of CLIP features above which a picture counts as a training image's copy"
    )
    num_worst_pairs: Annotated[Whole, Ge(1)] = Field(
        description="pictures shown beside their nearest training image"
    )
    bootstrap_resamples: Annotated[Whole, Ge(100)] = Field(description="resamples behind each interval")
    bootstrap_level: Annotated[Number, Gt(0), Lt(1)] = Field(description="confidence of an interval, 0 to 1")
    bootstrap_seed: Annotated[Whole, Ge(0)] = Field(description="of the resamples")
