"""What dvc.yaml says that a stage reads and writes: inputs that may not change meanwhile, outputs to replace.

DVC hashes a stage's dependencies when it *ends*: what was edited while the stage ran would be recorded as
what its outputs were made from. So the stage looks at its inputs before and after, and fails if one moved.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from stages.lib.frame.errors import StageError, some
from stages.lib.frame.locks import LOCKS

PIPELINE = Path("dvc.yaml")
CODE = "stages"
# Files that params.yaml names and that are no dependency of any stage.
NAMED = ("evaluate.inception_weights",)
_OWN = f"python -m {CODE}."
_DVC = Path(".dvc")
_PARAMETER = re.compile(r"\$\{([^}]+)\}")


class Seen(NamedTuple):
    """A file as it was seen: another size, time or inode is another file."""

    size: int
    modified: int
    inode: int


def declared(stage: str) -> dict[str, list[Any]]:
    """The lists of a stage's entry in dvc.yaml; none where there is no such file, as in another directory.

    Raises:
        StageError: if the file is none of DVC's, or lacks the stage.
    """
    return _pipeline(stage).get(stage, {})


def inputs_of(entry: Mapping[str, list[Any]], params: object) -> list[Path]:
    """The data among the dependencies of a stage's entry; code is looked at by itself."""
    filled = [_filled(str(path), params) for path in entry.get("deps", [])]
    paths = [Path(path) for path in filled if path is not None]
    return [path for path in paths if path.parts[0] != CODE]


def outputs_of(entry: Mapping[str, list[Any]]) -> list[Path]:
    """The outputs and metrics of a stage's entry, with options or without."""
    found = [path for kind in ("outs", "metrics") for path in entry.get(kind, [])]
    return [Path(str(next(iter(path)) if isinstance(path, dict) else path)) for path in found]


def check_apart(stage: str, params: object, work: Path) -> None:
    """Raise StageError if a path that params.yaml names, for whatever stage, lies where something is written.

    DVC and the stages remove what lies there, so a user's folder may be neither inside of it nor around it.
    Outputs of stages that a user has added count for nothing: one of them may well make the images.

    Args:
        stage: that is about to run.
        params: of all sections.
        work: the work directory.
    """
    own = [entry for entry in _pipeline(stage).values() if str(entry.get("cmd")).startswith(_OWN)]
    # Of data/pairs/images all of data/pairs: what lies beside an output looks like one.
    areas = {Path(*output.parts[:2]) for entry in own for output in outputs_of(entry)}
    areas |= {area.with_name(f"{area.name}.partial") for area in areas}
    areas |= {work, _DVC, Path(".git"), LOCKS}
    dependencies = {str(path) for entry in own for path in entry.get("deps", [])}
    for dependency in sorted(dependencies | {f"${{{name}}}" for name in NAMED}):
        found, filled = _PARAMETER.search(dependency), _filled(dependency, params)
        if found is None or filled is None:
            continue
        path = Path(filled)
        for area in sorted(areas):
            # Unlike Path.resolve, realpath takes a loop of links.
            if relation := _relation(_place(path, area), Path(os.path.realpath(area))):
                raise StageError(
                    f"params.yaml: {found[1].strip()}: expected a path apart from what is written here, "
                    f"got {path}, which is {relation} {area}: what lies there is removed; move it, "
                    "e.g. to data/mine"
                )


def _place(path: Path, area: Path) -> Path:
    """Where ``path`` leads; a file below .dvc stays where its link lies, for DVC can link to its cache."""
    if area == _DVC and path.is_file():
        return Path(os.path.realpath(path.parent), path.name)
    return Path(os.path.realpath(path))


def _relation(path: Path, area: Path) -> str | None:
    if path == area:
        return "the same as"
    if path.is_relative_to(area):
        return "inside of"
    return "around" if area.is_relative_to(path) else None


def look_at(paths: list[Path]) -> dict[str, Seen]:
    """Every file of ``paths`` and below them, by its path."""
    return {file: seen for path in paths for file in _files(path) if (seen := _seen(file)) is not None}


def check_unmoved(before: Mapping[str, Seen], paths: list[Path], stage: str) -> None:
    """Raise StageError if a file of ``paths`` has come, gone or changed since `look_at` gave ``before``."""
    now = look_at(paths)
    if now == before:
        return
    kinds = {
        "changed": [file for file in before.keys() & now.keys() if before[file] != now[file]],
        "new": now.keys() - before.keys(),
        "gone": before.keys() - now.keys(),
    }
    shown = [f"{kind} {some(sorted(files))}" for kind, files in kinds.items() if files]
    raise StageError(
        f"the stage's inputs changed while it ran ({'; '.join(shown)}), so its outputs would be recorded as "
        f"made from what they were not made from; run `dvc repro {stage}` again"
    )


def break_links(paths: list[Path]) -> None:
    """Remove outputs that DVC has linked to its cache: writing to one would write to the cache.

    `dvc repro` removes all outputs before it starts a stage; this is for a stage that is run by hand.
    """
    for path in paths:
        if not os.path.lexists(path):
            continue
        files = [path] if path.is_symlink() or path.is_file() else [Path(file) for file in _files(path)]
        if any(file.is_symlink() or file.lstat().st_nlink > 1 for file in files):
            remove(path)


def remove(path: Path) -> None:
    """Remove a file, a directory with all that it holds, or a link, but not what a link leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _pipeline(stage: str) -> dict[str, dict[str, Any]]:
    """The entries of dvc.yaml, that of ``stage`` among them; none where there is no such file."""
    try:
        stages = yaml.safe_load(PIPELINE.read_text(encoding="utf-8"))["stages"]
        return {name: dict(entry) for name, entry in stages.items()} | {stage: dict(stages[stage])}
    except FileNotFoundError:
        return {}
    except (yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise StageError(
            f"{PIPELINE}: expected an entry for stage {stage}, got {error!r}; take the file of the repository"
        ) from error


def _filled(path: str, params: object) -> str | None:
    """A path with the parameter that it may name, ``${section.key}``; None where that names no path."""
    found = _PARAMETER.search(path)
    if found is None:
        return path
    section, key = found[1].strip().split(".")
    value = getattr(getattr(params, section), key)
    return path.replace(found[0], str(value)) if value else None


def _files(path: Path) -> Iterator[str]:
    if path.is_dir():
        for directory, _, files in os.walk(path):
            yield from (os.path.join(directory, name) for name in files)
    else:
        yield str(path)


def _seen(file: str) -> Seen | None:
    try:
        found = os.stat(file)
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode):
        return None
    return Seen(found.st_size, found.st_mtime_ns, found.st_ino)
