"""Bring the base model into place: a diffusers pipeline, safetensors only, with another VAE if asked for.

Reads  the pipeline directory or Hub repository (and those of the VAE and the CLIP) that the params name
Writes data/base/{tokenizer,text_encoder,vae,unet,scheduler}, data/base/model_index.json; data/base/clip,
       the CLIP that evaluation measures pictures with, where there is one
Params fetch_base
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.lib.base_model import (
    BASE,
    COMPONENTS,
    CONFIG_FILES,
    TOKENIZER_FILES,
    WEIGHT_STEMS,
    config_problems,
    read_config,
    scaling_factor,
    tensor_names,
    weight_files,
    write_pipeline_index,
)
from stages.lib.errors import StageError
from stages.lib.params import FetchBase, Params
from stages.lib.stage_run import fresh_directory, run_stage, write_json

logger = logging.getLogger(__name__)

SUPPORTED_CLASSES = {
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "text_encoder": ("CLIPTextModel",),
    "vae": ("AutoencoderKL",),
    "unet": ("UNet2DConditionModel",),
}
# Parts of a pipeline that training has no use for; the pictures of `evaluate` are made without them.
DROPPED_COMPONENTS = ("feature_extractor", "image_encoder", "safety_checker")
CLIP = "clip"  # no part of the pipeline
REQUIRED_CONFIGS = {
    **{component: (file,) for component, file in CONFIG_FILES.items()},
    CLIP: ("config.json", "preprocessor_config.json"),
}
STEMS = {**WEIGHT_STEMS, CLIP: "model"}
CONFIG_SUFFIXES = (".json", ".txt")
WEIGHT_SUFFIXES = (".safetensors",)
OTHER_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".gguf")
CONVERT = (
    "take another repository or revision, or load it once with diffusers or transformers, write it with "
    "`save_pretrained(DIRECTORY)` and name DIRECTORY in section fetch_base"
)


def main(params: Params) -> None:
    options = params.fetch_base
    base = open_source(options.source, options.directory, options.hub_id, options.revision)
    index = read_pipeline_index(base)
    problems = pipeline_problems(index)

    sources: dict[str, Source] = dict.fromkeys(COMPONENTS, base)
    folders = {component: f"{component}/" for component in COMPONENTS}
    if options.vae_source != "base":
        vae = open_source(options.vae_source, options.vae_directory, options.vae_hub_id, options.vae_revision)
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
        raise_problems(base, [*config_problems(partial), *clip_problems(partial / CLIP)])
        if options.vae_source != "base":
            compare_scaling_factors(base, sources["vae"], partial)
        for component in [name for name in STEMS if name in sources]:
            copy_files(sources[component], files[component], WEIGHT_SUFFIXES, partial / component)
            weight_files(partial / component)
        write_pipeline_index(partial, index["scheduler"])
        fresh_directory(BASE).rmdir()
        partial.rename(BASE)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    logger.info(
        "%s: %s, VAE of %s, CLIP of %s", BASE, base, sources["vae"], clip or "nothing: none to measure with"
    )


@dataclass(frozen=True)
class DirectorySource:
    """A diffusers directory on this machine."""

    root: Path
    paths: frozenset[str]

    def __str__(self) -> str:
        return str(self.root)

    def fetch(self, paths: Iterable[str]) -> Path:
        """The directory under which ``paths`` lie."""
        return self.root


@dataclass(frozen=True)
class HubSource:
    """A commit of a Hub repository, through the Hub cache of this machine."""

    hub_id: str
    revision: str
    paths: frozenset[str]
    cached: Path | None  # the snapshot to use because the Hub itself cannot be asked

    def __str__(self) -> str:
        return f"{self.hub_id}@{self.revision[:8]}" + (" in the Hub cache" if self.cached else "")

    def fetch(self, paths: Iterable[str]) -> Path:
        """Download what the cache lacks of ``paths``; an interrupted download continues where it stopped."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HTTPError, XetDownloadError

        if self.cached:
            return self.cached
        try:
            return Path(snapshot_download(self.hub_id, revision=self.revision, allow_patterns=sorted(paths)))
        except (HTTPError, OSError, XetDownloadError) as error:
            raise StageError(
                f"{self}: download stopped: {error}; run `dvc repro fetch_base` again, it continues there"
            ) from error


Source = DirectorySource | HubSource


def open_source(kind: str, directory: str, hub_id: str | None, revision: str | None) -> Source:
    """List what a source holds.

    Raises:
        StageError: if it does not exist, or cannot be reached and is not in the Hub cache.
    """
    if kind == "directory":
        root = Path(directory)
        if not root.is_dir():
            raise StageError(f"{root}: not found; expected a diffusers directory")
        if root.resolve().is_relative_to(BASE.resolve()):
            raise StageError(f"{root}: is what this stage writes, and DVC removes it first; name another")
        return DirectorySource(root, _listing(root))
    if hub_id is None or revision is None:
        raise StageError(
            "fetch_base: source hub needs a repository id and a revision of 40 hexadecimal digits"
        )
    return _open_hub(hub_id, revision)


