"""Section export of params.yaml."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from stages.lib.frame.sections.section import Section, Text, check

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")

Format = Literal["pipeline", "single_file", "lora_diffusers", "lora_kohya"]


class Export(Section):
    """What is written for other tools, and what the model card says that no stage knows."""

    section: ClassVar[str] = "export"

    formats: tuple[Format, ...] = Field(
        description="pipeline | single_file | lora_diffusers | lora_kohya; [] is the model card alone"
    )
    dtype: Literal["float32", "float16"] = Field(
        description="float32 | float16: of the weights; float16 halves the files and rounds"
    )
    title: Text = Field(description="name of the model")
    author: Text | None = Field(description="who made it")
    description: Text | None = Field(description="what it draws, and from which words, in a sentence or two")
    license: Text | None = Field(
        description="identifier of the Hub's list, e.g. creativeml-openrail-m, or other with these two"
    )
    license_name: Text | None = Field(description="used with license: other")
    license_link: Text | None = Field(description="address or file of its text, used with license: other")
    tags: tuple[Text, ...] = Field(description="more tags of the card")

    @check
    def _distinct(self) -> Iterator[tuple[str, str]]:
        if len(set(self.formats)) < len(self.formats):
            yield "formats", "each format once"

    @check
    def _titled(self) -> Iterator[tuple[str, str]]:
        if not self.title.strip() or "\n" in self.title:
            yield "title", "one line of text"

    @check
    def _licensed(self) -> Iterator[tuple[str, str]]:
        if self.license is not None and not _LICENSE.fullmatch(self.license):
            yield "license", "an identifier such as creativeml-openrail-m, or other with license_name"

    @check
    def _named(self) -> Iterator[tuple[str, str]]:
        if self.license == "other" and not self.license_name:
            yield "license_name", "a name, for license: other"

    @check
    def _linked(self) -> Iterator[tuple[str, str]]:
        if self.license == "other" and not self.license_link:
            yield "license_link", "an address or a file name, for license: other"
