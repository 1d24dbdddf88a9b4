"""Archives are whole or refused: every damage is found, whatever part of the archive it is in."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.lib.data.sources.archives import extract, tar_members
from stages.lib.data.sources.opening import Reading, open_source
from stages.lib.frame.errors import StageError

READING = Reading("text", render_resolution=16)
CONTENT = {f"{number:03d}.png": random.Random(number).randbytes(30) for number in range(200)}
CONTENT |= {f"{number:03d}.txt": f"number {number}".encode() for number in range(200)}


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_WORK", str(tmp_path / "work"))


def tar(content: dict[str, bytes] = CONTENT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tape:
        for name, data in content.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tape.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def found_in(archive: Path) -> dict[str, bytes]:
    """What the source takes of an archive: all of it, or a StageError."""
    with open_source(archive, READING) as source:
        assert source.rejected == []
        return {row.sample_id: source.read(row.sample_id) for row in source.rows}


PICTURES = {name: data for name, data in CONTENT.items() if name.endswith("png")}


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [(".tar", bytes), (".tar.gz", gzip.compress), (".tar.bz2", bz2.compress), (".tar.xz", lzma.compress)],
)
def test_a_bit_of_any_header_refuses_the_archive(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    whole, archive = tar(), tmp_path / f"set{suffix}"
    archive.write_bytes(compress(whole))
    assert found_in(archive) == PICTURES
    with tarfile.open(fileobj=io.BytesIO(whole)) as tape:
        offsets = [member.offset for member in tape]
    for number, position in ((0, 5), (60, 100), (60, 130), (199, 150), (399, 156)):
        damaged = bytearray(whole)
        damaged[offsets[number] + position] ^= 4
        archive.write_bytes(compress(bytes(damaged)))
        with pytest.raises(StageError, match=r"set\.tar.*nothing of it is used"):
            found_in(archive)


@pytest.mark.parametrize(("suffix", "compress"), [(".tgz", gzip.compress), (".tar.xz", lzma.compress)])
def test_a_bit_of_compressed_data_never_changes_content_unnoticed(
    tmp_path: Path, suffix: str, compress: Callable[[bytes], bytes]
) -> None:
    whole, archive, draws, refused = compress(tar()), tmp_path / f"set{suffix}", random.Random(0), 0
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[draws.randrange(len(whole))] ^= 1 << draws.randrange(8)
        archive.write_bytes(damaged)
        try:
            assert found_in(archive) == PICTURES  # a byte that nothing depends on, such as gzip's time
        except StageError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_tar_ends_with_zeros_and_nothing_else(tmp_path: Path, compress: Callable[[bytes], bytes]) -> None:
    archive, whole = tmp_path / "set.tar", tar()
    end = len(whole.rstrip(b"\0"))
    end += -end % 512
    for damaged, message in (
        (whole[:end], "cut at byte"),  # at the end of the last member
        (whole[: end + 512], "cut at byte"),  # one block of zeros
        (whole[: end - 1024], "cut at byte"),  # at the end of a member before
        (whole[: end - 700], "damaged at byte"),
        (whole + whole, "damaged at byte"),
        (whole + b"x", "damaged at byte"),
        (whole[:end] + b"garbage" + bytes(1017), "damaged at byte|cannot be unpacked"),
    ):
        archive.write_bytes(compress(damaged))
        with pytest.raises(StageError, match=message):
            found_in(archive)
    for good in (whole[: end + 1024], whole + bytes(5000)):
        archive.write_bytes(compress(good))
        assert found_in(archive) == PICTURES


def test_gnu_tar_is_read_in_place(tmp_path: Path) -> None:
    folder = tmp_path / "folder" / "sub"
    folder.mkdir(parents=True)
    long = "n" * 200
    for name in ("a", long):
        (folder / f"{name}.png").write_bytes(name.encode())
        (folder / f"{name}.txt").write_text(name)
    for form in ("gnu", "pax", "ustar"):
        name = "a.png a.txt" if form == "ustar" else "."
        subprocess.run(
            ["tar", f"--format={form}", "-cf", tmp_path / "set.tar", "-C", folder, *name.split()], check=True
        )
        found = found_in(tmp_path / "set.tar")
        assert found == (
            {"a.png": b"a"} if form == "ustar" else {"a.png": b"a", f"{long}.png": long.encode()}
        )
    assert not (tmp_path / "work").exists()


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    double = tar({"a.png": b"1", "a.txt": b"x"})[: 4 * 512] + tar({"./a.png": b"2"})
    (tmp_path / "set.tar").write_bytes(double)
    with pytest.raises(StageError, match=r"'\./a\.png' comes twice"):
        found_in(tmp_path / "set.tar")
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as bundle, pytest.warns(UserWarning, match="Duplicate"):
        for data in (b"1", b"2"):
            bundle.writestr("a.png", data)
    with pytest.raises(StageError, match=r"'a\.png' comes twice"):
        found_in(tmp_path / "set.zip")


def test_members_are_listed_with_their_places(tmp_path: Path) -> None:
    (tmp_path / "set.tar").write_bytes(whole := tar())
    for name, offset, size in tar_members(tmp_path / "set.tar", Path("shown")):
        assert whole[offset : offset + size] == CONTENT[name]


def zip_of(names: dict[bytes, bytes]) -> bytes:
    """A zip whose members have these very bytes for names, as other systems write them."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle:
        for letter, (name, data) in zip("abcdef", names.items(), strict=False):
            bundle.writestr(letter * len(name), data)
    content = buffer.getvalue()
    for letter, name in zip("abcdef", names, strict=False):
        content = content.replace(letter.encode() * len(name), name)
    return content


