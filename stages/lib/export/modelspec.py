"""Metadata of a single file: Stability AI's ModelSpec 1.0.1, which A1111, ComfyUI and others show.

Source: https://github.com/Stability-AI/ModelSpec. Its date is left out: the same inputs give the same bytes.
"""

from __future__ import annotations

import base64
import io
from typing import TYPE_CHECKING, NamedTuple

from stages.lib.frame.params import Export

if TYPE_CHECKING:
    from PIL import Image

_THUMBNAIL_SIDE = 256  # pixels, as the specification recommends
_IMPLEMENTATION = "https://github.com/Stability-AI/generative-models"


class Kind(NamedTuple):
    """What a reader of a file has to know.

    Attributes:
        is_sdxl: whether there are two text encoders.
        is_sd2: whether the only one came from OpenCLIP.
        predicts_v: whether the UNet predicts velocity; else it predicts noise.
        rescaled: whether its noise schedule ends in pure noise.
        resolution: pixels, width and height that it was trained on.
    """

    is_sdxl: bool
    is_sd2: bool
    predicts_v: bool
    rescaled: bool
    resolution: tuple[int, int]

    @property
    def architecture(self) -> str:
        """As the specification and the tools that read it name it."""
        if self.is_sdxl:
            return "stable-diffusion-xl-v1-base"
        if self.is_sd2:
            return "stable-diffusion-v2-768-v" if self.predicts_v else "stable-diffusion-v2-512"
        return "stable-diffusion-v1"


def modelspec(options: Export, kind: Kind, thumbnail: str | None, tensors_sha256: str) -> dict[str, str]:
    """The metadata, with their prefix.

    Args:
        options: what only the user knows.
        kind: of the model.
        thumbnail: data URL, see `data_url`.
        tensors_sha256: of all bytes that follow the file's header.
    """
    values = {
        "sai_model_spec": "1.0.1",
        "architecture": kind.architecture,
        "implementation": _IMPLEMENTATION,
        "title": options.title,
        "resolution": "x".join(map(str, kind.resolution)),
        "prediction_type": "v" if kind.predicts_v else "epsilon",
        "hash_sha256": f"0x{tensors_sha256}",
        "author": options.author,
        "description": options.description,
        "license": options.license_name or options.license,
        "tags": ", ".join(options.tags) or None,
        "thumbnail": thumbnail,
    }
    return {f"modelspec.{key}": value for key, value in values.items() if value is not None}


def data_url(picture: Image.Image) -> str:
    """A picture as a small JPEG in text: a square of at most 256 pixels, of its middle."""
    from PIL import Image, ImageOps

    side = min(_THUMBNAIL_SIDE, *picture.size)
    small = ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
