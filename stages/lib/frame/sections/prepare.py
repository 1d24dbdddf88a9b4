"""Section prepare of params.yaml."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

from annotated_types import Ge, Le
from pydantic import Field

from stages.lib.frame.sections.section import Number, Section, Text, Whole, check


class Prepare(Section):
    """Which images and captions."""

    section: ClassVar[str] = "prepare"

    source: Text | None = Field(
        description="data/openmoji, a folder, or a .tar, .tar.gz, .tgz or .zip archive of one"
    )
    caption_column: Text = Field(
        description="column of metadata.csv, .jsonl, .parquet or data.csv that holds the caption"
    )
    render_resolution: Annotated[Whole, Ge(8), Le(4096)] = Field(
        description="pixels, side of rendered artwork (data/openmoji only)"
    )
    validation_fraction: Annotated[Number, Ge(0), Le(0.5)] = Field(
        description="share of samples held out from training, 0 to 0.5"
    )
    split_seed: Annotated[Whole, Ge(0)] = Field(description="which samples are held out")
    max_samples: Annotated[Whole, Ge(1)] | None = Field(
        description="samples; null takes all, a number the first by sample_id"
    )
    max_rejected_fraction: Annotated[Number, Ge(0), Le(1)] = Field(
        description="share of rows that may be unusable before the stage fails, 0 to 1"
    )

    @check
    def _source(self) -> Iterator[tuple[str, str]]:
        if not self.source:
            yield "source", "a folder or a .tar, .tar.gz, .tgz or .zip archive of one"
