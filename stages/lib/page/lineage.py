"""Where a run's outputs came from: dvc.lock's hashes, and what the UNet's file says of itself."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import yaml
from fsspec import AbstractFileSystem

from stages.lib.core.tensors import checked_metadata, read_header


class LockedFile(NamedTuple):
    """A dependency or an output of a stage, as DVC recorded it. ``kind`` is ``dep`` or ``out``."""

    kind: str
    path: str
    hash: str
    size: int


class LockedStage(NamedTuple):
    """A stage as it last ran."""

    name: str
    command: str
    files: tuple[LockedFile, ...]


class Lineage(NamedTuple):
    """Stages upstream of an output, in the order they ran; or why that is not known."""

    stages: tuple[LockedStage, ...]
    problem: str


def read_lock(files: AbstractFileSystem, path: str, content: bytes) -> Lineage:
    """The stages that ``path``, whose bytes are ``content``, was made by.

    Stages that the output does not depend on are left out: whether and when they ran is not part of it.
    """
    if not files.exists("dvc.lock"):
        return Lineage((), "There is no dvc.lock here: `dvc repro` has not run.")
    locked = (yaml.safe_load(files.cat_file("dvc.lock")) or {}).get("stages") or {}
    makers = [name for name in sorted(locked) if _makes(locked[name], path)]
    if not makers:
        return Lineage((), f"dvc.lock does not list {path}: `dvc repro report` writes it.")
    recorded = {out["path"]: _hash(out) for name in makers for out in locked[name]["outs"]}
    if recorded.get(path) not in (None, hashlib.md5(content, usedforsecurity=False).hexdigest()):
        return Lineage((), f"dvc.lock records another {path} than this one: stage report ran outside of DVC.")
    order: dict[str, LockedStage] = {}
    for name in makers:
        _visit(name, locked, order)
    return Lineage(tuple(order.values()), "")


def read_weights_lineage(
    files: AbstractFileSystem, directory: str, is_earlier: bool = False
) -> dict[str, str]:
    """Metadata of the safetensors file in ``directory``.

    Args:
        files: rooted at the repository.
        directory: of the weights.
        is_earlier: of a version of the project that may have left no hash of the header.

    Raises:
        ValueError: if the header is not as it was written.
    """
    if not files.exists(directory):
        return {}
    weights = sorted(path for path in files.ls(directory, detail=False) if path.endswith(".safetensors"))
    if not weights:
        return {}
    try:
        with files.open(weights[0], "rb") as file:
            header = read_header(file)
    except FileNotFoundError:  # the weights of a revision may have been dropped from the cache
        return {}
    has_hash = "header_sha256" in header.metadata or not is_earlier
    return dict(sorted((checked_metadata(header) if has_hash else header.metadata).items()))


def _visit(name: str, locked: dict[str, Any], order: dict[str, LockedStage]) -> None:
    """Add what stage ``name`` depends on to ``order``, then the stage."""
    if name in order:
        return
    stage = locked[name]
    for dep in sorted(dep["path"] for dep in stage.get("deps", [])):
        for maker in sorted(locked):
            if maker != name and _makes(locked[maker], dep):
                _visit(maker, locked, order)
    entries = [
        LockedFile(kind, entry["path"].rstrip("/"), _hash(entry), entry.get("size", 0))
        for kind in ("dep", "out")
        for entry in sorted(stage.get(f"{kind}s", []), key=lambda entry: entry["path"])
    ]
    order[name] = LockedStage(name, stage.get("cmd", ""), tuple(entries))


def _makes(stage: dict[str, Any], path: str) -> bool:
    """Whether ``path`` is an output of ``stage``, in one, or holds one."""
    outs = [out["path"] for out in stage.get("outs", [])]
    return any(f"{path}/".startswith(f"{out}/") or f"{out}/".startswith(f"{path}/") for out in outs)


def _hash(entry: dict[str, Any]) -> str:
    return str(entry.get(entry.get("hash", "md5"), ""))
