"""Zips: damaged in every structure that they have, cut, joined, encrypted, overlapping, with unusual members."""

from __future__ import annotations

import functools
import io
import random
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

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
    put,
    rows,
    single,
)

KIND = "archives"
MANY = rows(100)  # 200 members
# Bytes of a field that matter, from the start of its record (APPNOTE.TXT 4.3.7, 4.3.12, 4.3.16).
LOCAL = {"signature": 0, "name length": 26, "name": 31, "extra length": 28}
LOCAL_UNREAD = {"time": 10, "CRC": 14, "size": 22}  # the directory has them too
CENTRAL = {"signature": 1, "flags": 8, "method": 10, "CRC": 17, "packed size": 20, "size": 24, "name length": 28,
           "offset": 42, "name": 47}  # fmt: skip
END = {"signature": 1, "number of members": 10, "size of the directory": 12, "offset of the directory": 16}


class Places(NamedTuple):
    """Offsets of the members' local headers, of their contents, of their entries, and of the end record."""

    local: list[int]
    content: list[int]
    central: list[int]
    end: int


def packed(
    files: Mapping[str, bytes],
    method: int = zipfile.ZIP_DEFLATED,
    more: Mapping[zipfile.ZipInfo, bytes] | None = None,
) -> bytes:
    """A zip of files, and of members as they are described."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle:
        for name, content in files.items():
            bundle.writestr(member(name), content, method)
        for info, content in (more or {}).items():
            bundle.writestr(info, content, method)
    return buffer.getvalue()


def member(name: str, mode: int = stat.S_IFREG | 0o644) -> zipfile.ZipInfo:
    """A description that keeps backslashes, which `zipfile` else replaces on Windows alone."""
    info = zipfile.ZipInfo(name, (2020, 1, 2, 3, 4, 6))
    info.filename = name
    info.external_attr = mode << 16
    info.create_system = 3
    return info


@functools.cache
def many(method: int = zipfile.ZIP_DEFLATED) -> bytes:
    return packed(files_of(MANY), method)


def places(content: bytes) -> Places:
    end = content.rindex(b"PK\5\6")
    count, _, start = struct.unpack("<HII", content[end + 10 : end + 20])
    found = Places([], [], [], end)
    for _ in range(count):
        name, extra, comment = struct.unpack("<HHH", content[start + 28 : start + 34])
        (local,) = struct.unpack("<I", content[start + 42 : start + 46])
        lengths = struct.unpack("<HH", content[local + 26 : local + 30])
        found.local.append(local)
        found.content.append(local + 30 + sum(lengths))
        found.central.append(start)
        start += 46 + name + extra + comment
    return found


def cases() -> Iterator[Case]:
    yield from _flipped()
    yield from _damaged_contents()
    yield from _cut_and_joined()
    yield from _members()
    yield from _lies()
    yield from _unusual()
    yield from _bombs()


def _case(
    name: str, content: Callable[[], bytes] | bytes, *may: str, says: tuple[str, ...] = (), **values: object
) -> Case:
    good = values.pop("good", MANY)
    return Case(
        KIND, f"zip, {name}", single("set.zip", content), may or (REFUSED,), good, says=says, **values
    )  # type: ignore[arg-type]


def _flipped() -> Iterator[Case]:
    def damaged(record: str, number: int, offset: int) -> bytes:
        where = places(many())
        start = where.end if record == "end" else getattr(where, record)[number]
        return flipped(many(), start + offset)

    for number in (0, 60, 199):
        for field, offset in LOCAL.items():
            yield _case(
                f"local {field} of member {number} flipped",
                functools.partial(damaged, "local", number, offset),
            )
    for field, offset in LOCAL_UNREAD.items():
        yield _case(
            f"local {field} of member 60 flipped",
            functools.partial(damaged, "local", 60, offset),
            REFUSED,
            TAKEN,
        )
    for field, offset in CENTRAL.items():
        may = (
            (REFUSED, TAKEN) if field == "packed size" else ()
        )  # each member ends by itself, and has a checksum
        yield _case(
            f"{field} of member 60 in the directory flipped",
            functools.partial(damaged, "central", 60, offset),
            *may,
        )
    for field, offset in END.items():
        yield _case(f"{field} in the end record flipped", functools.partial(damaged, "end", 0, offset))


def _damaged_contents() -> Iterator[Case]:
    names = {
        zipfile.ZIP_STORED: "stored",
        zipfile.ZIP_DEFLATED: "deflated",
        zipfile.ZIP_BZIP2: "bzip2",
        zipfile.ZIP_LZMA: "LZMA",
    }

    def damaged(method: int, number: int, offset: int, bit: int) -> bytes:
        content = many(method)
        return flipped(content, places(content).content[number] + offset, bit)

    for method, name in names.items():
        for number, offset in ((0, 40), (60, 20), (60, 60), (198, 30)):
            yield _case(
                f"bit {offset} bytes into {name} member {number} flipped",
                functools.partial(damaged, method, number, offset, 2),
            )
    yield _case(
        "dictionary size of an LZMA member flipped",
        functools.partial(damaged, zipfile.ZIP_LZMA, 60, 8, 6),
        REFUSED,
        TAKEN,
    )
    yield _case(
        "caption in a stored member changed", functools.partial(damaged, zipfile.ZIP_STORED, 61, 3, 1)
    )


def _cut_and_joined() -> Iterator[Case]:
    yield _case("cut at half", lambda: many()[: len(many()) // 2])
    yield _case("cut after member 59", lambda: many()[: places(many()).local[60]])
    yield _case("cut before its directory", lambda: many()[: places(many()).central[0]])
    yield _case("cut in its directory", lambda: many()[: places(many()).central[100]])
    yield _case("cut before its end record", lambda: many()[: places(many()).end])
    yield _case("last byte cut", lambda: many()[:-1])
    yield _case("a part in the middle cut out", lambda: many()[:4000] + many()[4500:])
    yield _case("a second one behind", lambda: many() * 2)
    yield _case("another one behind", lambda: packed(GOOD_FILES) + many())
    yield _case("another one in front", lambda: many() + packed(GOOD_FILES))
    yield _case("text behind", lambda: many() + b"garbage", REFUSED, TAKEN)
    yield _case("noise behind", lambda: many() + random.Random(1).randbytes(70_000))
    yield _case("text in front", lambda: b"#!/bin/sh\nexit\n" + many())
    yield _case("its end record alone", b"PK\5\6" + bytes(18))
    yield _case(
        "one of several volumes", lambda: put(many(), places(many()).end + 4, "<HH", 1, 1), REFUSED, TAKEN
    )


def _members() -> Iterator[Case]:
    for what, mode in (
        ("a link", stat.S_IFLNK),
        ("a pipe", stat.S_IFIFO),
        ("a device", stat.S_IFCHR),
        ("a socket", stat.S_IFSOCK),
    ):
        yield _case(
            f"with {what}",
            packed(GOOD_FILES, more={member("003.png", mode | 0o777): b"000.png"}),
            says=("link", "device"),
        )
    for name in ("/tmp/003.png", "../003.png", "a/../../003.png", "C:\\003.png", "C:003.png", "..\\003.png", "\\003.png",
                 "\\\\server\\share\\003.png"):  # fmt: skip
        yield _case(f"with a member {name}", packed(GOOD_FILES, more={member(name): b"x"}), says=("outside",))
    for name in ("001.txt", "./001.txt", ".\\001.txt"):
        yield _case(
            f"with a member twice, {name}",
            packed(GOOD_FILES, more={member(name): b"another"}),
            says=("twice",),
        )
    for name in ("a/\u0000b.png", "", "x" * 300 + ".png", "000.png/x.txt"):
        shown = repr(name) if len(name) < 30 else f"{len(name)} letters"
        yield _case(
            f"with a member named {shown}",
            packed(GOOD_FILES, more={member(name): b"x"}),
            REFUSED,
            REJECTED,
            TAKEN,
            good=GOOD,
        )
    inside = {f"sub\\{name}": content for name, content in GOOD_FILES.items()}
    folders = {f"sub/{name}": row for name, row in GOOD.items()}
    yield _case("names with backslashes", packed({"003.png": b"", **GOOD_FILES}, more={member(k): v for k, v in inside.items()}),
                REJECTED, good={**GOOD, **folders}, odd=("003.png",))  # fmt: skip
    yield _case(
        "names with backslashes alone",
        packed({}, more={member(k): v for k, v in inside.items()}),
        TAKEN,
        good=GOOD,
    )


def _lies() -> Iterator[Case]:
    """Headers that say what is not so."""
    small = packed(GOOD_FILES)
    where = places(small)

    def of_both(field: int, central: int, kind: str, value: int) -> bytes:
        changed = put(small, where.local[2] + field, kind, value)
        return put(changed, where.central[2] + central, kind, value)

    size = struct.unpack("<I", small[where.local[2] + 22 : where.local[2] + 26])[0]
    yield _case("encrypted", lambda: of_both(6, 8, "<H", 1), says=("encrypt", "password"))
    for method, name in ((9, "deflate64"), (14, "LZMA"), (93, "Zstandard"), (98, "PPMd"), (99, "AES")):
        yield _case(f"method {name} of another's bytes", lambda method=method: of_both(8, 10, "<H", method))
    for name, value in (
        ("one less", size - 1),
        ("one more", size + 1),
        ("0", 0),
        ("1 GiB", 2**30),
        ("4 GiB", 2**32 - 2),
    ):
        yield _case(f"size of a member says {name}", lambda value=value: of_both(22, 24, "<I", value))
    yield _case("CRC of a member says 0", lambda: of_both(14, 16, "<I", 0))
    yield _case("two names for one member", lambda: put(small, where.central[2] + 42, "<I", where.local[0]))
    yield _case("a member inside another", _overlapping)
    yield _case("offset of a member behind the end", lambda: put(small, where.central[2] + 42, "<I", 2**31))


def _overlapping() -> bytes:
    """One stored member whose content is the whole record of another, which the directory names as well."""
    inner = packed({"000.txt": b"inner"}, zipfile.ZIP_STORED)
    record = inner[: places(inner).central[0]]
    outer = packed({**GOOD_FILES, "003.txt": record}, zipfile.ZIP_STORED)
    where = places(outer)
    entry = inner[places(inner).central[0] : places(inner).end]
    entry = put(entry.replace(b"000.txt", b"004.txt"), 42, "<I", where.content[-1])
    outer = outer.replace(record, record.replace(b"000.txt", b"004.txt"))
    outer = put(outer, where.local[-1] + 14, "<I", zlib.crc32(record.replace(b"000.txt", b"004.txt")))
    outer = put(outer, where.central[-1] + 16, "<I", zlib.crc32(record.replace(b"000.txt", b"004.txt")))
    end = put(outer[where.end :], 8, "<HH", 8 - 1, 8 - 1)
    count = len(where.local) + 1
    end = put(end, 8, "<HHI", count, count, where.end - where.central[0] + len(entry))
    return outer[: where.end] + entry + end


def _unusual() -> Iterator[Case]:
    """Good zips that are seldom."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle:
        bundle.comment = b"made by hand"
        for name, content in GOOD_FILES.items():
            bundle.writestr(member(name), content)
    yield _case("with a comment", buffer.getvalue(), TAKEN, good=GOOD)
    streamed = _Unseekable()
    with zipfile.ZipFile(streamed, "w", zipfile.ZIP_DEFLATED) as bundle:  # type: ignore[call-overload]
        for name, content in GOOD_FILES.items():
            bundle.writestr(name, content)
    yield _case("streamed, sizes behind the members", bytes(streamed.content), TAKEN, good=GOOD)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle:
        for name, content in GOOD_FILES.items():
            with bundle.open(member(name), "w", force_zip64=True) as file:
                file.write(content)
    yield _case("zip64", buffer.getvalue(), TAKEN, good=GOOD)
    deep = {f"top/{name}": content for name, content in GOOD_FILES.items()}
    yield _case(
        "with entries of folders",
        packed(deep, more={member("top/", stat.S_IFDIR | 0o755): b""}),
        TAKEN,
        good=GOOD,
    )
    yield _case(
        "made on DOS, no modes",
        packed({}, more={member(k, 0): v for k, v in GOOD_FILES.items()}),
        TAKEN,
        good=GOOD,
    )
    closed = {member(k, stat.S_IFREG): v for k, v in GOOD_FILES.items()}
    yield _case("modes that let nobody read", packed({}, more=closed), TAKEN, good=GOOD)
    macos = {"__MACOSX/._000.png": b"x", "._000.txt": b"x", ".DS_Store": b"x"}
    yield _case("with macOS's files", packed({**GOOD_FILES, **macos}), TAKEN, good=GOOD)
    yield _case("with a zip inside", packed({**GOOD_FILES, "more.zip": packed(GOOD_FILES)}), TAKEN, good=GOOD)
    broken = {**GOOD_FILES, "003.png": GOOD_FILES["000.png"][:50], "003.txt": b"cut"}
    yield _case("a picture cut before it was packed", packed(broken), REJECTED, good=GOOD, odd=("003.png",))


