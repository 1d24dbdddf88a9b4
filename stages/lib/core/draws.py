"""Random numbers as functions of (seed, purpose, key): no global state, nothing to restore.

A resumed run, a run on more processes and an uninterrupted one draw the same, because every
draw is asked for by name and drawn on the CPU.
"""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str, *key: int | str) -> torch.Generator:
    """A CPU generator that depends on its arguments alone.

    Args:
        seed: of the run.
        purpose: what is drawn, e.g. ``"noise"``; two purposes never share a stream.
        key: what it is drawn for, e.g. the global step or a sample_id.
    """
    digest = hashlib.blake2b(repr((seed, purpose, *key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def unit_interval(seed: int, purpose: str, *key: int | str) -> float:
    """One number in [0, 1) that depends on its arguments alone."""
    digest = hashlib.blake2b(repr((seed, purpose, *key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
