"""Which file a name means: as it is written, else as people and tools mistype it.

The same name may be composed or decomposed Unicode (macOS writes one, tables the other), in other letters
of upper and lower case (Windows), with the other slash, or in the encoding of another country. What
was found keeps the name that it has on the disk.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import unicodedata
from collections import defaultdict
from collections.abc import Iterable

# Of names that are not UTF-8, as older archives hold them.
ENCODINGS = ("cp932", "gb18030", "big5", "euc_kr", "cp1251", "cp1252", "cp850", "cp437")


class NoSuchNameError(Exception):
    """No file has the name, or several might be meant; the message is the reason."""


class AmbiguousNameError(NoSuchNameError):
    """Several files might be meant."""


class Names:
    """Names of files that can be looked up.

    Args:
        names: relative POSIX paths; bytes that are not UTF-8 stand as surrogates, as `os.fsdecode` gives
        them.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = set(names)
        self._composed: dict[str, list[str]] = defaultdict(list)
        self._folded: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self._names):
            self._composed[_composed(name)].append(name)
            self._folded[_folded(name)].append(name)

    def find(self, wanted: str) -> str:
        """The name that ``wanted`` means: itself, or the only one that it can stand for.

        Raises:
            NoSuchNameError: if there is none; AmbiguousNameError, one of its kind, if there are several.
        """
        tidied = tidied_path(wanted)
        if wanted.strip().endswith(("/", "\\")):
            raise NoSuchNameError("no such file, but the name of a folder")
        for exact in (wanted, tidied):
            if exact in self._names:
                return exact
        for alike in (self._composed.get(_composed(tidied)), self._folded.get(_folded(tidied))):
            if alike and len(alike) == 1:
                return alike[0]
            if alike:
                shown = ", ".join(repr(as_text(name)) for name in alike)
                raise AmbiguousNameError(f"no such file, but several that are alike: {shown}")
        for encoding in () if tidied.isascii() else ENCODINGS:
            with contextlib.suppress(UnicodeError):  # the encoding has not these letters
                if (encoded := os.fsdecode(tidied.encode(encoding))) in self._names:
                    return encoded
        raise NoSuchNameError("no such file")


def tidied_path(name: str) -> str:
    """A path of a table as a relative POSIX path, with slashes alone, no blanks around it, no ``../``."""
    return posixpath.normpath(name.strip().replace("\\", "/"))


def leaves_folder(name: str) -> bool:
    """Whether a path, as tables write it, leads out of the folder."""
    path = tidied_path(name)
    return posixpath.isabs(path) or path.split("/")[0] == ".." or path[1:2] == ":"


def as_text(name: str) -> str:
    """A name of a file as UTF-8 can hold it; bytes that are none stand escaped, ``\\x94``."""
    try:
        return os.fsencode(name).decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # no name of a file, but half a surrogate pair of a table
        return name


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", tidied_path(name))


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", _composed(name).casefold())
