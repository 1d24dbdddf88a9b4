"""Data sets of the Hugging Face Hub: which files of a commit make up a split, and what their columns hold.

The card's ``configs`` say it; where it has none, the names of files and folders do. No code of a repository
is ever run.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from stages.lib.core.hub import Repository, commit_of, open_repository
from stages.lib.data.pictures.formats import SUFFIXES
from stages.lib.data.sources.embedded import PARQUET, image_columns, text_columns
from stages.lib.data.sources.files import TAR
from stages.lib.data.sources.sidecars import JSON, TEXTS
from stages.lib.data.sources.splits import TRAIN
from stages.lib.data.sources.tables import METADATA_NAMES
from stages.lib.data.split_patterns import matching, splits_by_names
from stages.lib.frame.errors import StageError, some

CARD = "README.md"
CONVERTED = "refs/convert/parquet"  # the branch on which the Hub keeps a data set as Parquet
_DEFAULT = "default"
_CONVERTED_FILE = re.compile(r"([^/]+)/(partial-)?([^/]+)/[0-9]{4,}\.parquet")
_IMAGES = "images"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HubDataset:
    """A subset of a data set, on this machine.

    Attributes:
        folder: the snapshot in the Hub cache; its files are links into ``folder.parents[1]``.
        splits: name -> paths of its files in ``folder``, sorted: images with their metadata or caption files,
            Parquet with images inside, or tars. A metadata file above several splits' folders is in each.
        caption_columns: of texts, or of lists of texts; where there is no Parquet only if the card tells.
        image_columns: as those.
    """

    folder: Path
    splits: dict[str, list[str]]
    caption_columns: list[str]
    image_columns: list[str]


@dataclass(frozen=True)
class _Subset:
    """A configuration: a folder, "" is the top, and in it the patterns of each split; None is by names."""

    folder: str = ""
    patterns: dict[str, list[str]] | None = None
    is_default: bool = False


def open_hub_dataset(hub_id: str, revision: str, subset: str | None) -> HubDataset:
    """Bring the files of a subset into the Hub cache, and no others.

    Args:
        hub_id: owner/name.
        revision: commit of 40 hexadecimal digits.
        subset: a configuration of the card; None is the only or the default one.

    Raises:
        StageError: as `open_repository`; if the repository needs a script, has no such subset, or holds no
            images in a form that is read.
    """
    repository = open_repository(hub_id, revision, "dataset")
    if repository.cached:
        raise StageError(
            f"{repository}: holds files of the commit, but no list of all, so that nobody knows whether they "
            "are complete; run once with a network"
        )
    names = sorted(repository.sizes)
    _refuse_script(repository)
    card = _card(repository)
    subsets = _subsets(repository, card, names)
    chosen = _choose(repository, subsets, subset)
    found = _splits(repository, subsets[chosen], names)
    kind = _kind(repository, found)
    splits = {split: _with_descriptions(kind, files, names) for split, files in found.items()}
    folder = repository.fetch({name for files in splits.values() for name in files})
    captions, images = _columns_of_card(card, chosen)
    if kind == PARQUET:
        schema = _schema(repository, folder / next(iter(splits.values()))[0])
        texts, pictures = text_columns(schema), image_columns(schema)
        captions = [name for name in texts if name in captions] or texts
        images = [name for name in pictures if name in images] or pictures
        if not images:
            raise StageError(
                f"{repository}: expected a column of images in its Parquet files, found "
                f"{', '.join(schema.names)}; images at addresses of the web are not fetched"
            )
    return HubDataset(folder, splits, captions, images)


def _refuse_script(repository: Repository) -> None:
    script = f"{repository.hub_id.split('/')[-1]}.py"
    if script not in repository.sizes:
        return
    try:
        commit, _ = commit_of(repository.hub_id, CONVERTED, repository.kind)
        remedy = f"write the commit of its branch {CONVERTED}, where the Hub keeps it as Parquet: {commit}"
    except StageError:
        remedy = f"look for its branch {CONVERTED}, where the Hub keeps it as Parquet, and write its commit"
    raise StageError(f"{repository}: needs its script {script}, and scripts are never run; {remedy}")


def _card(repository: Repository) -> dict[str, Any]:
    """The metadata at the head of the card, and of .huggingface.yaml, which comes before it."""
    from huggingface_hub import metadata_load

    present = [name for name in (CARD, ".huggingface.yaml") if name in repository.sizes]
    card: dict[str, Any] = {}
    for name in present:
        path = repository.fetch(present) / name
        try:
            values = metadata_load(path) if name == CARD else yaml.safe_load(path.read_text(encoding="utf-8"))
            card |= values or {}
        except (ValueError, TypeError, yaml.YAMLError) as error:
            raise _odd(repository, f"{name}: its metadata cannot be read ({error})") from error
    return card


def _subsets(repository: Repository, card: Mapping[str, Any], names: Sequence[str]) -> dict[str, _Subset]:
    if not (configs := card.get("configs")):
        return _converted(names) or {_DEFAULT: _Subset()}
    found: dict[str, _Subset] = {}
    for config in configs if isinstance(configs, list) else [configs]:
        if not isinstance(config, dict) or not isinstance(config.get("config_name"), str):
            raise _odd(repository, f"{CARD}: configs: expected a config_name in each, got {config!r}")
        folder, files = config.get("data_dir") or "", config.get("data_files")
        patterns = None if files is None else _patterns(repository, files)
        folder = posixpath.normpath(str(folder)).strip("/").removeprefix(".")
        found[config["config_name"]] = _Subset(folder, patterns, bool(config.get("default")))
    return found


def _patterns(repository: Repository, files: Any) -> dict[str, list[str]]:
    """split -> patterns, of the forms that ``data_files`` may have."""
    match files:
        case str():
            return {TRAIN: [files]}
        case list() if all(isinstance(each, str) for each in files):
            return {TRAIN: files}
        case list() if all(isinstance(each, dict) and {*each} == {"split", "path"} for each in files):
            paths = {str(each["split"]): each["path"] for each in files}
            if len(paths) == len(files) and all(isinstance(each, str | list) for each in paths.values()):
                return {split: [path] if isinstance(path, str) else path for split, path in paths.items()}
    raise _odd(repository, f"{CARD}: data_files: expected paths, or a split and its path each, got {files!r}")


def _converted(names: Sequence[str]) -> dict[str, _Subset]:
    """The subsets of the branch `CONVERTED`, a folder each; empty for other repositories."""
    tables = [name for name in names if name.endswith(PARQUET)]
    matches = [_CONVERTED_FILE.fullmatch(name) for name in tables]
    found: dict[str, dict[str, list[str]]] = {}
    for name, match in zip(tables, matches, strict=True):
        if match is None:
            return {}
        subset, partial, split = match.groups()
        if partial and split not in found.get(subset, {}):
            logger.warning(
                "%s: the Hub has converted a part of split %s alone", posixpath.dirname(name), split
            )
        found.setdefault(subset, {}).setdefault(split, []).append(name)
    return {subset: _Subset(patterns=splits) for subset, splits in found.items()}


def _choose(repository: Repository, subsets: Mapping[str, _Subset], subset: str | None) -> str:
    defaults = [name for name, each in subsets.items() if name == _DEFAULT or each.is_default]
    candidates = [subset] if subset else (list(subsets) if len(subsets) == 1 else defaults)
    if len(candidates) == 1 and candidates[0] in subsets:
        return candidates[0]
    got = f"no subset {subset!r}" if subset else f"{len(subsets)} subsets and {len(defaults) or 'no'} default"
    raise StageError(
        f"{repository}: {got}, expected prepare.subset to be one of {', '.join(sorted(subsets))}"
    )


def _splits(repository: Repository, subset: _Subset, names: Sequence[str]) -> dict[str, list[str]]:
    """split -> its files; a file is the first split's that names it: none is both trained and measured on."""
    prefix = f"{subset.folder}/" if subset.folder else ""
    inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    if subset.patterns is None:
        found = splits_by_names(inside)
    else:
        try:
            found = {
                split: [name for pattern in patterns for name in matching(pattern, inside)]
                for split, patterns in subset.patterns.items()
            }
            if empty := [split for split, files in found.items() if not files]:
                raise ValueError(f"split {empty[0]}: no such files in this commit")
        except ValueError as error:
            raise _odd(repository, f"{CARD}: data_files: {error}") from error
    taken: set[str] = set()
    splits: dict[str, list[str]] = {}
    for split, files in sorted(found.items(), key=lambda item: item[0] != TRAIN):
        if shared := sorted(taken.intersection(files)):
            logger.warning("%s: split %s also names %s; left out of it", repository, split, some(shared))
        splits[split] = [f"{prefix}{name}" for name in sorted(set(files) - taken)]
        taken.update(files)
    return splits


