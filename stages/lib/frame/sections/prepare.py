"""Section prepare of params.yaml."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

from annotated_types import Ge, Le, Lt
from pydantic import Field

from stages.lib.frame.sections.section import Entry, Number, Section, Several, Text, Whole, check


class Source(Entry):
    """One of several sources."""

    path: Text = Field(description="as prepare.source, inside of what dvc.yaml lists for prepare")
    caption_column: Text | None = Field(None, description="as prepare.caption_column, which null takes")
    caption_prefix: Text = Field("", description="text in front of every caption")
    repeats: Annotated[Whole, Ge(1)] = Field(1, description="how often an image is drawn an epoch")


class Prepare(Section):
    """Which images and captions."""

    section: ClassVar[str] = "prepare"

    source: Text | None = Field(
        description="data/openmoji, a folder, an archive of one, or a Parquet, Arrow or TFRecord file"
    )
    hub_id: Text | None = Field(description="data set of the Hub, e.g. owner/name, used with source: null")
    revision: Text | None = Field(description="40-hex commit of hub_id")
    subset: Text | None = Field(description="configuration of hub_id; null is its only or default one")
    sources: Several[Source] | None = Field(
        description="several sources below source: path, caption_column, caption_prefix, repeats of each"
    )
    caption_column: Text = Field(description="column of a table, or key of a .json, that holds the caption")
    caption_variants: Annotated[Whole, Ge(0)] = Field(
        description="shufflings of each training caption's comma-separated tags; 0 keeps captions as they are"
    )
    keep_tags: Annotated[Whole, Ge(0)] = Field(
        description="tags that stay in front, used with caption_variants"
    )
    tag_dropout: Annotated[Number, Ge(0), Lt(1)] = Field(
        description="share of the other tags left out of a variant, 0 to 1"
    )
    variant_seed: Annotated[Whole, Ge(0)] = Field(description="of the shufflings")
    render_resolution: Annotated[Whole, Ge(8), Le(4096)] = Field(
        description="pixels, side of rendered artwork (data/openmoji only)"
    )
    max_image_pixels: Annotated[Whole, Ge(1)] = Field(
        description="pixels; a larger image is rejected, for decoding takes 4 to 8 bytes each"
    )
    validation_fraction: Annotated[Number, Ge(0), Le(0.5)] = Field(
        description="share of samples held out from training, 0 to 0.5; not used where the source is split"
    )
    split_seed: Annotated[Whole, Ge(0)] = Field(description="which samples are held out")
    near_duplicate_bits: Annotated[Whole, Ge(0), Le(32)] | None = Field(
        description="of 64, in which images split together may differ; null looks at equal bytes alone"
    )
    max_samples: Annotated[Whole, Ge(1)] | None = Field(
        description="samples; null takes all, a number the first by sample_id"
    )
    max_rejected_fraction: Annotated[Number, Ge(0), Le(1)] = Field(
        description="share of rows that may be unusable before the stage fails, 0 to 1"
    )

    @check
    def _source(self) -> Iterator[tuple[str, str]]:
        if not self.source and not self.hub_id:
            yield "source", "a folder, an archive or a table, or hub_id"
        if self.source and self.hub_id:
            yield "hub_id", "null, for source is set; or source: null"

    @check
    def _hub(self) -> Iterator[tuple[str, str]]:
        if self.hub_id and not self.revision:
            yield "revision", "the commit of hub_id, 40 hexadecimal digits"

    @check
    def _sources(self) -> Iterator[tuple[str, str]]:
        if self.sources and self.hub_id:
            yield "sources", "null, for hub_id is set"
        paths = [source.path for source in self.sources or ()]
        if len(set(paths)) < len(paths):
            yield "sources", "each path once"
