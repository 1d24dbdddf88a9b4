"""Safetensors files: written with the same bytes for the same tensors, and read with every byte checked.

The format: 8 bytes of header length, little-endian; a JSON header, padded with blanks to a multiple of 8;
the tensors' bytes. This is the one module that knows it. In the metadata lies a SHA-256 of the header, and in
a file that only this project reads a CRC-32 of each tensor; other readers pass over them.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
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
TORCH_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "F16": "float16", "BF16": "bfloat16",
    "I32": "int32", "F32": "float32", "I64": "int64", "F64": "float64",
}  # fmt: skip
_CHECKSUMS, _HEADER_HASH = "checksums", "header_sha256"


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
    _write(path, {name: (tensor, "F32") for name, tensor in tensors.items()}, metadata)


def write_checked(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """As `write_safetensors`, in the tensors' own dtypes and with checksums, for `read_checked`."""
    name_of = {torch_name: name for name, torch_name in TORCH_DTYPES.items()}
    stored = {
        name: (tensor, name_of[str(tensor.dtype).removeprefix("torch.")]) for name, tensor in tensors.items()
    }
    _write(path, stored, metadata, checked=True)


def write_in_parts(
    path: Path,
    parts: Sequence[Callable[[], Mapping[str, torch.Tensor]]],
    dtype: torch.dtype,
    metadata: Callable[[str], Mapping[str, str]],
) -> None:
    """Write tensors of several models, whole or not at all, with one of the models in memory at a time.

    Args:
        path: of the file.
        parts: each gives the same tensors, by name, both times it is called.
        dtype: that floating-point tensors are stored in; others keep theirs.
        metadata: from the SHA-256 of all that follows the header.

    Raises:
        StageError: naming a tensor with a value that is not finite, or is not in ``dtype``.
    """
    import torch

    name_of = {torch_name: name for name, torch_name in TORCH_DTYPES.items()}
    entries: dict[str, Any] = {}
    digest, start = hashlib.sha256(), 0

    def stored(name: str, tensor: torch.Tensor) -> torch.Tensor:
        kept = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        if not torch.isfinite(kept).all():
            raise StageError(
                f"{path}: expected finite values of {dtype}, got others in {name}; export float32, or train "
                "again if they are none of float32 either"
            )
        return kept

    for part in parts:
        for name, tensor in sorted(part().items()):
            kept = stored(name, tensor)
            content = _bytes_of(kept)
            digest.update(content)
            entry = name_of[str(kept.dtype).removeprefix("torch.")], list(kept.shape)
            entries[name] = {
                "dtype": entry[0],
                "shape": entry[1],
                "data_offsets": [start, start + len(content)],
            }
            start += len(content)
    with open_atomically(path) as file:
        file.write(_header_bytes(metadata(digest.hexdigest()), entries, None))
        for part in parts:
            for name, tensor in sorted(part().items()):
                kept = stored(name, tensor)
                file.write(_bytes_of(kept))


def read_checked(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tensors and metadata of a file of `write_checked`; no bit of it is other than it was written.

    Raises:
        ValueError: if it is damaged, or no such file.
        OSError: if it cannot be read.
    """
    import torch

    found: dict[str, torch.Tensor] = {}
    with open(path, "rb") as file:
        header = read_header(file, path.stat().st_size)
        metadata = checked_metadata(header)
        checksums = json.loads(header.metadata.get(_CHECKSUMS, "{}"))
        for name, stored in sorted(header.tensors.items(), key=lambda item: item[1].start):
            content = bytearray(stored.num_bytes)
            if file.readinto(content) != stored.num_bytes:
                raise ValueError("truncated")
            if f"{zlib.crc32(content):08x}" != checksums.get(name):
                raise ValueError(f"checksum of tensor {name}")
            dtype = getattr(torch, TORCH_DTYPES[stored.dtype])
            values = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
            found[name] = values.reshape(stored.shape)
    return found, metadata


def _write(
    path: Path,
    stored: Mapping[str, tuple[torch.Tensor, str]],
    metadata: Mapping[str, str],
    checked: bool = False,
) -> None:
    """Tensors and how they are stored; checksums are filled in when the last tensor has passed."""
    import torch

    names = sorted(stored)
    checksums = dict.fromkeys(names, "0" * 8) if checked else None
    tensors: dict[str, Any] = {}
    start = 0
    for name in names:
        tensor, dtype = stored[name]
        stop = start + ITEM_BYTES[dtype] * tensor.numel()
        tensors[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, stop]}
        start = stop
    with open_atomically(path) as file:
        file.write(_header_bytes(metadata, tensors, checksums))
        for name in names:
            tensor, dtype = stored[name]
            tensor = tensor.detach().to("cpu", getattr(torch, TORCH_DTYPES[dtype])).contiguous()
            content = _bytes_of(tensor)
            file.write(content)
            if checksums is not None:
                checksums[name] = f"{zlib.crc32(content):08x}"
        if checksums is not None:
            file.seek(0)
            file.write(_header_bytes(metadata, tensors, checksums))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """A contiguous CPU tensor's bytes where they lie. `numpy` would forbid its owner to resize them."""
    num_bytes = tensor.numel() * tensor.element_size()
    if not num_bytes:
        return memoryview(b"")
    return memoryview((ctypes.c_ubyte * num_bytes).from_address(tensor.data_ptr())).cast("B")


def _header_bytes(
    metadata: Mapping[str, str], tensors: Mapping[str, Any], checksums: Mapping[str, str] | None
) -> bytes:
    """Of the same length whatever the checksums are."""
    texts = {"format": "pt", **metadata}
    if checksums is not None:
        texts[_CHECKSUMS] = json.dumps(checksums, sort_keys=True)
    texts[_HEADER_HASH] = _hash_of_header(texts, tensors)
    text = json.dumps(
        {"__metadata__": dict(sorted(texts.items())), **tensors}, separators=(",", ":")
    ).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _hash_of_header(metadata: Mapping[str, str], tensors: Mapping[str, Any]) -> str:
    texts = {name: value for name, value in metadata.items() if name != _HEADER_HASH}
    return hashlib.sha256(json.dumps([texts, tensors], sort_keys=True).encode()).hexdigest()


def checked_metadata(header: Header) -> dict[str, str]:
    """What the writer of a header put into its metadata.

    Raises:
        ValueError: if the header is not as it was written.
    """
    first = min((stored.start for stored in header.tensors.values()), default=0)
    tensors = {
        name: {
            "dtype": stored.dtype,
            "shape": list(stored.shape),
            "data_offsets": [stored.start - first, stored.start - first + stored.num_bytes],
        }
        for name, stored in header.tensors.items()
    }
    if header.metadata.get(_HEADER_HASH) != _hash_of_header(header.metadata, tensors):
        raise ValueError("checksum of the header")
    own = (_CHECKSUMS, _HEADER_HASH, "format")
    return {name: value for name, value in header.metadata.items() if name not in own}


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
