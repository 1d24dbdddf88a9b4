"""Names that are written otherwise than on the disk are found, and never by guessing."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

import pytest

from stages.lib.data.sources.listing import PairSource
from stages.lib.data.sources.names import AmbiguousNameError, Names, NoSuchNameError, as_text
from stages.lib.data.sources.opening import Reading, read_folder

COMPOSED = unicodedata.normalize("NFC", "é.png")
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)
JAPANESE = os.fsdecode("猫の絵.png".encode("cp932"))


@pytest.mark.parametrize(
    ("names", "wanted", "found"),
    [
        (["a.png", "A.png"], "a.png", "a.png"),
        (["a.png"], "A.PNG", "a.png"),
        (["a.png"], " a.png ", "a.png"),
        ([" a.png"], " a.png", " a.png"),
        ([" a.png", "a.png"], " a.png", " a.png"),
        ([" a.png"], "a.png", " a.png"),
        (["sub/a.png"], "sub\\a.png", "sub/a.png"),
        (["sub\\a.png", "sub/a.png"], "sub\\a.png", "sub\\a.png"),
        (["sub\\a.png"], "sub/a.png", "sub\\a.png"),
        (["sub/a.png"], "./sub/../sub//a.png", "sub/a.png"),
        ([DECOMPOSED], COMPOSED, DECOMPOSED),
        ([COMPOSED], DECOMPOSED, COMPOSED),
        ([COMPOSED, DECOMPOSED], DECOMPOSED, DECOMPOSED),
        ([DECOMPOSED.upper()], COMPOSED, DECOMPOSED.upper()),
        (["STRASSE.png"], "straße.png", "STRASSE.png"),
        ([JAPANESE], "猫の絵.png", JAPANESE),
        (
            [os.fsdecode("naïve.png".encode("latin-1"))],
            "naïve.png",
            os.fsdecode("naïve.png".encode("latin-1")),
        ),
    ],
)
def test_the_name_on_the_disk_is_found(names: list[str], wanted: str, found: str) -> None:
    assert Names(names).find(wanted) == found


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["a.png", "A.png"], "a.PNG"),
        ([COMPOSED, DECOMPOSED], f" {COMPOSED.upper()}"),
        (["sub\\a.png", "sub//a.png"], "./sub\\a.png"),
    ],
)
def test_several_that_may_be_meant_are_named(names: list[str], wanted: str) -> None:
    with pytest.raises(AmbiguousNameError) as caught:
        Names(names).find(wanted)
    assert all(repr(name) in str(caught.value) for name in names)


def test_what_is_not_there_is_not_there() -> None:
    for wanted in ("b.png", "a", "猫.png", "", "sub"):
        with pytest.raises(NoSuchNameError, match="no such file"):
            Names(["a.png", "sub/x.png"]).find(wanted)


def test_bytes_that_are_no_text_are_escaped() -> None:
    assert as_text("a.png") == "a.png"
    assert as_text(os.fsdecode(b"\x94L.png")) == "\\x94L.png"
    assert as_text("\ud800") == "\ud800"


def test_a_row_keeps_the_name_that_its_file_has(tmp_path: Path) -> None:
    (tmp_path / DECOMPOSED).write_bytes(b"1")
    (tmp_path / " b.PNG").write_bytes(b"2")
    (tmp_path / os.fsdecode(b"\x94L.png")).write_bytes(b"3")
    table = f"file_name,text\n{COMPOSED},one\nB.png,two\n猫.png,three\n{DECOMPOSED},four\n"
    (tmp_path / "metadata.csv").write_text(table, encoding="utf-8")
    source: PairSource = read_folder(tmp_path, Reading("text", 16))
    assert source.rejected == []
    assert {row.sample_id: row.captions for row in source.rows} == {
        DECOMPOSED: ("one", "four"),
        " b.PNG": ("two",),
        "\\x94L.png": ("three",),
    }
    assert [source.read(row.sample_id) for row in source.rows] == [b"2", b"3", b"1"]
    assert source.num_unlisted_files == 0
