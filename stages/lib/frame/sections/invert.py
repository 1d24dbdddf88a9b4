"""Section invert of params.yaml."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt, Le
from pydantic import BeforeValidator, Field

from stages.lib.frame.sections.section import Number, OneOrSeveral, Section, Text, Whole, check, no_is_text

OWN = "own"


class Invert(Section):
    """How the embeddings of a placeholder token are learned, with everything else frozen."""

    section: ClassVar[str] = "invert"

    placeholder: Text | None = Field(description="the word that is learned, e.g. <emoji>; null learns none")
    num_vectors: Annotated[Whole, Ge(1)] = Field(description="tokens that the word stands for")
    initializer: Text = Field(
        description="words whose vectors it starts from: fewer repeat in turn, more are averaged in groups"
    )
    captions: OneOrSeveral[Text] = Field(
        description="templates, {} is the word; or own: the pairs whose captions hold it"
    )
    seed: Annotated[Whole, Ge(0)] = Field(
        description="of data order, captions, posterior samples, noise and timesteps"
    )
    train_batch_size: Annotated[Whole, Ge(1)] = Field(description="images an optimizer step")
    max_train_steps: Annotated[Whole, Ge(1)] = Field(description="optimizer steps")
    learning_rate: Annotated[Number, Ge(0)] = Field(description="of AdamW, constant")
    adam_weight_decay: Annotated[Number, Ge(0)] = Field(
        description="decoupled, of the new vectors alone, a step and unit of learning rate"
    )
    max_grad_norm: Annotated[Number, Gt(0)] | None = Field(
        description="L2 norm that the gradient is clipped to; null leaves it"
    )
    mask_floor: Annotated[Number, Ge(0), Le(1)] = Field(
        description="weight of the loss where an image's mask is 0, used with masks; 1 ignores them"
    )
    mixed_precision: Annotated[Literal["no", "bf16"], BeforeValidator(no_is_text)] = Field(
        description="no | bf16: arithmetic of the forward and backward pass"
    )
    log_every_steps: Annotated[Whole, Ge(1)] = Field(
        description="optimizer steps between two points of the curves"
    )
    validation_every_steps: Annotated[Whole, Ge(1)] = Field(
        description="optimizer steps between two held-out losses"
    )
    checkpoint_every_steps: Annotated[Whole, Ge(1)] = Field(
        description="optimizer steps between two resumable checkpoints"
    )

    @property
    def uses_own_captions(self) -> bool:
        """Whether the pairs' captions hold the placeholder themselves."""
        return self.captions == (OWN,)

    @check
    def _one_word(self) -> Iterator[tuple[str, str]]:
        if self.placeholder is not None and (
            not self.placeholder
            or len(self.placeholder.split()) != 1
            or self.placeholder != self.placeholder.strip()
        ):
            yield "placeholder", "one word without whitespace, such as <emoji>"

    @check
    def _templates(self) -> Iterator[tuple[str, str]]:
        if not self.uses_own_captions and any("{}" not in template for template in self.captions):
            yield "captions", "templates that hold {}, such as a photo of {}, or own"
