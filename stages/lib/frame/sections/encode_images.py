"""Section encode_images of params.yaml."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from annotated_types import Ge, Gt
from pydantic import Field

from stages.lib.frame.sections.section import Flag, Number, OneOrSeveral, Section, Several, Whole, check


class EncodeImages(Section):
    """How images become latent moments."""

    section: ClassVar[str] = "encode_images"

    resolution: OneOrSeveral[Annotated[Whole, Ge(16)]] = Field(
        description="pixels, side of the square the VAE sees, a multiple of its factor; or a list of such"
    )
    buckets: Literal["square", "auto", "sizes"] = Field(
        description="square | auto | sizes: shapes that images are resized and cropped to"
    )
    bucket_sizes: Several[Several[Annotated[Whole, Ge(16)]]] = Field(
        description="pixels, [width, height] of each shape, used with buckets: sizes"
    )
    bucket_step: Annotated[Whole, Ge(1)] = Field(
        description="pixels, sides are multiples of it; buckets: auto keeps to resolution ** 2"
    )
    max_aspect: Annotated[Number, Ge(1)] = Field(
        description="longer over shorter side, at most, used with buckets: auto"
    )
    max_upscale: Annotated[Number, Gt(0)] | None = Field(
        description="times an image may be enlarged before it is left out; null is no limit"
    )
    interpolation: Literal["lanczos", "bicubic", "bilinear", "box"] = Field(
        description="lanczos | bicubic | bilinear | box: filter of the resize"
    )
    jpeg_draft: Flag = Field(
        description="let the JPEG decoder halve large photographs: faster, not quite the same"
    )
    random_crops: Annotated[Whole, Ge(0)] = Field(
        description="views cropped at random beside the centre crop"
    )
    crop_seed: Annotated[Whole, Ge(0)] = Field(description="where random crops lie")
    horizontal_flip: Flag = Field(description="encode a mirrored copy of each view as well")
    masks: Literal["none", "alpha", "files"] = Field(
        description="none | alpha | files: weights of the training loss, of opacity or of mask files"
    )
    batch_size: Annotated[Whole, Ge(1)] = Field(
        description="images a forward pass, fixed: the last batch is padded"
    )
    dtype: Literal["float32", "bfloat16"] = Field(description="float32 | bfloat16: arithmetic of the VAE")
    num_reconstructions: Annotated[Whole, Ge(1)] = Field(
        description="images decoded again for the reconstruction PSNR"
    )

    @check
    def _steps(self) -> Iterator[tuple[str, str]]:
        if self.buckets == "auto" and any(side % self.bucket_step for side in self.resolution):
            multiple = "a multiple" if len(self.resolution) == 1 else "multiples"
            yield "resolution", f"{multiple} of bucket_step {self.bucket_step}, for buckets: auto"

    @check
    def _distinct(self) -> Iterator[tuple[str, str]]:
        if len(set(self.resolution)) < len(self.resolution):
            yield "resolution", "each of the list once"

    @check
    def _shapes(self) -> Iterator[tuple[str, str]]:
        if any(len(pair) != 2 for pair in self.bucket_sizes):
            yield "bucket_sizes", "pairs of [width, height]"
