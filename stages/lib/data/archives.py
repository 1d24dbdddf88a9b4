"""Unpack an archive so that nothing is written outside the target."""

from __future__ import annotations

import errno
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from stages.lib.frame.errors import StageError

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
ZIP_SUFFIXES = (".zip",)


def is_archive(path: Path) -> bool:
    """Whether the name says that it is an archive of a kind that is read."""
    return path.name.lower().endswith(TAR_SUFFIXES + ZIP_SUFFIXES)


def extract(archive: Path, target: Path) -> None:
    """Unpack files and folders of a .tar, .tar.gz, .tgz or .zip into ``target``.

    Raises:
        StageError: if the archive is damaged or encrypted, or if it has a member that is absolute,
            leaves the target, or is anything but a file or a folder (a link or a device).
    """
    try:
        if archive.name.lower().endswith(ZIP_SUFFIXES):
            with zipfile.ZipFile(archive) as bundle:
                for member in _safe_zip_members(archive, bundle):
                    bundle.extract(member, target)
        else:
            with tarfile.open(archive) as bundle_of_tape:
                members = _safe_tar_members(archive, bundle_of_tape)
                bundle_of_tape.extractall(target, members=members, filter="data")
    except (StageError, MemoryError):
        raise
    except Exception as error:  # the two modules and their decoders raise a dozen types for damaged files
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
            raise
        raise StageError(f"{archive}: cannot be unpacked ({error}); make the archive again") from error


def _safe_tar_members(archive: Path, bundle: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    for member in bundle:
        _check(archive, member.name, is_plain=member.isreg() or member.isdir())
        yield member


def _safe_zip_members(archive: Path, bundle: zipfile.ZipFile) -> Iterator[zipfile.ZipInfo]:
    for member in bundle.infolist():
        kind = stat.S_IFMT(member.external_attr >> 16)  # 0 where the archive was not made on Unix
        _check(archive, member.filename, is_plain=kind in (0, stat.S_IFREG, stat.S_IFDIR))
        yield member


def _check(archive: Path, name: str, *, is_plain: bool) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise StageError(f"{archive}: member {name!r} points outside the archive; nothing of it is used")
    if not is_plain:
        raise StageError(
            f"{archive}: member {name!r} is a link or a device, expected files and folders alone; "
            "make the archive with links resolved (tar --dereference --hard-dereference)"
        )
