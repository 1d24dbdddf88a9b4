"""params.yaml, read once and validated as a whole: every problem of the file is in one error.

A section is a class in `sections`. A stage is given what dvc.yaml lists for it and nothing more.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from stages.lib.frame.errors import StageError
from stages.lib.frame.sections.encode_captions import EncodeCaptions
from stages.lib.frame.sections.encode_images import EncodeImages
from stages.lib.frame.sections.evaluate import Evaluate
from stages.lib.frame.sections.export import Export
from stages.lib.frame.sections.fetch_base import FetchBase
from stages.lib.frame.sections.invert import Invert
from stages.lib.frame.sections.prepare import Prepare
from stages.lib.frame.sections.section import Section, UndeclaredParameter, read_section
from stages.lib.frame.sections.tokenization import Tokenize
from stages.lib.frame.sections.train import Train
from stages.lib.frame.sections.validation import Validation

__all__ = [
    "EncodeCaptions", "EncodeImages", "Evaluate", "Export", "FetchBase", "Invert", "Params", "Prepare",
    "Tokenize", "Train", "UndeclaredParameter", "Validation", "read_params",
]  # fmt: skip

PARAMS_FILE = Path("params.yaml")
SECTIONS: dict[str, type[Section]] = {
    kind.section: kind
    for kind in (
        FetchBase, Prepare, Tokenize, EncodeCaptions, EncodeImages, Train, Invert, Validation, Evaluate,
        Export,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Params:
    """All sections of params.yaml."""

    fetch_base: FetchBase
    prepare: Prepare
    tokenize: Tokenize
    encode_captions: EncodeCaptions
    encode_images: EncodeImages
    train: Train
    invert: Invert
    validation: Validation
    evaluate: Evaluate
    export: Export

    def only(self, declared: Iterable[str]) -> Params:
        """A view of what dvc.yaml lists for a stage: reading anything else is an error.

        Args:
            declared: sections, or ``section.key`` each.

        Raises:
            UndeclaredParameter: when something else is read of what is given back.
        """
        keys: dict[str, set[str]] = defaultdict(set)
        for place in declared:
            section, _, key = place.partition(".")
            keys[section] |= {key} if key else set(SECTIONS[section].model_fields)
        return dataclasses.replace(self, **{name: getattr(self, name).only(keys[name]) for name in SECTIONS})


def read_params(path: Path = PARAMS_FILE) -> Params:
    """Read and validate the whole file.

    Raises:
        StageError: listing every unknown or missing key, wrong type, value out of range and
            impossible combination, each with what was expected and what was found.
    """
    document = _document(path)
    problems = _key_problems("", document, list(SECTIONS))
    sections: dict[str, Any] = {}
    for name, kind in SECTIONS.items():
        if name not in document:
            continue
        values = document[name]
        if not isinstance(values, dict):
            problems.append(f"{name}: expected a section of keys, got {values!r}")
            continue
        problems += _key_problems(f"{name}.", values, list(kind.model_fields))
        sections[name], found = read_section(kind, values)
        problems += map(str, found)
    if problems:
        raise StageError(f"{path}: {len(problems)} problem(s)\n  " + "\n  ".join(problems))
    return Params(**sections)


def _document(path: Path) -> dict[str, Any]:
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeys)
    except FileNotFoundError as error:
        raise StageError(f"{path}: not found; run from the root of the repository") from error
    except UnicodeDecodeError as error:
        raise StageError(f"{path}: expected UTF-8, got {error}; save it as UTF-8") from error
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        # A value such as 2026-99-99 looks like a date, and raises what Python's own does.
        raise StageError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(document, dict):
        raise StageError(f"{path}: expected sections, got {type(document).__name__}")
    return document


class _UniqueKeys(yaml.SafeLoader):
    """YAML of which PyYAML would take the last of two equal keys, silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key!r} stands here a second time; keep one of them", key_node.start_mark
                )
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def _key_problems(prefix: str, found: Mapping[Any, Any], known: list[str]) -> list[str]:
    """A line for each unknown and each missing key."""
    problems = []
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
            problems.append(f"{prefix}{key}: unknown key; {hint}")
    return problems + [f"{prefix}{key}: missing" for key in known if key not in found]
