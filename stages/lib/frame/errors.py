"""The one exception for what a user can mend."""

from __future__ import annotations


class StageError(Exception):
    """Bad input or a bad environment. The message says what, where, expected, got and remedy.

    Stages show it without a traceback and exit with status 1.
    """
