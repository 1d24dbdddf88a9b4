"""Progress bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

LINE_SECONDS = 10.0
_LINE = "{desc}: {n_fmt} of {total_fmt}{unit}, {rate_noinv_fmt}, {elapsed} passed, {remaining} left{postfix}"


def progress_bar(
    description: str,
    unit: str,
    total: int | None = None,
    initial: int = 0,
    enabled: bool = True,
) -> tqdm[Any]:
    """A bar with rate and time left on standard error; where that is no terminal, plain lines.

    Lines are ten seconds apart or more, but for the first and the last.

    Args:
        description: what is done.
        unit: what is counted, in the plural.
        total: how many there are, if known.
        initial: how many were done before.
        enabled: False shows nothing.
    """
    options: dict[str, Any] = {"file": sys.stderr, "mininterval": 0.5, "maxinterval": 0.5}
    if not sys.stderr.isatty():
        options = {"file": _Lines(), "bar_format": _LINE, "mininterval": LINE_SECONDS, "miniters": 1}
    return tqdm(
        desc=description,
        unit=f" {unit}",
        total=total,
        initial=initial,
        disable=not enabled,
        position=0,
        **options,
    )


class _Lines:
    """Makes a line of each state that tqdm would draw over the one before."""

    def write(self, text: str) -> None:
        if state := " ".join(text.split()):
            sys.stderr.write(f"{state}\n")

    def flush(self) -> None:
        sys.stderr.flush()
