"""Section validation of params.yaml."""

from __future__ import annotations

from typing import Annotated, ClassVar

from annotated_types import Ge
from pydantic import Field

from stages.lib.frame.sections.section import Section, Whole


class Validation(Section):
    """The held-out loss that train, baseline and evaluate share."""

    section: ClassVar[str] = "validation"

    seed: Annotated[Whole, Ge(0)] = Field(description="of the fixed noise")
    num_timesteps: Annotated[Whole, Ge(1)] = Field(description="evenly spaced over the noise schedule")
    max_samples: Annotated[Whole, Ge(1)] = Field(description="held-out samples, the first by sample_id")
    batch_size: Annotated[Whole, Ge(1)] = Field(description="samples a forward pass")
