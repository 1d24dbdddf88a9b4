"""Which files of an origin make a component, and how they are brought into place."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.lib.core.files import write_json
from stages.lib.core.tensors import tensor_names
from stages.lib.frame.errors import StageError
from stages.lib.models.layout import (
    CLIP,
    CONFIG_FILES,
    TOKENIZER_FILES,
    WEIGHT_STEMS,
    read_config,
)
from stages.lib.models.origins import HubOrigin, Origin

logger = logging.getLogger(__name__)
REQUIRED_CONFIGS = {
    **{component: (file,) for component, file in CONFIG_FILES.items()},
    CLIP: ("config.json", "preprocessor_config.json"),
    # Without it captions have no longest length, and the tokenizer fails in a later stage.
    "tokenizer": ("tokenizer_config.json",),
}
STEMS = {**WEIGHT_STEMS, CLIP: "model"}
CONFIG_SUFFIXES = (".json", ".txt")
WEIGHT_SUFFIXES = (".safetensors",)
OTHER_WEIGHTS = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".h5", ".onnx", ".gguf")
CONVERT = (
    "take another repository or revision, or load it once with diffusers or transformers, write it with "
    "`save_pretrained(DIRECTORY)` and name DIRECTORY in section fetch_base"
)


def folder_of(component: str, source: Origin) -> str:
    """Where a part lies: at the top of a directory of its own, in a folder of its name in a pipeline's."""
    is_alone = "config.json" in source.paths and "model_index.json" not in source.paths
    return "" if is_alone else f"{component}/"


def choose_files(source: Origin, folder: str, component: str, problems: list[str]) -> dict[str, str]:
    """Name in the component's directory -> path in the source; what is missing goes to ``problems``.

    Of weights in several variants the plain ones are chosen, else fp16 ones, under the plain name.
    """
    prefix = len(folder)
    names = {path[prefix:] for path in source.paths if path.startswith(folder) and "/" not in path[prefix:]}
    files: dict[str, str] = {}
    if component in ("tokenizer", "tokenizer_2", CLIP):
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
            if isinstance(source, HubOrigin) and source.cached:
                # The repository may hold plain ones: a cache must not decide which weights are used.
                problems.append(
                    f"{source}: expected plain weights in {folder or 'its directory'}, got fp16 ones "
                    "alone, and whether there are others is not known without the Hub"
                )
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


def _no_weights(source: Origin, folder: str, names: set[str]) -> str:
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


def copy_files(source: Origin, files: Mapping[str, str], suffixes: tuple[str, ...], directory: Path) -> None:
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
