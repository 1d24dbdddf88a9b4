"""Section tokenize of params.yaml."""

from __future__ import annotations

from typing import Annotated, ClassVar

from annotated_types import Ge
from pydantic import Field

from stages.lib.frame.sections.section import Section, Whole


class Tokenize(Section):
    """How captions become token ids."""

    section: ClassVar[str] = "tokenize"

    num_chunks: Annotated[Whole, Ge(1)] = Field(
        description="windows of 75 tokens that a caption may fill; more is cut and listed"
    )
