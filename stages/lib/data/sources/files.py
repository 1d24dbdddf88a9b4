"""The files of a source: those of a folder, and the members of plain tars, which are read in place.

Links to files are followed. A link to a folder is refused: DVC does not look behind it, so that a change
there would go unnoticed. What is no file (a pipe, a socket, a device, a link to nothing) is known by name
and never opened: reading from a pipe would wait for ever.
"""

from __future__ import annotations

import io
import os
import posixpath
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from stages.lib.data.sources.archives import tar_members
from stages.lib.data.sources.names import Names, as_text
from stages.lib.frame.errors import StageError, some

TAR = ".tar"
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class _Member(NamedTuple):
    archive: Path
    offset: int
    size: int


@dataclass
class Files:
    """Files by their paths in the source.

    Attributes:
        root: the folder.
        shown: what errors call it.
        names: paths of all files, sorted; of a member of ``a.tar`` it is ``a.tar/member``.
        odd: path -> what it is, of entries that are no files.
        bound: a text that is a link must lead to a file below this folder; None where any may be read.
    """

    root: Path
    shown: Path
    names: list[str]
    odd: dict[str, str]
    bound: Path | None
    _members: dict[str, _Member] = field(default_factory=dict)

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            OSError: if it cannot be read.
        """
        member = self._members.get(name)
        if member is None:
            return (self.root / name).read_bytes()
        with open(member.archive, "rb") as archive:
            archive.seek(member.offset)
            return archive.read(member.size)

    def open(self, name: str) -> BinaryIO:
        """As `read`, opened, for what need not be read as a whole."""
        return io.BytesIO(self.read(name)) if name in self._members else open(self.root / name, "rb")

    def size(self, name: str) -> int:
        """Bytes of a file."""
        member = self._members.get(name)
        return (self.root / name).stat().st_size if member is None else member.size

    def is_on_disk(self, name: str) -> bool:
        """Whether it is a file of its own, and not a member of a tar."""
        return name not in self._members

    def lies_inside(self, name: str) -> bool:
        """Whether a text, links resolved, lies in the source: none of elsewhere becomes a caption."""
        if self.bound is None or name in self._members:
            return True
        path = self.root / name
        if not os.path.islink(path):  # nor is a folder above it
            return True
        try:
            return path.resolve().is_relative_to(self.bound.resolve())
        except (OSError, RuntimeError):  # a loop of links
            return False

    def lookup(self) -> Names:
        """By which names are found, those of odd entries among them."""
        return Names([*self.names, *self.odd])


def files_of_folder(
    root: Path, shown: Path | None = None, bound: Path | None = None, only: Iterable[str] | None = None
) -> Files:
    """Every file below a folder, and the members of every plain tar among them.

    Names that start with ``.`` and ``__MACOSX`` are no part of it.

    Args:
        root: the folder.
        shown: what errors call it; itself where that is None.
        bound: below which links to texts may lead; None is the folder itself.
        only: paths of the files to take; None takes all.

    Raises:
        StageError: if a folder below it is a link, or a tar is damaged.
    """
    files = Files(root, shown or root, [], {}, bound or root)
    links: list[str] = []
    _walk(root, files, links)
    if links:
        raise StageError(
            f"{files.shown}: {some(sorted(links))}: found a link to a folder, and DVC would not "
            "notice a change behind it; "
            "put the folder itself there, or name it as a source of its own"
        )
    if only is not None:
        chosen = set(only)
        files.names = [name for name in files.names if name in chosen]
    for name in [name for name in files.names if name.lower().endswith(TAR)]:
        _mount(files, name, files.shown / as_text(name))
    files.names.sort()
    return files


def files_of_tar(archive: Path) -> Files:
    """The members of a plain tar as those of a folder; names leave out a single top-level folder."""
    files = Files(archive.parent, archive, [archive.name], {}, None)
    _mount(files, archive.name, archive)
    top = _single_folder(name.split("/", 1)[1] for name in files.names)
    prefix = f"{archive.name}/{top}/" if top else f"{archive.name}/"
    files._members = {name.removeprefix(prefix): member for name, member in files._members.items()}
    files.names = sorted(name.removeprefix(prefix) for name in files.names)
    return files


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _walk(root: Path, files: Files, links: list[str]) -> None:
    waiting = [""]
    while waiting:
        below = waiting.pop()
        with os.scandir(root / below) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                name = posixpath.join(below, entry.name)
                if entry.is_file(follow_symlinks=False):
                    files.names.append(name)
                elif entry.is_dir(follow_symlinks=False):
                    waiting.append(name)
                else:
                    _take_odd(files, links, name, entry)


def _take_odd(files: Files, links: list[str], name: str, entry: os.DirEntry[str]) -> None:
    """A link, or what is no file."""
    try:
        mode = entry.stat().st_mode  # of what a link leads to
    except OSError:
        files.odd[name] = "a link to nothing"
        return
    if stat.S_ISREG(mode):
        files.names.append(name)
    elif stat.S_ISDIR(mode):
        links.append(name)
    else:
        files.odd[name] = _KINDS.get(stat.S_IFMT(mode), "no file")


def _mount(files: Files, name: str, shown: Path) -> None:
    """Put a tar's members in its place."""
    path = files.root / name
    files.names.remove(name)
    for member, offset, size in tar_members(path, shown):
        if any(map(is_hidden, member.split("/"))):
            continue
        inside = f"{name}/{member}"
        files._members[inside] = _Member(path, offset, size)
        files.names.append(inside)


def _single_folder(names: Iterable[str]) -> str:
    """The folder in which all of these lie, "" if there is none."""
    tops = {name.split("/")[0] if "/" in name else "" for name in names}
    return tops.pop() if len(tops) == 1 else ""
