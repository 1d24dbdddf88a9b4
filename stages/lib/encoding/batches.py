"""An encoder over batches of one shape: padded, and in float32 again where it overflows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from stages.lib.store.blocks import Row

Encode = Callable[[Sequence[Any]], list[Row]]


@dataclass(frozen=True)
class Encoder:
    """How rows are made. Picklable, because every worker process builds its own.

    Attributes:
        load: from an item's value to the input of `encode`, e.g. decoding and resizing.
        build: called with a torch device and a dtype, gives ``encode``, which takes exactly
            ``batch_size`` loaded inputs and gives as many rows.
        batch_size: inputs a batch; one that is not full is padded with its last input.
        dtype: name of the arithmetic's torch dtype. Below float32, a row with a value that is not
            finite is encoded again in float32; ``redone`` in the row says so.
    """

    load: Callable[[Any], Any]
    build: Callable[[str, str], Encode]
    batch_size: int
    dtype: str


def is_finite(row: Row) -> bool:
    return all(np.isfinite(value).all() for value in row.values())


class InProcess:
    """An encoder built in this process, and the one in float32 that takes over what overflows."""

    def __init__(self, encoder: Encoder, device: str) -> None:
        self.encoder, self.device = encoder, device
        self.encode = encoder.build(device, encoder.dtype)

    def rows(self, inputs: list[Any]) -> list[Row]:
        """The rows of at most a batch of loaded inputs."""
        rows = self._padded(self.encode, inputs)
        if self.encoder.dtype == "float32":
            return rows
        overflowed = [index for index, row in enumerate(rows) if not is_finite(row)]
        if overflowed:
            again = self._padded(self._in_float32, [inputs[index] for index in overflowed])
            for index, row in zip(overflowed, again, strict=True):
                rows[index] = row
        return [{**row, "redone": np.array(index in overflowed)} for index, row in enumerate(rows)]

    @functools.cached_property
    def _in_float32(self) -> Encode:
        return self.encoder.build(self.device, "float32")

    def _padded(self, encode: Encode, inputs: list[Any]) -> list[Row]:
        padding = [inputs[-1]] * (self.encoder.batch_size - len(inputs))
        return encode(inputs + padding)[: len(inputs)]


def compute_with_one_thread() -> None:
    """What every thread or process that encodes on a CPU does first: bits depend on the number of threads."""
    torch.set_num_threads(1)