def _kind(repository: Repository, splits: Mapping[str, Sequence[str]]) -> str:
    """`_IMAGES`, `PARQUET` or `TAR`: what most files are, Parquet where there are as many."""
    suffixes = Counter(
        posixpath.splitext(name)[1].lower()
        for files in splits.values()
        for name in files
        if posixpath.basename(name) not in METADATA_NAMES
    )
    kinds: Counter[str] = Counter()
    for suffix, count in suffixes.items():
        if kind := _IMAGES if suffix in SUFFIXES else suffix if suffix in (PARQUET, TAR) else None:
            kinds[kind] += count
    kind = max(kinds, key=lambda each: (kinds[each], each == PARQUET), default="")
    without = [split for split, files in splits.items() if not any(_is_of(kind, name) for name in files)]
    if not kind or without:
        where = f"split {without[0]}" if kind else "it"
        found = ", ".join(
            f"{count} {suffix or 'without suffix'}" for suffix, count in suffixes.most_common(4)
        )
        raise StageError(
            f"{repository}: expected images, Parquet with images inside, or tars in {where}, found "
            f"{found or 'nothing'}; what is packed or of another form: fetch it with `hf download --repo-type"
            " dataset`, unpack it, and name the folder as prepare.source"
        )
    return kind


def _is_of(kind: str, name: str) -> bool:
    suffix = posixpath.splitext(name)[1].lower()
    if kind == _IMAGES:
        return suffix in SUFFIXES
    return suffix == kind and posixpath.basename(name) not in METADATA_NAMES


