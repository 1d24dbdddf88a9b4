"""What a checkpoint holds - tensors in a tree of plain values - as a checked safetensors file.

The tree travels as JSON in the file's metadata, with the tensors' names in their places. No pickle is
written or read, and `read_checked` finds every bit that has changed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from stages.lib.core.tensors import read_checked, write_checked

_TENSOR, _MAPPING, _TUPLE = "tensor", "mapping", "tuple"
_PLAIN = (str, int, float, bool, type(None))


def write_tree(path: Path, tree: dict[str, Any]) -> None:
    """Write dicts, lists, tuples, numbers, texts and tensors, whole or not at all.

    Raises:
        TypeError: for anything else, naming its place.
    """
    tensors: dict[str, torch.Tensor] = {}
    described = _describe(tree, "", tensors)
    write_checked(path, tensors, {"tree": json.dumps(described)})


def read_tree(path: Path) -> dict[str, Any]:
    """What `write_tree` wrote.

    Raises:
        ValueError: if it is damaged, or no such file.
        OSError: if it cannot be read.
    """
    tensors, metadata = read_checked(path)
    try:
        tree = _restore(json.loads(metadata["tree"]), tensors)
    except (KeyError, TypeError) as error:
        raise ValueError(f"no tree of values: {error!r}") from error
    if not isinstance(tree, dict):
        raise ValueError("no tree of values")
    return tree


def _describe(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    """``value`` as JSON; its tensors go to ``tensors`` under their places."""
    if isinstance(value, torch.Tensor):
        tensors[place] = value
        return {_TENSOR: place}
    if isinstance(value, dict):  # JSON would make texts of keys that are numbers
        return {
            _MAPPING: [
                [key, _describe(item, f"{place}.{key}".strip("."), tensors)] for key, item in value.items()
            ]
        }
    if isinstance(value, list | tuple):
        items = [_describe(item, f"{place}.{index}", tensors) for index, item in enumerate(value)]
        return items if isinstance(value, list) else {_TUPLE: items}
    if type(value) not in _PLAIN:
        raise TypeError(f"{place}: a checkpoint cannot hold a {type(value).__name__}")
    return value


def _restore(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_restore(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == _TENSOR:
        return tensors[content]
    if kind == _TUPLE:
        return tuple(_restore(item, tensors) for item in content)
    return {key: _restore(item, tensors) for key, item in content}