class _Unseekable(io.RawIOBase):
    """What a zip is streamed into."""

    def __init__(self) -> None:
        self.content = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.content += data
        return len(data)


def _bombs() -> Iterator[Case]:
    """Little that becomes much; 100 MB at most, so that a reader that unpacks it shows in its time alone."""
    size = 100 * 2**20
    for name, odd, row in (
        ("a picture", "003.png", None),
        ("a caption of zeros", "003.png", Row(())),
        ("a file that nothing names", None, None),
    ):
        files = {**GOOD_FILES}
        if name == "a picture":
            files |= {"003.txt": b"a bomb", "003.png": b""}
        elif odd:
            files |= {"003.png": GOOD_FILES["000.png"], "003.txt": b""}
        target = {"a picture": "003.png", "a caption of zeros": "003.txt"}.get(name, "notes.bin")
        files.pop(target, None)
        may = (REJECTED, REFUSED) if odd else (TAKEN, REFUSED)
        make = functools.partial(_with_zeros, files, target, size)
        yield _case(f"100 MB of zeros as {name}", make, *may, good=GOOD, odd=(odd,) if odd else (),
                    bad={} if row is None else {"003.png": row})  # fmt: skip
    nested = functools.partial(packed, {**GOOD_FILES, "more.zip": packed({"z": bytes(10 * 2**20)})})
    yield _case("a zip of zeros inside", nested, TAKEN, good=GOOD)
    yield _case("2000 members in folders 20 deep", _deep, TAKEN, good=GOOD)


def _with_zeros(files: Mapping[str, bytes], name: str, size: int) -> bytes:
    return packed({**files, name: bytes(size)})


def _deep() -> bytes:
    folders = "/".join("abcdefghijklmnopqrst")
    return packed({**GOOD_FILES, **{f"{folders}/{number}.md": b"" for number in range(2000)}})
