"""Hashes that travel with what a stage has made, written by that stage and checked by those that read it.

A directory has a file SHA256SUMS, in the format of coreutils: `cd DIRECTORY; sha256sum -c SHA256SUMS`.
A directory below it that has such a file of its own counts by that file alone, so that each part of a base is
checked by those who read it. A file of JSON holds the hash of its values itself.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stages.lib.core.files import read_json, write_json, write_text
from stages.lib.frame.errors import StageError, some

SUMS = "SHA256SUMS"
_SEAL = "sha256"
_LINE = re.compile(r"([0-9a-f]{64})  ([^\0]+)")


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def hash_files(paths: Iterable[Path]) -> dict[Path, str]:
    """SHA-256 of files, on all cores."""
    found = list(paths)
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock
        return dict(zip(found, pool.map(hash_file, found), strict=True))


def write_sums(directory: Path) -> None:
    """Write SHA256SUMS of a directory that is complete."""
    found = hash_files(_counted(directory))
    write_text(
        directory / SUMS, format_sums({_name(path, directory): digest for path, digest in found.items()})
    )


def write_sum(file: Path) -> None:
    """Write the hash of one file beside it, ``<name>.sha256``."""
    write_text(sum_of(file), format_sums({file.name: hash_file(file)}))


def sum_of(file: Path) -> Path:
    """Where `write_sum` writes."""
    return file.with_name(f"{file.name}.sha256")


def check_sums(directory: Path, stage: str) -> None:
    """Verify every file of a directory.

    Names that begin with a dot are no part of it.

    Args:
        directory: that `write_sums` was called for.
        stage: that makes it, named in errors.

    Raises:
        StageError: if the directory is not there, or a file is missing, new, or not as it was written.
    """
    if not directory.is_dir():
        raise StageError(
            f"{directory}: expected what stage {stage} makes, found none; run `dvc repro {stage}`"
        )
    recorded = _read(directory / SUMS, stage)
    paths = {_name(path, directory): path for path in _counted(directory)}
    try:
        hashes = hash_files(path for name, path in paths.items() if name in recorded)
    except OSError as error:
        raise StageError(f"{directory}: cannot be read: {error}; {remedy(stage)}") from error
    found = {name: hashes.get(path, "") for name, path in paths.items()}
    if problems := differences(recorded, found):
        raise StageError(f"{directory}: damaged, {'; '.join(problems)}; {remedy(stage)}")
    around = directory.parent / SUMS
    if around.exists():
        expected = _read(around, stage).get(f"{directory.name}/{SUMS}")
        if expected is not None and expected != hash_file(directory / SUMS):
            raise StageError(
                f"{directory}: expected the one that {around} lists, got another version; {remedy(stage)}"
            )


def hashes_below(directory: Path) -> dict[str, str]:
    """Path in ``directory`` -> hash of every file below it, for a file that holds them."""
    return {_name(path, directory): digest for path, digest in hash_files(_counted_below(directory)).items()}


def check_hashes(directory: Path, recorded: Mapping[str, str], stage: str) -> None:
    """Verify files of a directory by their recorded hashes; others beside them do not matter.

    Raises:
        StageError: naming those that are missing or not as they were written.
    """
    present = {name: directory / name for name in recorded if (directory / name).is_file()}
    hashes = hash_files(present.values())
    if problems := differences(recorded, {name: hashes[path] for name, path in present.items()}):
        raise StageError(f"{directory}: damaged, {'; '.join(problems)}; {remedy(stage)}")


def write_sealed_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object with the hash of its values, ``sha256``."""
    write_json(path, {**values, _SEAL: _hash_of(values)})


def read_sealed_json(path: Path, stage: str) -> dict[str, Any]:
    """What `write_sealed_json` wrote.

    Raises:
        StageError: if it is missing or damaged, naming the stage that makes it.
    """
    return unsealed(read_json(path, remedy(stage)), str(path), stage)


def unsealed(values: Mapping[str, Any], where: str, stage: str) -> dict[str, Any]:
    """The values of a sealed JSON object; StageError naming ``where`` if they are others."""
    found = {name: value for name, value in values.items() if name != _SEAL}
    if values.get(_SEAL) != _hash_of(found):
        raise StageError(
            f"{where}: expected the values whose hash it holds as {_SEAL!r}, got others; {remedy(stage)}"
        )
    return found


def parse_sums(text: str, where: str, stage: str) -> dict[str, str]:
    """Path -> hash, from the text of a file of hashes.

    Raises:
        StageError: if a line is anything else, naming ``where``.
    """
    found = [_LINE.fullmatch(line) for line in text.split("\n")[:-1]]
    if (text and not text.endswith("\n")) or not all(found):
        raise StageError(f"{where}: expected lines of hash and name, got something else; {remedy(stage)}")
    return {match[2]: match[1] for match in found if match}


def format_sums(hashes: Mapping[str, str]) -> str:
    """As sha256sum prints them, sorted by name."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))


def differences(recorded: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """A text for each kind of difference between two sets of hashes by name."""
    kinds = {
        "missing": sorted(recorded.keys() - found.keys()),
        "unexpected": sorted(found.keys() - recorded.keys()),
        "changed": sorted(name for name in recorded.keys() & found.keys() if recorded[name] != found[name]),
    }
    return [f"{kind} {some(names)}" for kind, names in kinds.items() if names]


def remedy(stage: str) -> str:
    """What mends an output that is not as its stage wrote it."""
    # DVC takes a file whose time and size are unchanged for unchanged; -s leaves earlier stages alone.
    return f"run `dvc repro -f -s {stage}`"


def _hash_of(values: Mapping[str, Any]) -> str:
    """As JSON gives them back, whatever they were before."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _read(path: Path, stage: str) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(
            f"{path}: expected the hashes of the files beside it, got: {error}; {remedy(stage)}"
        ) from error
    return parse_sums(text, str(path), stage)


def _counted(directory: Path) -> Iterator[Path]:
    """The files that the directory's own hashes are of."""
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or path.name == SUMS:
            continue
        if not path.is_dir():
            yield path
        elif (path / SUMS).exists():
            yield path / SUMS
        else:
            yield from _counted_below(path)


def _counted_below(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.rglob("*")):
        if not path.is_dir() and not path.name.startswith("."):
            yield path


def _name(path: Path, directory: Path) -> str:
    return path.relative_to(directory).as_posix()