def _with_descriptions(kind: str, files: Sequence[str], names: Sequence[str]) -> list[str]:
    """The data files of a split; of images with their metadata files, or the caption files beside them."""
    data = [name for name in files if _is_of(kind, name)]
    if kind != _IMAGES:
        return data
    folders: set[str] = set()
    for folder in {posixpath.dirname(name) for name in data}:
        while folder not in folders:
            folders.add(folder)
            folder = posixpath.dirname(folder)
    metadata = {posixpath.join(folder, name) for folder in folders for name in METADATA_NAMES}
    beside = {posixpath.splitext(name)[0] + suffix for name in data for suffix in (*TEXTS, JSON)}
    return sorted({*data, *(metadata.intersection(names) or beside.intersection(names))})


def _columns_of_card(card: Mapping[str, Any], subset: str) -> tuple[list[str], list[str]]:
    """Columns of texts and of images, as ``dataset_info`` of the card names them."""
    infos = card.get("dataset_info")
    infos = [each for each in (infos if isinstance(infos, list) else [infos]) if isinstance(each, dict)]
    features = [
        feature
        for info in infos
        if info.get("config_name", _DEFAULT) == subset or len(infos) == 1
        for feature in info.get("features") or ()
        if isinstance(feature, dict) and isinstance(feature.get("name"), str)
    ]
    texts = ("string", "large_string")
    captions = [
        each["name"] for each in features
        if any(each.get(key) in texts for key in ("dtype", "list", "sequence"))
    ]  # fmt: skip
    return captions, [each["name"] for each in features if each.get("dtype") == "image"]


def _schema(repository: Repository, path: Path) -> pa.Schema:
    try:
        return pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        raise _odd(repository, f"{path.name} is no Parquet file ({error})") from error


def _odd(repository: Repository, problem: str) -> StageError:
    return StageError(f"{repository}: {problem}; take another commit, or mend a copy and name it as source")