def test_backslashes_in_a_zip_are_folders(tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_bytes(
        zip_of({b"pictures\\sub\\one.png": b"1", b"pictures\\sub\\one.txt": b"a cat"})
    )
    assert found_in(tmp_path / "set.zip") == {"sub/one.png": b"1"}


@pytest.mark.parametrize(
    ("encoding", "name"),
    [
        ("utf-8", "zażółć-猫.png"),
        ("cp932", "猫の写真.png"),
        ("gb18030", "猫的照片们.png"),
        ("cp1251", "кошка.png"),
        ("cp1252", "brûlée.png"),
        ("cp437", "brûlée.png"),
    ],
)
def test_names_in_other_encodings_are_found_by_a_table(tmp_path: Path, encoding: str, name: str) -> None:
    table = f"file_name,text\n{name},a cat\n".encode()
    members = {name.encode(encoding): b"1", b"metadata.csv": table}
    (tmp_path / "set.zip").write_bytes(zip_of(members))
    with open_source(tmp_path / "set.zip", READING) as source:
        assert source.rejected == []
        assert [(row.captions, source.read(row.sample_id)) for row in source.rows] == [(("a cat",), b"1")]
        if encoding == "utf-8":
            assert source.rows[0].sample_id == name


def test_bytes_in_front_of_a_zip_are_refused(tmp_path: Path) -> None:
    content = zip_of({b"one.png": b"1", b"one.txt": b"a cat"})
    for first in (content, b"garbage"):
        (tmp_path / "set.zip").write_bytes(first + content)
        with pytest.raises(StageError, match=r"bytes stand in front|cannot be unpacked"):
            found_in(tmp_path / "set.zip")


@pytest.mark.parametrize(
    "method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
)
def test_a_bit_of_a_zip_never_changes_content_unnoticed(tmp_path: Path, method: int) -> None:
    archive, draws, refused = tmp_path / "set.zip", random.Random(1), 0
    with zipfile.ZipFile(archive, "w", method) as bundle:
        for name, data in list(CONTENT.items())[:20] + list(CONTENT.items())[200:220]:
            bundle.writestr(name, data)
    whole = archive.read_bytes()
    expected = {f"{number:03d}.png": CONTENT[f"{number:03d}.png"] for number in range(20)}
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[draws.randrange(len(whole))] ^= 1 << draws.randrange(8)
        archive.write_bytes(damaged)
        try:
            with open_source(archive, READING) as source:
                assert {row.sample_id: source.read(row.sample_id) for row in source.rows} == expected
        except StageError:
            refused += 1
    assert refused > 40


def test_a_full_disk_is_not_the_archives_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "set.zip").write_bytes(zip_of({b"one.png": b"1"}))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "open", full)
    (tmp_path / "target").mkdir()
    with pytest.raises(OSError, match="No space left"):
        extract(tmp_path / "set.zip", tmp_path / "target")


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_member_whose_name_no_file_may_have_is_told(tmp_path: Path, kind: str) -> None:
    """In bytes, as file systems count: letters of three bytes each."""

    def written(num_letters: int) -> Path:
        stem = "folder/" + "語" * num_letters
        content = {f"{stem}.png": b"1", f"{stem}.txt": b"a word"}
        archive = tmp_path / f"{num_letters}.{kind}"
        in_bytes = {name.encode(): data for name, data in content.items()}
        archive.write_bytes(zip_of(in_bytes) if kind == "zip" else tar(content))
        return archive

    with pytest.raises(StageError, match=r"has a name of 304 bytes, expected at most 255"):
        found_in(written(100))
    assert list(found_in(written(80)).values()) == [b"1"]
