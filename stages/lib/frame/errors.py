"""The one exception for what a user can mend, and texts that are safe to show."""

from __future__ import annotations

import re
import unicodedata

# What turns the direction of the text around it.
_BIDIRECTIONAL = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

_NUM_SHOWN = 3
_MAX_WORD, _MAX_LINE = 300, 4000  # characters; a path of a Hub cache has about 200
_LONG_WORD = re.compile(rf"\S{{{_MAX_WORD + 1},}}")


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
    """``text`` with all but its line feeds and tabs printable, and of a bounded length.

    Names of files are users', or strangers': of a word or a line that is very long the middle is left out.
    """
    shown = "\n".join(_shortened(_LONG_WORD.sub(_shorter_word, line), _MAX_LINE) for line in text.split("\n"))
    return "".join(each if each in "\n\t" or is_printable(each) else ascii(each)[1:-1] for each in shown)


def _shorter_word(found: re.Match[str]) -> str:
    return _shortened(found[0], _MAX_WORD)


def _shortened(text: str, limit: int) -> str:
    if len(text) <= limit:
        return text
    kept = limit // 2 - 20
    return f"{text[:kept]}[{len(text) - 2 * kept:,} characters]{text[-kept:]}"
