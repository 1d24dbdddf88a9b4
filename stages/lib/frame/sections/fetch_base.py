"""Section fetch_base of params.yaml."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from stages.lib.frame.sections.section import Section, Text, check

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class FetchBase(Section):
    """Which base model, if another which VAE, and which CLIP measures pictures."""

    section: ClassVar[str] = "fetch_base"

    preset: Literal["sd15", "sd21", "sdxl"] | None = Field(
        description="sd15 | sd21 | sdxl: a published base and its CLIP, in place of source; null takes source"
    )
    source: Literal["directory", "hub", "file"] = Field(
        description="directory | hub | file: where the base model comes from"
    )
    directory: Text | None = Field(description="diffusers pipeline directory, used with source: directory")
    file: Text | None = Field(description=".safetensors checkpoint, used with source: file")
    prediction_type: Literal["epsilon", "v_prediction"] | None = Field(
        description="epsilon | v_prediction, used with source: file; null takes what the file tells"
    )
    hub_id: Text | None = Field(
        description="e.g. stable-diffusion-v1-5/stable-diffusion-v1-5, used with source: hub"
    )
    revision: Text | None = Field(description="40-hex commit of hub_id")
    vae_source: Literal["base", "directory", "hub", "file"] = Field(
        description="base | directory | hub | file: base keeps the base model's own VAE"
    )
    vae_directory: Text | None = Field(description="AutoencoderKL directory, used with vae_source: directory")
    vae_file: Text | None = Field(description=".safetensors of a VAE, used with vae_source: file")
    vae_hub_id: Text | None = Field(description="e.g. stabilityai/sd-vae-ft-mse, used with vae_source: hub")
    vae_revision: Text | None = Field(description="40-hex commit of vae_hub_id")
    clip_source: Literal["base", "directory", "hub"] = Field(
        description="base | directory | hub: base takes the clip/ of the base model, if it has one"
    )
    clip_directory: Text | None = Field(description="CLIPModel directory, used with clip_source: directory")
    clip_hub_id: Text | None = Field(
        description="e.g. openai/clip-vit-large-patch14, used with clip_source: hub"
    )
    clip_revision: Text | None = Field(description="40-hex commit of clip_hub_id")

    @check
    def _base_origin(self) -> Iterator[tuple[str, str]]:
        if self.source == "directory" and not self.directory:
            yield "directory", "a path, for source: directory"

    @check
    def _base_file(self) -> Iterator[tuple[str, str]]:
        if self.source == "file" and not self.file:
            yield "file", "a path, for source: file"

    @check
    def _one_base(self) -> Iterator[tuple[str, str]]:
        if self.preset and self.source != "directory":
            yield "preset", f"null, where source is {self.source}"
        elif self.preset and (self.hub_id or self.revision):
            yield "preset", "null, where hub_id or revision is given"

    @check
    def _vae_file(self) -> Iterator[tuple[str, str]]:
        if self.vae_source == "file" and not self.vae_file:
            yield "vae_file", "a path, for vae_source: file"

    @check
    def _base_repository(self) -> Iterator[tuple[str, str]]:
        if self.source == "hub" and not _HUB_ID.fullmatch(self.hub_id or ""):
            yield "hub_id", "an id such as owner/name, for source: hub"

    @check
    def _base_commit(self) -> Iterator[tuple[str, str]]:
        if self.source == "hub" and not self.revision:
            yield "revision", "a commit of 40 hexadecimal digits, for source: hub"

    @check
    def _vae_origin(self) -> Iterator[tuple[str, str]]:
        if self.vae_source == "directory" and not self.vae_directory:
            yield "vae_directory", "a path, for vae_source: directory"

    @check
    def _vae_repository(self) -> Iterator[tuple[str, str]]:
        if self.vae_source == "hub" and not _HUB_ID.fullmatch(self.vae_hub_id or ""):
            yield "vae_hub_id", "an id such as owner/name, for vae_source: hub"

    @check
    def _vae_commit(self) -> Iterator[tuple[str, str]]:
        if self.vae_source == "hub" and not self.vae_revision:
            yield "vae_revision", "a commit of 40 hexadecimal digits, for vae_source: hub"

    @check
    def _clip_origin(self) -> Iterator[tuple[str, str]]:
        if self.clip_source == "directory" and not self.clip_directory:
            yield "clip_directory", "a path, for clip_source: directory"

    @check
    def _clip_repository(self) -> Iterator[tuple[str, str]]:
        if self.clip_source == "hub" and not _HUB_ID.fullmatch(self.clip_hub_id or ""):
            yield "clip_hub_id", "an id such as owner/name, for clip_source: hub"

    @check
    def _clip_commit(self) -> Iterator[tuple[str, str]]:
        if self.clip_source == "hub" and not self.clip_revision:
            yield "clip_revision", "a commit of 40 hexadecimal digits, for clip_source: hub"
