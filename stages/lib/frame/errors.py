"""The one exception for what a user can mend, and texts that are safe to show."""

from __future__ import annotations

import unicodedata

# What turns the direction of the text around it.
_BIDIRECTIONAL = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

_NUM_SHOWN = 3


class StageError(Exception):
    """Bad input or a bad environment. The message says what, where, expected, got and remedy.

    Stages show it without a traceback and exit with status 1.
    """


def some(names: list[str]) -> str:
    """The first few of ``names``, and how many more there are."""
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return ", ".join(names[:_NUM_SHOWN]) + more


def is_printable(character: str) -> bool:
    """Whether a character neither steers a terminal, nor ends a line, nor turns the text around it."""
    return unicodedata.category(character) not in ("Cc", "Cs", "Zl", "Zp") and character not in _BIDIRECTIONAL


def printable(text: str) -> str:
    """``text`` with all but its line feeds and tabs printable: names of files are users', or strangers'."""
    return "".join(each if each in "\n\t" or is_printable(each) else ascii(each)[1:-1] for each in text)
