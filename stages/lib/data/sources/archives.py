"""Archives, read to their end and verified: unpacked where they are compressed, indexed where they are plain
tars.

A tar has a checksum in each header and two blocks of zeros at its end. A reader that stops at the first
damaged header, as tar readers do, takes a part for the whole: here that is an error. What is compressed has
checksums at its end, which are only looked at by who reads as far.
"""

from __future__ import annotations

import bz2
import contextlib
import errno
import gzip
import itertools
import lzma
import os
import re
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from stages.lib.frame.errors import StageError

COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
SUFFIXES = (".tar", *COMPRESSED_TARS, ".zip")
_BLOCK = tarfile.BLOCKSIZE
_CHUNK = 2**20
_MAX_END_BYTES = 22 + 2**16  # the record at a zip's end, and its comment
_MAX_NAME_BYTES = 255
_ZIP_HEADER_BYTES = 30  # of a member, without its name
_UTF8_FLAG = 0x800  # of a zip's member
_OURS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES)  # the machine's troubles, not the archive's
# gzip, bzip2, xz by their first bytes: a suffix may be wrong.
_OPENERS = ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ\0", lzma.open))


def is_archive(path: str) -> bool:
    """Whether the name says that it is an archive of a kind that is read."""
    return path.lower().endswith(SUFFIXES)


def is_plain_tar(path: Path) -> bool:
    """Whether it is a tar that is not compressed, whose members can be read in place."""
    if path.name.lower().endswith(".zip"):
        return False
    with open(path, "rb") as file:
        first = file.read(8)
    return not any(first.startswith(magic) for magic, _ in _OPENERS)


def tar_members(archive: Path, shown: Path) -> list[tuple[str, int, int]]:
    """(name, offset of its bytes, size) of each file in a plain tar, after a look at all of it.

    Raises:
        StageError: if it is damaged or cut, or holds what is no file or folder, a path that leaves it, or
            one name twice.
    """
    with _errors_of(shown), open(archive, "rb") as file:
        with tarfile.open(fileobj=file, mode="r:") as tape:
            members = _members(tape, shown)
            found = [(_plain(member.name), member.offset_data, member.size) for member in members]
            end = _end_of_last(tape)
        _check_end(_Reader(file), end, shown)
    return found


def extract(archive: Path, target: Path) -> None:
    """Unpack files and folders of a zip or a tar into ``target``, and verify them.

    Raises:
        StageError: if the archive is damaged, cut or encrypted, or if it has a member that is absolute,
            leaves the target, comes twice, or is anything but a file or a folder (a link or a device).
    """
    with _errors_of(archive):
        if archive.name.lower().endswith(".zip"):
            _extract_zip(archive, target)
        else:
            with open(archive, "rb") as file:
                first = file.read(8)
            opener = next((opener for magic, opener in _OPENERS if first.startswith(magic)), open)
            with opener(archive, "rb") as stream:
                _extract_tar(stream, archive, target)


@contextlib.contextmanager
def _errors_of(shown: Path) -> Iterator[None]:
    """What the archive modules raise for damaged files, a dozen types, as one error."""
    try:
        yield
    except StageError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OURS:
            raise
        reason = "out of memory" if isinstance(error, MemoryError) else str(error) or type(error).__name__
        raise StageError(
            f"{shown}: cannot be unpacked ({reason}); nothing of it is used: make or fetch the archive again"
        ) from error


def _extract_tar(stream: Any, archive: Path, target: Path) -> None:
    reader = _Reader(stream)
    with tarfile.open(fileobj=reader, mode="r:") as tape:  # type: ignore[call-overload]  # has what is asked of it
        tape.extractall(target, members=_members(tape, archive), filter="data")
        end = _end_of_last(tape)
    _check_end(reader, end, archive)


