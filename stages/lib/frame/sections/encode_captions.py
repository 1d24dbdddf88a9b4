"""Section encode_captions of params.yaml."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from annotated_types import Ge
from pydantic import Field

from stages.lib.frame.sections.section import Section, Whole


class EncodeCaptions(Section):
    """How captions become `encoder_hidden_states`."""

    section: ClassVar[str] = "encode_captions"

    clip_skip: Annotated[Whole, Ge(1)] | None = Field(
        description="layers left out at the end of the text encoder; null uses the last"
    )
    batch_size: Annotated[Whole, Ge(1)] = Field(
        description="captions a forward pass, fixed: the last batch is padded"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        description="float32 | bfloat16: arithmetic of the text encoder"
    )
