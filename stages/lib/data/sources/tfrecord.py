"""TFRecord files of `tf.train.Example`, as img2dataset writes them, without TensorFlow.

A record is its length, a checksum of that, the data and a checksum of these (TensorFlow,
``tensorflow/core/lib/io/record_writer.h``); the checksums are CRC-32C, rotated and offset. The data are a
protocol buffer: Example.features (1) is Features, whose feature (1) maps names (1) to Feature (2): a list of
bytes (1), floats (2) or integers (3), each with its values as field 1.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from typing import NamedTuple

import google_crc32c
import pyarrow as pa

from stages.lib.data.caption_text import text_of

_MASK_DELTA = 0xA282EAD8
_FIRST_EXAMPLES = 16  # in which a feature that holds something is looked for
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # wire types


class TFRecordShard:
    """A TFRecord file of examples, as a table.

    Its features of bytes are columns; the first of them that is not empty tells text from others.
    """

    def __init__(self, path: str) -> None:
        with open(path, "rb") as file:
            self._content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        self._records = list(records(self._content))
        firsts: dict[str, bytes] = {}
        for number in range(min(len(self._records), _FIRST_EXAMPLES)):
            for name, values in self._example(number).items():
                firsts[name] = firsts.get(name) or b"".join(values[:1])
        is_text = {name: text_of(value) is not None for name, value in firsts.items()}
        self.schema = pa.schema(
            [(name, pa.string() if is_text[name] else pa.binary()) for name in sorted(firsts)]
        )

    def batches(self, column: str) -> Iterator[tuple[int, pa.Array]]:
        for number in range(len(self._records)):
            values = self._example(number).get(column, [])
            yield number, pa.array([values if len(values) > 1 else next(iter(values), None)])

    def _example(self, number: int) -> dict[str, list[bytes]]:
        offset, size = self._records[number]
        return example(bytes(self._content[offset : offset + size]))


class Record(NamedTuple):
    """Where an example lies in its file."""

    offset: int
    size: int


def records(content: memoryview) -> Iterator[Record]:
    """Every record of a file, its checksums verified.

    Raises:
        ValueError: if one is damaged or cut.
    """
    offset = 0
    while offset < len(content):
        header = bytes(content[offset : offset + 12])
        if len(header) < 12 or struct.unpack("<I", header[8:])[0] != _masked(header[:8]):
            raise ValueError(f"the record at byte {offset} has no whole header")
        (size,) = struct.unpack("<Q", header[:8])
        start, end = offset + 12, offset + 12 + size
        if end + 4 > len(content) or struct.unpack("<I", content[end : end + 4])[0] != _masked(
            bytes(content[start:end])
        ):
            raise ValueError(f"a checksum of the record at byte {offset} fails, or it is cut")
        yield Record(start, size)
        offset = end + 4


def example(data: bytes) -> dict[str, list[bytes]]:
    """The features that are lists of bytes, by name; those of numbers are left out.

    Raises:
        ValueError: if it is no Example.
    """
    found: dict[str, list[bytes]] = {}
    for features in _fields(data, 1):
        for entry in _fields(features, 1):
            name = b"".join(_fields(entry, 1)).decode()
            lists = [values for feature in _fields(entry, 2) for values in _fields(feature, 1)]
            if lists:
                found[name] = [value for values in lists for value in _fields(values, 1)]
    return found


def _masked(data: bytes) -> int:
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def _fields(data: bytes, wanted: int) -> list[bytes]:
    """The values of one field of a message, of those that have a length."""
    found, position = [], 0
    while position < len(data):
        tag, position = _varint(data, position)
        kind = tag & 7
        if kind == _VARINT:
            _, position = _varint(data, position)
            continue
        if kind == _LENGTH:
            size, position = _varint(data, position)
        elif kind in (_FIXED64, _FIXED32):
            size = 8 if kind == _FIXED64 else 4
        else:
            raise ValueError("no protocol buffer of an Example")
        if position + size > len(data):
            raise ValueError("a field ends behind its message")
        if kind == _LENGTH and tag >> 3 == wanted:
            found.append(data[position : position + size])
        position += size
    return found


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """(value, where the next byte is)."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number ends behind its message")