class _Reader:
    """A stream that knows what it read last: going back in a compressed one means to begin anew."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._last, self._end = b"", 0

    def read(self, size: int = -1) -> bytes:
        self._last = self._stream.read(size)
        self._end += len(self._last)
        return self._last

    def seek(self, position: int) -> None:
        self._end = self._stream.seek(position)
        self._last = b""

    def tell(self) -> int:
        return self._end

    def read_on_from(self, position: int) -> Iterator[bytes]:
        """All bytes from ``position`` to the end."""
        start = self._end - len(self._last)
        if start <= position <= self._end:
            yield self._last[position - start :]
        else:
            self.seek(position)
        while chunk := self.read(_CHUNK):
            yield chunk


def _members(tape: tarfile.TarFile, archive: Path) -> Iterator[tarfile.TarInfo]:
    """The files of a tar; folders are passed over, for files make theirs."""
    names: set[str] = set()
    for member in tape:
        _check(archive, member.name, is_plain=(member.isreg() and not member.issparse()) or member.isdir())
        if member.isdir():
            continue
        if _plain(member.name) in names:
            raise StageError(
                f"{archive}: member {member.name!r} comes twice, expected each once; make it again"
            )
        names.add(_plain(member.name))
        yield member


def _end_of_last(tape: tarfile.TarFile) -> int:
    """Where the members end: what follows should be zeros."""
    members = tape.getmembers()
    if not members:
        return 0
    last = members[-1]
    return last.offset_data + -(-last.size // _BLOCK) * _BLOCK if last.isreg() else last.offset_data


def _check_end(reader: _Reader, end: int, archive: Path) -> None:
    """Read on to the end of the file, which verifies the checksums of a compressed one."""
    num_zeros = 0
    for chunk in reader.read_on_from(end):
        if chunk.strip(b"\0"):
            raise StageError(
                f"{archive}: damaged at byte {end} or behind it: expected a member's header or "
                "zeros to the end "
                "(two archives in one file are joined with `tar --concatenate`); nothing of it is used: "
                "make or fetch the archive again"
            )
        num_zeros += len(chunk)
    if num_zeros < 2 * _BLOCK:
        raise StageError(
            f"{archive}: cut at byte {end}: expected two blocks of zeros at its end; nothing of it is used: "
            "make or fetch the archive again"
        )


def _extract_zip(archive: Path, target: Path) -> None:
    names: set[str] = set()
    with zipfile.ZipFile(archive) as bundle:
        members = bundle.infolist()
        if (count := _number_in_directory(bundle)) != len(members) % 2**16:
            raise StageError(
                f"{archive}: damaged: expected {count} members, as its end says, found "
                f"{len(members)}; nothing of it is "
                "used: make or fetch the archive again"
            )
        if members and min(member.header_offset for member in members) != 0:
            raise StageError(
                f"{archive}: bytes stand in front of its first member, perhaps another archive; "
                "nothing of it is used: "
                "make the archive again"
            )
        _check_places(archive, members)
        for member in members:
            name = _zip_name(member)
            kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where the archive was not made on Unix
            _check(archive, name, is_plain=kind in (0, stat.S_IFREG, stat.S_IFDIR))
            if name.endswith("/"):
                continue
            if _plain(name) in names:
                raise StageError(f"{archive}: member {name!r} comes twice, expected each once; make it again")
            names.add(_plain(name))
            _write_member(bundle, member, target / _plain(name))


def _check_places(archive: Path, members: list[zipfile.ZipInfo]) -> None:
    """Raise StageError if a member lies inside another, as in archives made to be larger than they are."""
    ordered = sorted(members, key=lambda member: member.header_offset)
    for member, following in itertools.pairwise(ordered):
        if member.header_offset + _ZIP_HEADER_BYTES + member.compress_size > following.header_offset:
            raise StageError(
                f"{archive}: member {following.filename!r} lies inside of {member.filename!r}; "
                "nothing of it is used: "
                "make the archive again"
            )


def _number_in_directory(bundle: zipfile.ZipFile) -> int:
    """What the record at a zip's end says, modulo 2 ** 16: `zipfile` does not look at it."""
    assert bundle.fp is not None
    bundle.fp.seek(0, os.SEEK_END)
    bundle.fp.seek(max(0, bundle.fp.tell() - _MAX_END_BYTES))
    end = bundle.fp.read()
    record = end[end.rindex(b"PK\5\6") :]
    return int.from_bytes(record[10:12], "little")


def _write_member(bundle: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with bundle.open(member) as packed, open(path, "wb") as file:
            while chunk := packed.read(_CHUNK):
                file.write(chunk)
    except MemoryError as error:  # a damaged LZMA member asks for as much as its header says
        raise zlib.error(f"member {member.filename!r} is damaged") from error
    if path.stat().st_size != member.file_size:
        raise zlib.error(f"member {member.filename!r} is shorter than {member.file_size} bytes")


def _zip_name(member: zipfile.ZipInfo) -> str:
    """A member's name with slashes; bytes that are not UTF-8 stand as on a disk.

    Where the flag of UTF-8 is not set, `zipfile` reads code page 437; most archives hold UTF-8 all the same.
    """
    name = member.orig_filename.split("\0")[0]
    if not member.flag_bits & _UTF8_FLAG:
        name = os.fsdecode(name.encode("cp437"))
    return name.replace("\\", "/")


def _plain(name: str) -> str:
    return PurePosixPath(name).as_posix()


def _check(archive: Path, name: str, *, is_plain: bool) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", name):
        raise StageError(f"{archive}: member {name!r} points outside the archive; nothing of it is used")
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > _MAX_NAME_BYTES:
        raise StageError(
            f"{archive}: member {name!r} has a name of {longest} bytes, expected at most {_MAX_NAME_BYTES}, "
            "as files may have; nothing of it is used: make the archive with shorter names"
        )
    if not is_plain:
        raise StageError(
            f"{archive}: member {name!r} is a link or a device, expected files and folders alone; "
            "make the archive with links resolved (tar --dereference --hard-dereference)"
        )
