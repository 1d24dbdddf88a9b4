"""Tars, plain and compressed: damaged, cut, joined, of another kind than they say, with members that are no files."""

from __future__ import annotations

import bz2
import functools
import gzip
import io
import lzma
import random
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence

from tests.bad_inputs.cases import (
    GOOD,
    GOOD_FILES,
    REFUSED,
    REJECTED,
    TAKEN,
    Case,
    Row,
    files_of,
    flipped,
    picture,
    put,
    rows,
    single,
)

KIND = "archives"
BLOCK = tarfile.BLOCKSIZE
MANY = rows(100)  # 200 members
FIELDS = {"name": 1, "mode": 101, "size": 132, "time": 140, "checksum": 150, "type": 156, "magic": 258}
PACKERS: dict[str, Callable[[bytes], bytes]] = {
    "gz": functools.partial(gzip.compress, mtime=0),
    "bz2": bz2.compress,
    "xz": lzma.compress,
}
_SEVEN_ZIP, _RAR = b"7z\xbc\xaf\x27\x1c\0\4", b"Rar!\x1a\x07\x01\0"


def tar(
    files: Mapping[str, bytes], kind: int = tarfile.USTAR_FORMAT, others: Sequence[tarfile.TarInfo] = ()
) -> bytes:
    """A tar of files, then of other members without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), 10**9
            archive.addfile(member, io.BytesIO(content))
        for member in others:
            archive.addfile(member)
    return buffer.getvalue()


@functools.cache
def many() -> bytes:
    return tar(files_of(MANY))


@functools.cache
def places() -> list[tuple[int, int]]:
    """(offset of the header, offset of the content) of each member of `many`, and of its end."""
    with tarfile.open(fileobj=io.BytesIO(many())) as archive:
        members = archive.getmembers()
    last = members[-1]
    end = last.offset_data + -(-last.size // BLOCK) * BLOCK
    return [*((member.offset, member.offset_data) for member in members), (end, end)]


def cases() -> Iterator[Case]:
    yield from _flipped_headers()
    yield from _cut()
    yield from _streams()
    yield from _joined()
    yield from _of_another_kind()
    yield from _unusual()
    yield from _members()


def _case(
    name: str,
    file: str,
    content: Callable[[], bytes] | bytes,
    *may: str,
    says: tuple[str, ...] = (),
    **values: object,
) -> Case:
    good = values.pop("good", MANY)
    return Case(KIND, name, single(file, content), may or (REFUSED,), good, says=says, **values)  # type: ignore[arg-type]


def _flipped_headers() -> Iterator[Case]:
    def damaged(member: int, field: str) -> bytes:
        return flipped(many(), places()[member][0] + FIELDS[field], 1)

    for member, fields in (
        (0, ("name", "size", "checksum", "type")),
        (60, tuple(FIELDS)),
        (199, ("name", "size")),
    ):
        for field in fields:
            make = functools.partial(damaged, member, field)
            yield _case(f"tar, header of member {member}, {field} flipped", "set.tar", make)
    for suffix, packer in PACKERS.items():
        for member in (0, 60):
            yield _case(
                f"tar.{suffix}, header of member {member} flipped before it was packed",
                f"set.tar.{suffix}",
                lambda packer=packer, member=member: packer(damaged(member, "name")),
            )
    yield _case("tar, header of member 60 zeroed", "set.tar", lambda: _zeroed(places()[60][0], BLOCK))
    yield _case(
        "tar, two blocks in the middle zeroed", "set.tar", lambda: _zeroed(places()[60][0], 2 * BLOCK)
    )


def _zeroed(start: int, count: int) -> bytes:
    return many()[:start] + bytes(count) + many()[start + count :]


def _cut() -> Iterator[Case]:
    cuts: dict[str, Callable[[], int]] = {
        "after member 0": lambda: places()[1][0],
        "after member 9": lambda: places()[10][0],
        "after member 59": lambda: places()[60][0],
        "in the header of member 60": lambda: places()[60][0] + 100,
        "after the header of member 60": lambda: places()[60][1],
        "in the content of member 60": lambda: places()[60][1] + 20,
        "before its end": lambda: places()[-1][0],
        "in its first block of zeros": lambda: places()[-1][0] + 100,
        "after its first block of zeros": lambda: places()[-1][0] + BLOCK,
    }
    for name, end in cuts.items():
        yield _case(f"tar, cut {name}", "set.tar", lambda end=end: many()[: end()])
    for suffix, packer in PACKERS.items():
        for name in ("after member 59", "before its end"):
            end = cuts[name]
            yield _case(
                f"tar.{suffix}, cut {name} before it was packed",
                f"set.tar.{suffix}",
                lambda packer=packer, end=end: packer(many()[: end()]),
            )
    yield _case(
        "tar, two blocks of zeros and no padding",
        "set.tar",
        lambda: many()[: places()[-1][0] + 2 * BLOCK],
        TAKEN,
    )


def _streams() -> Iterator[Case]:
    """Compressed streams cut and flipped."""
    for suffix, packer in PACKERS.items():
        file = "set.tgz" if suffix == "gz" else f"set.tar.{suffix}"
        for name, part in (("at a quarter", 4), ("at half", 2)):
            yield _case(
                f"{file}, cut {name}",
                file,
                lambda packer=packer, part=part: (lambda x: x[: len(x) // part])(packer(many())),
            )
        for count in (1, 8):
            yield _case(
                f"{file}, last {count} bytes cut",
                file,
                lambda packer=packer, count=count: packer(many())[:-count],
            )
        for name, share in (("a quarter", 0.25), ("half", 0.5), ("three quarters", 0.75)):
            yield _case(
                f"{file}, bit at {name} flipped",
                file,
                lambda packer=packer, share=share: (lambda x: flipped(x, int(len(x) * share), 3))(
                    packer(many())
                ),
            )
    for name, suffix, place in (
        ("CRC in the trailer", "gz", -6),
        ("length in the trailer", "gz", -2),
        ("method in the header", "gz", 2),
        ("magic", "gz", 0),
        ("CRC of the stream", "bz2", -3),
        ("block size in the header", "bz2", 3),
        ("magic of the footer", "xz", -1),
        ("index", "xz", -16),
        ("flags in the header", "xz", 7),
    ):
        yield _case(
            f"tar.{suffix}, {name} flipped",
            f"set.tar.{suffix}",
            lambda suffix=suffix, place=place: flipped(PACKERS[suffix](many()), place, 1),
        )
    yield _case(
        "tar.gz, time in the header flipped", "set.tar.gz", lambda: flipped(PACKERS["gz"](many()), 5), TAKEN
    )


def _joined() -> Iterator[Case]:
    def noise(count: int) -> bytes:
        return random.Random(count).randbytes(count)

    yield _case("tar, a second one behind", "set.tar", lambda: many() + many())
    yield _case("tar, another one behind", "set.tar", lambda: many() + tar(GOOD_FILES))
    yield _case("tar, text behind", "set.tar", lambda: many() + b"garbage")
    yield _case("tar, noise behind", "set.tar", lambda: many() + noise(3000))
    yield _case("tar, noise in front", "set.tar", lambda: noise(BLOCK) + many())
    yield _case("tar, noise instead of padding", "set.tar", lambda: many()[:-500] + noise(500))
    for suffix, packer in PACKERS.items():
        file = f"set.tar.{suffix}"
        yield _case(f"tar.{suffix}, a second one behind", file, lambda packer=packer: packer(many()) * 2)
        may = (
            (REFUSED,) if suffix == "gz" else (REFUSED, TAKEN)
        )  # of the others what is behind belongs to nobody
        yield _case(
            f"tar.{suffix}, text behind", file, lambda packer=packer: packer(many()) + b"garbage", *may
        )
        yield _case(
            f"tar.{suffix}, packed in two streams",
            file,
            lambda packer=packer: packer(many()[:5000]) + packer(many()[5000:]),
            TAKEN,
        )
    yield _case("tar.gz, zeros behind", "set.tar.gz", lambda: PACKERS["gz"](many()) + bytes(100), TAKEN)


def _of_another_kind() -> Iterator[Case]:
    either = (TAKEN, REFUSED)
    yield _case("tar.gz called .tar", "set.tar", lambda: PACKERS["gz"](many()), *either)
    yield _case("tar called .tar.gz", "set.tar.gz", many, *either)
    yield _case("tar.bz2 called .tgz", "set.tgz", lambda: PACKERS["bz2"](many()), *either)
    yield _case("tar.xz called .tar.bz2", "set.tar.bz2", lambda: PACKERS["xz"](many()), *either)
    yield _case("tar called .zip", "set.zip", many, *either)
    yield _case("tar packed twice", "set.tar.gz", lambda: PACKERS["gz"](PACKERS["gz"](many())))
    for suffix in ("tar", "tar.gz", "tgz", "tar.bz2", "tar.xz", "zip"):
        yield _case(f".{suffix} without a byte", f"set.{suffix}", b"")
    yield _case(".tar of zeros", "set.tar", bytes(10240))
    yield _case(".tar.gz of nothing", "set.tar.gz", gzip.compress(b"", mtime=0))
    yield _case(".tar that is text", "set.tar", b"no archive\n" * 100)
    yield _case(".tar.gz that is a page", "set.tar.gz", b"<!DOCTYPE html><html><title>404</title></html>")
    yield _case(".zip that is a RAR", "set.zip", _RAR + bytes(200))
    yield _case(".tar that is a 7z", "set.tar", _SEVEN_ZIP + bytes(2000))


def _unusual() -> Iterator[Case]:
    """Good tars that are seldom."""
    files = GOOD_FILES
    long = {f"{'deep/' * 40}{name}": row for name, row in GOOD.items()}
    for name, kind in (("GNU", tarfile.GNU_FORMAT), ("PAX", tarfile.PAX_FORMAT)):
        packed = tar(files_of(long), kind)
        kept = {f"deep/{key.removeprefix('deep/')}": row for key, row in long.items()}
        cut = {key.removeprefix("deep/"): row for key, row in kept.items()}  # one top folder is left out
        yield _case(f"{name} tar, long names", "set.tar", packed, TAKEN, good=cut)
    accented = {f"é{name}": row for name, row in GOOD.items()}
    yield _case(
        "PAX tar, accents",
        "set.tar.gz",
        PACKERS["gz"](tar(files_of(accented), tarfile.PAX_FORMAT)),
        TAKEN,
        good=accented,
    )
    yield _case(
        "v7 tar, no magic",
        "set.tar",
        _with_checksums(lambda head: put(head, 257, "8s", bytes(8))),
        TAKEN,
        good=GOOD,
    )
    hidden = {"._000.png": b"AppleDouble", "__MACOSX/._000.png": b"AppleDouble", ".DS_Store": b"x"}
    yield _case("tar with macOS's files", "set.tar", tar({**files, **hidden}), TAKEN, good=GOOD)
    base_256 = _with_checksums(lambda head: put(head, 124, ">B3xQ", 0x80, int(head[124:135], 8)))
    yield _case("tar with sizes in base 256", "set.tar", base_256, TAKEN, good=GOOD)


def _with_checksums(change: Callable[[bytes], bytes], only: int | None = None) -> bytes:
    """A small tar with headers changed, each with a right checksum."""
    content = tar(GOOD_FILES)
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        members = archive.getmembers()
    for number, member in enumerate(members):
        if only in (None, number):
            head = put(change(content[member.offset : member.offset + BLOCK]), 148, "8s", b" " * 8)
            head = put(head, 148, "8s", f"{sum(head):06o}\0 ".encode())
            content = content[: member.offset] + head + content[member.offset + BLOCK :]
    return content


def _members() -> Iterator[Case]:
    def added(name: str, kind: bytes, target: str = "") -> bytes:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, target
        return tar(GOOD_FILES, others=[member])

    for file in ("set.tar", "set.tar.gz"):
        pack = PACKERS["gz"] if file.endswith("gz") else bytes
        for what, kind, target in (
            ("a link", tarfile.SYMTYPE, "000.png"),
            ("a link outside", tarfile.SYMTYPE, "/etc/passwd"),
            ("a hard link", tarfile.LNKTYPE, "000.png"),
            ("a pipe", tarfile.FIFOTYPE, ""),
            ("a device", tarfile.CHRTYPE, ""),
            ("a disk", tarfile.BLKTYPE, ""),
            ("a sparse file", tarfile.GNUTYPE_SPARSE, ""),
        ):
            yield _case(
                f"{file} with {what}", file, pack(added("003.png", kind, target)), says=("link", "device")
            )
        for name in ("/tmp/003.png", "../003.png", "a/../../003.png"):
            packed = pack(tar({**GOOD_FILES, name: b"x"}))
            yield _case(f"{file} with a member {name}", file, packed, says=("outside",))
        twice = {**GOOD_FILES, "./001.png": GOOD_FILES["000.png"]}
        yield _case(f"{file} with a member twice, once as ./", file, pack(tar(twice)), says=("twice",))
        again = _appended(GOOD_FILES, {"001.txt": b"another caption"})
        yield _case(f"{file} with a member twice", file, pack(again), says=("twice",))
    yield _case(
        "tar, a size of 8 GiB that is not there",
        "set.tar",
        _with_checksums(lambda h: put(h, 124, "11s", b"77777777777"), 2),
    )
    yield _case(
        "tar, a size of 2**62", "set.tar", _with_checksums(lambda h: put(h, 124, ">B3xQ", 0x80, 2**62), 2)
    )
    yield _case(
        "tar, a size below zero", "set.tar", _with_checksums(lambda h: put(h, 124, "12s", b"\xff" * 12), 2)
    )
    yield _case(
        "tar, a size that is no number",
        "set.tar",
        _with_checksums(lambda h: put(h, 124, "12s", b"size unknown"), 2),
    )
    broken = {**GOOD_FILES, "003.png": flipped(GOOD_FILES["000.png"], 60), "003.txt": b"broken"}
    yield _case(
        "tar, a bit of a picture flipped",
        "set.tar",
        tar(broken),
        REJECTED,
        good=GOOD,
        odd=("003.png",),
        says=("broken",),
    )
    backslash = {"sub\\003.png": GOOD_FILES["000.png"], "sub\\003.txt": b"in a folder"}
    row = Row(("in a folder",), picture(0), also=("sub/003.png",))
    yield _case(
        "tar.gz, names with backslashes", "set.tar.gz", PACKERS["gz"](tar({**GOOD_FILES, **backslash})), TAKEN,
        good=GOOD, bad={"sub\\003.png": row},
    )  # fmt: skip


def _appended(first: Mapping[str, bytes], second: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, content in [*first.items(), *second.items()]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
