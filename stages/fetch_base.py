"""Bring the base model into place: a diffusers pipeline, safetensors only, with another VAE if asked for.

Reads  the pipeline directory, single file or Hub repository (and those of the VAE and the CLIP) that the
       params name
Writes data/base/{tokenizer,text_encoder,vae,unet,scheduler}, of SDXL also tokenizer_2 and text_encoder_2,
       data/base/model_index.json; data/base/clip,
       the CLIP that evaluation measures pictures with, where there is one; the hashes of all, SHA256SUMS
Params fetch_base
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from stages.lib.core.files import fresh_directory
from stages.lib.core.paths import BASE
from stages.lib.core.sums import write_sums
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import FetchBase, Params
from stages.lib.frame.run import run_stage
from stages.lib.models.checks import config_problems, distilled
from stages.lib.models.families.chosen import FORCE_ZEROS, family_of_index
from stages.lib.models.files import (
    CONFIG_SUFFIXES,
    STEMS,
    WEIGHT_SUFFIXES,
    choose_files,
    copy_files,
    folder_of,
)
from stages.lib.models.layout import (
    CLIP,
    read_config,
    scaling_factor,
    write_pipeline_index,
)
from stages.lib.models.origins import HubOrigin, Origin, listed_directory, open_origin
from stages.lib.models.pipeline_index import pipeline_problems, read_pipeline_index
from stages.lib.models.presets import CLIP_L, repository_of
from stages.lib.models.published_names import write_published_names
from stages.lib.models.single_files.conversion import convert_checkpoint, convert_vae
from stages.lib.models.single_files.kinds import checkpoint_kind, open_single_file
from stages.lib.models.weights import weight_files

logger = logging.getLogger(__name__)
CONVERTED = BASE.with_name(f"{BASE.name}.converted")
CONVERTED_VAE = BASE.with_name(f"{BASE.name}.converted_vae")
DISTILLED = (
    "training teaches it many steps again, and pictures of a few steps get worse; "
    "take the base it was made from"
)


def main(params: Params) -> None:
    options = params.fetch_base
    try:
        fetch(options)
    finally:
        for made in (CONVERTED, CONVERTED_VAE):
            shutil.rmtree(made, ignore_errors=True)


def fetch(options: FetchBase) -> None:
    """Bring the base into place, from where the parameters say."""
    base = open_base(options)
    index = read_pipeline_index(base)
    family = family_of_index(index)
    problems = pipeline_problems(index, family)

    sources: dict[str, Origin] = dict.fromkeys(family.components, base)
    folders = {component: f"{component}/" for component in family.components}
    if options.vae_source != "base":
        vae = open_vae(options, base)
        sources["vae"], folders["vae"] = vae, folder_of("vae", vae)
    clip = clip_source(options, base)
    if clip is not None:
        sources[CLIP], folders[CLIP] = clip, folder_of(CLIP, clip)
    files = {
        component: choose_files(source, folders[component], component, problems)
        for component, source in sources.items()
    }
    raise_problems(base, problems)

    partial = fresh_directory(BASE.with_name(f"{BASE.name}.partial"))
    try:
        # Configs come first: a base that cannot be used fails before gigabytes are downloaded.
        for component, source in sources.items():
            copy_files(source, files[component], CONFIG_SUFFIXES, partial / component)
        found = [*config_problems(partial, family), *clip_problems(partial / CLIP)]
        raise_problems(base, [with_source(problem, base, sources) for problem in found])
        if scheduler := distilled(partial):
            logger.warning("%s: %s tells of a base distilled to a few steps; %s", base, scheduler, DISTILLED)
        if options.vae_source != "base":
            compare_scaling_factors(base, sources["vae"], partial)
        for component in [name for name in STEMS if name in sources]:
            copy_files(sources[component], files[component], WEIGHT_SUFFIXES, partial / component)
            weight_files(partial / component)
            if component.startswith("text_encoder"):
                write_published_names(partial / component)
        for component in sources:
            write_sums(partial / component)
        write_pipeline_index(partial, index["scheduler"], family, index.get(FORCE_ZEROS))
        write_sums(partial)  # of the components by their own hashes
        fresh_directory(BASE).rmdir()
        partial.rename(BASE)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info(
        "%s: %s, VAE of %s, CLIP of %s", BASE, base, sources["vae"], clip or "nothing: none to measure with"
    )


def open_base(options: FetchBase) -> Origin:
    """Where the base comes from; a single file is converted first."""
    if repository := repository_of(options):
        return open_origin("hub", None, *repository)
    if options.source != "file":
        return open_origin(options.source, options.directory, None, None)
    path = Path(options.file or "").expanduser()
    checkpoint_kind(path, open_single_file(path))  # before anything is downloaded
    convert_checkpoint(path, vocabulary(options), options.prediction_type, CONVERTED)
    return listed_directory(CONVERTED, str(path))


def vocabulary(options: FetchBase) -> Path:
    """A directory with CLIP's vocabulary, which files lack: that of the CLIP named, or the published."""
    if options.clip_source == "base":
        return open_origin("hub", None, *CLIP_L).fetch(["vocab.json", "merges.txt"])
    clip = open_origin(
        options.clip_source, options.clip_directory, options.clip_hub_id, options.clip_revision
    )
    folder = folder_of(CLIP, clip)
    names = [name for name in ("vocab.json", "merges.txt", "tokenizer.json") if folder + name in clip.paths]
    return clip.fetch(folder + name for name in names) / folder