def _open_hub(hub_id: str, revision: str) -> HubSource:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    try:
        paths = HfApi().list_repo_files(hub_id, revision=revision)
        return HubSource(hub_id, revision, frozenset(paths), cached=None)
    except (HTTPError, OSError) as error:
        reason, remedy = _hub_refusal(error)
        # A commit never changes: what an earlier run has downloaded serves as well.
        try:
            cached = Path(
                snapshot_download(hub_id, revision=revision, local_files_only=True, allow_patterns=[])
            )
        except LocalEntryNotFoundError:
            raise StageError(
                f"{hub_id} at {revision}: {reason}, and the Hub cache does not hold it; {remedy}"
            ) from error
    logger.warning("%s: %s; using the Hub cache", hub_id, reason)
    return HubSource(hub_id, revision, _listing(cached), cached)


def _hub_refusal(error: Exception) -> tuple[str, str]:
    """Why the Hub could not be asked, and the remedy."""
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    fill = "fill the Hub cache on a machine that has one (HF_HOME)"
    match error:
        case RevisionNotFoundError():
            return "the repository has no such revision", "take a commit from its history"
        case GatedRepoError():
            return "the repository is gated", "accept its conditions on its page, then run `hf auth login`"
        case RepositoryNotFoundError():
            return (
                "the repository does not exist or is private",
                "check the id; for a private one run `hf auth login`",
            )
        case OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set", f"unset it where there is a network, or {fill}"
    return f"the Hub cannot be reached ({error})", f"check the network, or {fill}"


def _listing(root: Path) -> frozenset[str]:
    """Files of ``root`` and of the component directories in it, as relative POSIX paths."""
    folders = [root, *(root / component for component in (*COMPONENTS, CLIP))]
    files = [path for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_file()]
    return frozenset(path.relative_to(root).as_posix() for path in files)


def read_pipeline_index(source: Source) -> dict[str, Any]:
    """``model_index.json`` of the source; StageError if it has none, as a single-file checkpoint has not."""
    if "model_index.json" not in source.paths:
        singles = sorted(p for p in source.paths if "/" not in p and p.endswith((".safetensors", ".ckpt")))
        if singles and "config.json" not in source.paths:
            raise StageError(
                f"{source}: expected a directory with model_index.json, got a single-file checkpoint; "
                f'convert it once with diffusers: StableDiffusionPipeline.from_single_file("{singles[0]}")'
                '.save_pretrained("DIRECTORY"), and use DIRECTORY'
            )
        raise StageError(f"{source}: expected a diffusers directory, but there is no model_index.json")
    return read_config(source.fetch(["model_index.json"]) / "model_index.json")


def pipeline_problems(index: Mapping[str, Any]) -> list[str]:
    """What in a ``model_index.json`` tells of another kind of model than Stable Diffusion 1.x or 2.x."""
    components = {name: value[-1] for name, value in index.items() if isinstance(value, list) and value}
    known = (*COMPONENTS, *DROPPED_COMPONENTS)
    extra = [f"{name} ({value})" for name, value in components.items() if value and name not in known]
    problems = []
    if extra:
        kind = index.get("_class_name", "the pipeline")
        problems.append(f"model_index.json: {kind} has {', '.join(sorted(extra))}, not supported yet")
    for component, classes in SUPPORTED_CLASSES.items():
        if (got := components.get(component)) not in classes:
            problems.append(
                f"model_index.json: expected {component} {classes[0]}, got {got}, not supported yet"
            )
    library, scheduler = (index.get("scheduler") or [None, None])[:2]
    if library != "diffusers" or not re.fullmatch(r"(?!Flax)\w+Scheduler", str(scheduler)):
        problems.append(f"model_index.json: expected a scheduler of diffusers, got {scheduler} of {library}")
    return problems


def clip_source(options: FetchBase, base: Source) -> Source | None:
    """Where the CLIP comes from; None where it is the base's and the base has none."""
    if options.clip_source != "base":
        return open_source(
            options.clip_source, options.clip_directory, options.clip_hub_id, options.clip_revision
        )
    return base if any(path.startswith(f"{CLIP}/") for path in base.paths) else None


def folder_of(component: str, source: Source) -> str:
    """Where a part lies: at the top of a directory of its own, in a folder of its name in a pipeline's."""
    is_alone = "config.json" in source.paths and "model_index.json" not in source.paths
    return "" if is_alone else f"{component}/"


def clip_problems(directory: Path) -> Iterator[str]:
    """What in a CLIP's config tells of another kind of model."""
    if directory.is_dir():
        model_type = read_config(directory / "config.json").get("model_type")
        if model_type != "clip":
            yield f"clip/config.json: expected model_type 'clip', got {model_type!r}, not supported yet"


