"""Tables: one odd row is rejected by its line, and every other row is taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stages.lib.data.sources.listing import PairSource
from stages.lib.data.sources.opening import Reading, read_folder
from stages.lib.frame.errors import StageError


def read(folder: Path, table: bytes, name: str = "metadata.csv", column: str = "text") -> PairSource:
    for letter in "abcd":
        (folder / f"{letter}.png").write_bytes(letter.encode())
    (folder / name).write_bytes(table)
    return read_folder(folder, Reading(column, render_resolution=16))


def taken(source: PairSource) -> dict[str, str]:
    return {row.sample_id[0]: row.captions[0] for row in source.rows}


GOOD = {"a": "one", "c": "three"}


@pytest.mark.parametrize(
    ("row", "line", "reason"),
    [
        (b'b.png,"two" and more', 3, "no csv"),
        (b'b.png,a "quoted" word', None, None),  # quotes inside a cell without any around it are text
        (b'b.png,"never closed', 3, "no csv"),
        (b'b.png,"' + b"x" * 140_000 + b'"', 3, "field larger than field limit"),
        (b"b.png", 3, "1 cells, the header has 2"),
        (b"b.png,two,and more", 3, "3 cells, the header has 2"),
        (b"b.png,caf\xe9", 3, "not UTF-8"),
        (b"", None, None),
    ],
)
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_one_odd_row_of_a_csv(
    tmp_path: Path, row: bytes, line: int | None, reason: str | None, end: bytes
) -> None:
    table = end.join([b"file_name,text", b"a.png,one", row, b"c.png,three", b""])
    source = read(tmp_path, table)
    if line is None:
        assert source.rejected == []
        assert taken(source).items() >= GOOD.items()
    else:
        assert taken(source) == GOOD
        ((name, found),) = ((each.name, each.reason) for each in source.rejected)
        assert name == f"metadata.csv line {line}"
        assert reason is not None and reason in found


def test_a_caption_may_have_lines(tmp_path: Path) -> None:
    source = read(tmp_path, b'file_name,text\na.png,"one\n\nand more"\nb.png,"a ""big"" cat"\nc.png,x"y\n')
    assert taken(source) == {"a": "one and more", "b": 'a "big" cat', "c": 'x"y'}
    assert source.rejected == []


def test_many_quotes_that_are_never_closed(tmp_path: Path) -> None:
    rows = b"".join(b'%d.png,"open\n' % number for number in range(3000))
    source = read(tmp_path, b"file_name,text\na.png,one\n" + rows + b"c.png,three\n")
    assert taken(source) == GOOD
    assert len(source.rejected) == 3000


@pytest.mark.parametrize(
    ("name", "table", "message"),
    [
        ("metadata.csv", b"file_name;text\na.png;one\n", "separated by semicolons"),
        ("metadata.csv", b"file_name\ttext\na.png\tone\n", "separated by tabs"),
        ("metadata.csv", "file_name,text\na.png,one\n".encode("utf-16"), "UTF-16"),
        ("metadata.csv", "file_name,text\na.png,one\n".encode("utf-16-le"), "UTF-16"),
        ("metadata.csv", b"file_name,text,text\na.png,one,x\n", "names a column twice"),
        ("metadata.csv", b"a.png,one\nc.png,three\n", r"no column 'file_name', it has a\.png, one"),
        ("metadata.tsv", b"file_name\ttext\na.png\tone\n", r"metadata\.tsv, save it with commas"),
        ("captions.csv", b"file_name,text\na.png,one\n", r"captions\.csv, name it metadata\.csv"),
        ("metadata.json", b'[{"file_name": "a.png"}]', r"metadata\.json, write one JSON object a line"),
        ("metadata.xlsx", b"PK", r"metadata\.xlsx, name it"),
    ],
)
def test_a_table_of_another_kind_is_named_with_what_to_do(
    tmp_path: Path, name: str, table: bytes, message: str
) -> None:
    with pytest.raises(StageError, match=message):
        read(tmp_path, table, name)


def test_images_that_are_still_packed_are_named(tmp_path: Path) -> None:
    (tmp_path / "images.zip").write_bytes(b"PK")
    rows = b'{"file_name": "x.png", "text": "one"}\n'
    with pytest.raises(StageError, match=r"metadata\.jsonl: expected its images.*images\.zip, unpack it"):
        read(tmp_path, rows, "metadata.jsonl")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[" * 200_000, "not JSON"),
        (json.dumps({"file_name": "b.png", "text": 1}), "caption is not text: 1"),
        ('{"file_name": "b.png", "text": ' + "[" * 900 + "]" * 900 + "}", "caption is not text"),
        ('{"file_name": "b.png", "text": ' + "9" * 5000 + "}", "not JSON"),
        (json.dumps({"file_name": "b.png", "text": "\ufeff\u200b \u2060"}), "empty caption"),
        (json.dumps({"file_name": "b.png", "text": {"en": "x" * 10_000}}), "caption is not text"),
        ('{"file_name": "b.png", "text": NaN}', "caption is not text: nan"),
        ('"b.png"', "not a JSON object"),
    ],
)
def test_one_odd_line_of_jsonl(tmp_path: Path, line: str, reason: str) -> None:
    good = [json.dumps({"file_name": f"{letter}.png", "text": text}) for letter, text in GOOD.items()]
    source = read(tmp_path, f"{good[0]}\n{line}\n{good[1]}\n".encode(), "metadata.jsonl")
    assert taken(source) == GOOD
    (rejected,) = source.rejected
    assert reason in rejected.reason
    assert len(rejected.reason) < 300