def open_vae(options: FetchBase, base: Origin) -> Origin:
    """Where another VAE comes from; one in a single file gets the config of the base's."""
    if options.vae_source != "file":
        return open_origin(
            options.vae_source, options.vae_directory, options.vae_hub_id, options.vae_revision
        )
    path = Path(options.vae_file or "").expanduser()
    config = read_config(base.fetch(["vae/config.json"]) / "vae/config.json")
    convert_vae(path, config, CONVERTED_VAE)
    return listed_directory(CONVERTED_VAE, str(path))


def clip_source(options: FetchBase, base: Origin) -> Origin | None:
    """Where the CLIP comes from; None where it is the base's and the base has none."""
    if options.clip_source != "base":
        return open_origin(
            options.clip_source, options.clip_directory, options.clip_hub_id, options.clip_revision
        )
    if any(path.startswith(f"{CLIP}/") for path in base.paths):
        return base
    return open_origin("hub", None, *CLIP_L) if options.preset is not None else None


def clip_problems(directory: Path) -> Iterator[str]:
    """What in a CLIP's config tells of another kind of model."""
    if directory.is_dir():
        model_type = read_config(directory / "config.json").get("model_type")
        if model_type != "clip":
            yield f"clip/config.json: expected model_type 'clip', got {model_type!r}, not supported yet"


def with_source(problem: str, base: Origin, sources: Mapping[str, Origin]) -> str:
    """A problem of a part that comes from elsewhere than the base, with where that is."""
    for component, name in (("vae", "VAE"), (CLIP, "CLIP")):
        source = sources.get(component, base)
        if source is not base and (problem.startswith(f"{component}/") or f"the {name}'s" in problem):
            return f"{problem} (the {name} is that of {source})"
    return problem


def raise_problems(source: Origin, problems: list[str]) -> None:
    if not problems:
        return
    offline = isinstance(source, HubOrigin) and source.cached
    remedy = "\n  If the cache holds a part only, run once with a network" if offline else ""
    raise StageError(f"{source}: {len(problems)} problem(s)\n  " + "\n  ".join(problems) + remedy)


def compare_scaling_factors(base: Origin, vae: Origin, partial: Path) -> None:
    """Tell the user when an override scales latents otherwise than the VAE that the UNet was trained with."""
    if "vae/config.json" not in base.paths:
        return
    own = scaling_factor(read_config(base.fetch(["vae/config.json"]) / "vae/config.json"))
    other = scaling_factor(read_config(partial / "vae/config.json"))
    if other != own:
        logger.warning("%s: scaling_factor %g is used; the base's own VAE has %g", vae, other, own)


if __name__ == "__main__":
    run_stage("fetch_base", ("fetch_base",), main)