def choose_files(source: Source, folder: str, component: str, problems: list[str]) -> dict[str, str]:
    """Name in the component's directory -> path in the source; what is missing goes to ``problems``.

    Of weights in several variants the plain ones are chosen, else fp16 ones, under the plain name.
    """
    prefix = len(folder)
    names = {path[prefix:] for path in source.paths if path.startswith(folder) and "/" not in path[prefix:]}
    files: dict[str, str] = {}
    if component in ("tokenizer", CLIP):
        if not ({"vocab.json", "merges.txt"} <= names or "tokenizer.json" in names):
            problems.append(
                f"{source}: {folder or 'its directory'} lacks vocab.json and merges.txt, or tokenizer.json"
            )
        files |= {name: name for name in TOKENIZER_FILES if name in names}
    configs = REQUIRED_CONFIGS.get(component, ())
    if missing := [config for config in configs if config not in names]:
        problems += [f"{source}: {folder}{config} is missing" for config in missing]
        return {}
    files |= {config: config for config in configs}
    if component in STEMS:
        weights = _weights(STEMS[component], names)
        if not weights:
            problems.append(_no_weights(source, folder, names))
        elif any(target != name for target, name in weights.items()):
            logger.warning(
                "%s: %s has fp16 weights only; they are taken", source, folder or f"the {component}"
            )
        files |= weights
    return {target: folder + name for target, name in files.items()}


def _weights(stem: str, names: set[str]) -> dict[str, str]:
    for infix in ("", ".fp16"):
        single = f"{stem}{infix}.safetensors"
        if single in names:
            return {f"{stem}.safetensors": single}
        index = f"{stem}.safetensors.index{infix}.json"
        if index in names:
            # Libraries have put the variant on either side of the shard's number.
            part, variant = r"-\d+-of-\d+", re.escape(infix)
            shard = re.compile(rf"{stem}(?:{variant}{part}|{part}{variant})\.safetensors")
            shards = {name.replace(infix, ""): name for name in sorted(names) if shard.fullmatch(name)}
            return {f"{stem}.safetensors.index.json": index, **shards}
    return {}


def _no_weights(source: Source, folder: str, names: set[str]) -> str:
    others = sorted(folder + name for name in names if name.endswith((*OTHER_WEIGHTS, *WEIGHT_SUFFIXES)))
    if not others:
        return f"{source}: expected safetensors weights in {folder or 'its directory'}, got none"
    got = ", ".join(others)
    if any(name.endswith(WEIGHT_SUFFIXES) for name in others):
        return f"{source}: expected plain or fp16 safetensors weights, got only {got}"
    return (
        f"{source}: expected safetensors weights, got only {got}; "
        f"pickled weights can run code when they are opened, so they are not read: {CONVERT}"
    )


def copy_files(source: Source, files: Mapping[str, str], suffixes: tuple[str, ...], directory: Path) -> None:
    """Copy those of ``files`` (target name -> path in ``source``) that end in ``suffixes``.

    The copies share nothing with the originals: no link leads into the user's directory or the Hub cache.

    Raises:
        StageError: naming the source's file that is cut short or cannot be copied.
    """
    wanted = {target: path for target, path in files.items() if target.endswith(suffixes)}
    directory.mkdir(exist_ok=True)
    if not wanted:
        return
    root = source.fetch(wanted.values())
    for target, path in wanted.items():
        if target.endswith(".index.json"):
            shards = {Path(original).name: shard for shard, original in files.items()}
            write_json(directory / target, _renamed_shards(read_config(root / path), shards))
            continue
        if target.endswith(".safetensors"):
            tensor_names(root / path)
        try:
            shutil.copyfile(root / path, directory / target)
        except OSError as error:
            raise StageError(f"{root / path}: cannot be copied to {directory / target}: {error}") from error


def _renamed_shards(index: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    weight_map = index.get("weight_map", {})
    return {**index, "weight_map": {tensor: names.get(shard, shard) for tensor, shard in weight_map.items()}}


def raise_problems(source: Source, problems: list[str]) -> None:
    if not problems:
        return
    offline = isinstance(source, HubSource) and source.cached
    remedy = "\n  If the cache holds a part only, run once with a network" if offline else ""
    raise StageError(f"{source}: {len(problems)} problem(s)\n  " + "\n  ".join(problems) + remedy)


def compare_scaling_factors(base: Source, vae: Source, partial: Path) -> None:
    """Tell the user when an override scales latents otherwise than the VAE that the UNet was trained with."""
    if "vae/config.json" not in base.paths:
        return
    own = scaling_factor(read_config(base.fetch(["vae/config.json"]) / "vae/config.json"))
    other = scaling_factor(read_config(partial / "vae/config.json"))
    if other != own:
        logger.warning("%s: scaling_factor %g is used; the base's own VAE has %g", vae, other, own)


if __name__ == "__main__":
    run_stage("fetch_base", ("fetch_base",), main)
