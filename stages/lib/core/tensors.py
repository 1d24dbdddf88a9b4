"""Safetensors files: written with the same bytes for the same tensors, and their headers read.

The format: 8 bytes of header length, little-endian; a JSON header, padded with blanks to a multiple of 8;
the tensors' bytes. This is the one module that knows it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from stages.lib.core.files import open_atomically
from stages.lib.frame.errors import StageError

if TYPE_CHECKING:
    import torch

ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit


class StoredTensor(NamedTuple):
    """Where a tensor lies in its file: ``dtype`` as the format names it, ``start`` from the file's start."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int


class Header(NamedTuple):
    """What a file holds."""

    metadata: dict[str, str]
    tensors: dict[str, StoredTensor]


def read_header(file: IO[bytes], file_bytes: int | None = None) -> Header:
    """The header of a safetensors file that is open at its beginning.

    Args:
        file: read up to the end of the header.
        file_bytes: of the whole file; the tensors have to fill it exactly. None does not look.

    Raises:
        ValueError: if it is no such file, cut short, or its tensors do not lie where they should.
    """
    length = int.from_bytes(_read(file, 8), "little")
    if length > (MAX_HEADER_BYTES if file_bytes is None else min(MAX_HEADER_BYTES, file_bytes - 8)):
        raise ValueError("truncated, or no safetensors file")
    try:
        header = json.loads(_read(file, length))
        metadata = dict(header.pop("__metadata__", {}))
        tensors = {name: _stored(entry, 8 + length) for name, entry in header.items()}
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"header: {error!r}") from error
    end = 8 + length
    for tensor in sorted(tensors.values(), key=lambda each: each.start):
        if tensor.start != end:
            raise ValueError("tensors overlap, or leave a gap")
        end += tensor.num_bytes
    if file_bytes is not None and end != file_bytes:
        raise ValueError(f"expected {end} bytes, found {file_bytes}")
    return Header(metadata, tensors)


def tensor_names(path: Path) -> set[str]:
    """Names of the tensors in a safetensors file whose length is the one that its header announces.

    Raises:
        StageError: naming ``path`` if it is cut short, a Git LFS pointer or no safetensors file.
    """
    try:
        with open(path, "rb") as file:
            return set(read_header(file, path.stat().st_size).tensors)
    except (OSError, ValueError) as error:
        raise StageError(f"{path}: not a whole safetensors file ({error}); {_remedy(path)}") from error


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors as float32, whole or not at all, with no more than one of them copied at a time.

    The safetensors library would hold the whole file in memory, and write its metadata in the
    order of a hash map, another one in each process. Here both are sorted by name, so the same
    tensors give the same bytes.
    """
    import torch

    names = sorted(tensors)
    header: dict[str, object] = {"__metadata__": dict(sorted({"format": "pt", **metadata}.items()))}
    start = 0
    for name in names:
        stop = start + 4 * tensors[name].numel()
        header[name] = {"dtype": "F32", "shape": list(tensors[name].shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    with open_atomically(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = tensors[name].detach().to("cpu", torch.float32).contiguous()
            file.write(tensor.reshape(-1).numpy().data)


def _read(file: IO[bytes], num_bytes: int) -> bytes:
    content = file.read(num_bytes)
    if len(content) != num_bytes:
        raise ValueError("truncated")
    return content


def _stored(entry: Mapping[str, Any], data_start: int) -> StoredTensor:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    num_bytes = ITEM_BYTES[entry["dtype"]] * math.prod(shape)
    if end - begin != num_bytes:
        raise ValueError(f"expected {num_bytes} bytes for shape {shape}, found {end - begin}")
    return StoredTensor(entry["dtype"], shape, data_start + begin, num_bytes)


def _remedy(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            is_pointer = file.read(16) == b"version https://"
    except OSError:
        is_pointer = False
    return "run `git lfs pull` there" if is_pointer else "it is cut short or damaged: fetch or copy it again"
