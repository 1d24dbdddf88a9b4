"""Progress bars on a terminal, a line every half minute elsewhere."""

from __future__ import annotations

import sys

from tqdm import tqdm


def progress_bar(
    description: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    enabled: bool = True,
) -> tqdm:
    """A bar with rate and time left on standard error.

    Args:
        description: what is done.
        unit: what is counted, in the plural.
        total: how many there are, if known.
        initial: how many were done before.
        enabled: False shows nothing.
    """
    interval = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(
        desc=description,
        unit=f" {unit}",
        total=total,
        initial=initial,
        mininterval=interval,
        maxinterval=interval,
        file=sys.stderr,
        disable=not enabled,
    )
