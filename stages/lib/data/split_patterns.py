"""Which names of a repository make up a split, by the rules of Hugging Face `datasets`.

Source: huggingface.co/docs/datasets/repository_structure, and `datasets.data_files`.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterable, Sequence

from fsspec.utils import glob_translate

_WORDS = {
    "train": "train|training",
    "validation": "validation|valid|dev|val",
    "test": "test|testing|eval|evaluation",
}
_NO_LETTER = "[-._ 0-9]"
_SHARD = re.compile(r"data/([^/]+)-[0-9]{5}-of-[0-9]{5}[^/]*\.[^/]*")
_ABOUT_THE_DATA = (
    "README.md",
    "config.json",
    "dataset_info.json",
    "dataset_infos.json",
    "dummy_data.zip",
    "dataset_dict.json",
)


def splits_by_names(names: Iterable[str]) -> dict[str, list[str]]:
    """split -> names, where nobody says which is which.

    Shards ``data/<split>-00000-of-00002.*`` count alone where there are some; else a word in the name of a
    folder, else one in the name of a file; else everything is ``train``.
    """
    counted = [name for name in names if _is_data(name, "")]
    shards: dict[str, list[str]] = {}
    for name in counted:
        if match := _SHARD.fullmatch(name):
            shards.setdefault(match[1], []).append(name)
    if shards:
        return shards
    for says in (_folder_says, _base_says):
        found = {split: [name for name in counted if says(name, words)] for split, words in _WORDS.items()}
        if any(found.values()):
            return {split: named for split, named in found.items() if named}
    return {"train": counted}


def matching(pattern: str, names: Sequence[str]) -> list[str]:
    """The names that a pattern means: ``*`` and ``?`` stop at a slash, a part ``**`` does not.

    Raises:
        ValueError: if a pattern that is a path names none, or one leads elsewhere.
    """
    if "::" in pattern or "://" in pattern or pattern.startswith("/") or ".." in pattern.split("/"):
        raise ValueError(f"{pattern}: leads out of the repository, or into an archive")
    pattern = posixpath.normpath(pattern)
    if any(character in pattern for character in "*?["):
        found = filter(re.compile(glob_translate(pattern)).match, names)
        return sorted(name for name in found if _is_data(name, pattern))
    if pattern not in names:
        raise ValueError(f"{pattern}: no such file in this commit")
    return [pattern]


def _folder_says(name: str, words: str) -> bool:
    return any(_says(part, words, f"(?:{_NO_LETTER}.*)?") for part in name.split("/")[:-1])


def _base_says(name: str, words: str) -> bool:
    return _says(posixpath.basename(name), words, f"{_NO_LETTER}.*")


def _says(part: str, words: str, rest: str) -> bool:
    return re.fullmatch(f"(?:.*{_NO_LETTER})?(?:{words}){rest}", part, re.DOTALL) is not None


def _is_data(name: str, pattern: str) -> bool:
    """Whether a name that a pattern matches counts: not what is hidden or about the data, unless so named."""
    if posixpath.basename(name) in _ABOUT_THE_DATA and posixpath.basename(name) != posixpath.basename(
        pattern
    ):
        return False
    return _hidden(name) == _hidden(pattern)


def _hidden(path: str) -> tuple[int, int]:
    """How many parts begin with a dot, and how many folders with two underscores."""
    parts = path.split("/")
    dots = sum(part.startswith(".") and part.strip(".") != "" for part in parts)
    return dots, sum(part.startswith("__") for part in parts[:-1])
