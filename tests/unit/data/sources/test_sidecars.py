"""Captions beside images: kohya's folders, the three kinds of files, odd names, and files that are none."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from stages.lib.data.sources.listing import PairSource
from stages.lib.data.sources.opening import Reading, open_source
from stages.lib.frame.errors import StageError


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Where a test that opens a pipe, and so waits for ever, fails after a minute."""
    monkeypatch.setenv("SD_WORK", str(tmp_path / "work"))
    signal.alarm(60)
    yield
    signal.alarm(0)


def folder_of(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def read(folder: Path, caption_column: str = "text", prefix: str = "") -> PairSource:
    with open_source(folder, Reading(caption_column, 16, caption_prefix=prefix)) as source:
        return source


def captions(source: PairSource) -> dict[str, tuple[str, ...]]:
    return {row.sample_id: row.captions for row in source.rows}


def reasons(source: PairSource) -> dict[str, str]:
    return {row.name: row.reason for row in source.rejected}


# kohya's folders


def test_kohya_folders_say_repeats_and_what_stands_for_a_caption(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {
        "10_sks_dog/a.png": "",
        "10_sks_dog/a.caption": "sks dog on a sofa",
        "10_sks_dog/b.png": "",
        "10_sks_dog/c.jpg": "",
        "10_sks_dog/c.txt": "sks dog\n in the grass",
        "1_dog/a.png": "",
        "200_my dog 2/a.png": "",
        "log/events.out": "",
        "sample_prompts.txt.bak": "",
    }
    with caplog.at_level(logging.INFO):
        source = read(folder_of(tmp_path / "set", files))
    assert {row.sample_id: (row.captions, row.repeats) for row in source.rows} == {
        "10_sks_dog/a.png": (("sks dog on a sofa",), 10),
        "10_sks_dog/b.png": (("sks dog",), 10),
        "10_sks_dog/c.jpg": (("sks dog in the grass",), 10),
        "1_dog/a.png": (("dog",), 1),
        "200_my dog 2/a.png": (("my dog 2",), 200),
    }
    assert source.rejected == [] and source.num_unlisted_files == 2
    assert f"{tmp_path}/set/10_sks_dog: 3 images, each drawn 10 times an epoch" in caplog.text


def test_repeats_of_a_source_multiply_those_of_its_folders(tmp_path: Path) -> None:
    folder_of(tmp_path / "set", {"10_dog/a.png": "", "3_cat/a.png": ""})
    with open_source(tmp_path / "set", Reading("text", 16, "photo of ", repeats=2)) as source:
        assert {row.sample_id: (row.captions, row.repeats) for row in source.rows} == {
            "10_dog/a.png": (("photo of dog",), 20),
            "3_cat/a.png": (("photo of cat",), 6),
        }


def test_kohya_folders_in_an_archive(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as bundle:
        for name in ("img/5_cat/a.png", "img/5_cat/b.png", "img/1_pet/a.png"):
            bundle.writestr(name, b"")
    with open_source(tmp_path / "set.zip", Reading("text", 16)) as source:
        assert {row.sample_id: row.repeats for row in source.rows} == {
            "5_cat/a.png": 5, "5_cat/b.png": 5, "1_pet/a.png": 1
        }  # fmt: skip


@pytest.mark.parametrize(
    "other", ["cats/a.png", "a.png", "0_cats/a.png", "10_/a.png", "10-cats/a.png", "1000_c/a.png"]
)
def test_folders_that_are_not_all_of_that_form_say_nothing(tmp_path: Path, other: str) -> None:
    stem = other.removesuffix(".png")
    source = read(folder_of(tmp_path, {"10_dog/a.png": "", other: "", f"{stem}.txt": "its own"}))
    assert captions(source) == {other: ("its own",)}
    assert {row.repeats for row in source.rows} == {1}
    assert list(reasons(source)) == ["10_dog/a.png"]


# The kinds of files


def test_which_file_comes_first(tmp_path: Path) -> None:
    described = {"text": "column", "caption": "described", "long": ["one", "two"], "null": None}
    files = {f"{name}.png": "" for name in ("all", "two", "caption", "json")} | {
        "all.json": json.dumps(described), "all.txt": "txt", "all.caption": "caption",
        "two.json": json.dumps({"caption": "described"}), "two.txt": "txt", "two.caption": "caption",
        "caption.json": json.dumps({"caption": "described"}), "caption.caption": "caption",
        "json.json": json.dumps({"caption": "described", "size": 3}),
    }  # fmt: skip
    folder = folder_of(tmp_path, files)
    assert captions(read(folder)) == {
        "all.png": ("column",), "two.png": ("txt",), "caption.png": ("caption",), "json.png": ("described",)
    }  # fmt: skip
    assert captions(read(folder, "long"))["all.png"] == ("one", "two")
    assert captions(read(folder, "prompt"))["all.png"] == ("txt",)
    assert captions(read(folder, "caption")) == {
        "all.png": ("described",), "two.png": ("described",), "caption.png": ("described",),
        "json.png": ("described",),
    }  # fmt: skip
    source = read(folder, "null")
    assert reasons(source) == {"all.png": "empty caption"} and source.num_unlisted_files == 0


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('"a cat"', ("a cat",)),
        ('["a cat", "a pet"]', ("a cat", "a pet")),
        ('\ufeff{"text": "a cat"}', ("a cat",)),
        ('{"text": 5}', "caption is not text: 5"),
        ('{"text": ["a", 5]}', "caption is not text: 5"),
        ("5", "caption is not text: 5"),
        ("null", "empty caption"),
        ('{"caption": null}', "empty caption"),
        ("[]", "empty caption"),
        (
            '{"prompt": "a cat"}',
            "no caption, expected a .txt or .caption of the same name beside it, or a .json with",
        ),
        ("{}", "no caption, expected a .txt"),
        ("", "caption file a.json cannot be read: not JSON"),
        ("{'text': 'a cat'}", "caption file a.json cannot be read: not JSON"),
        (b'{"text": "\xff"}', "caption file a.json cannot be read: not JSON"),
        ("[" * 100_000, "caption file a.json cannot be read: nested too deeply"),
        ('{"text": "\\ud800"}', "caption is not text"),
    ],
)
def test_a_json_file(tmp_path: Path, content: str | bytes, expected: tuple[str, ...] | str) -> None:
    source = read(folder_of(tmp_path, {"a.png": "", "a.json": content}))
    if isinstance(expected, tuple):
        assert captions(source) == {"a.png": expected}
    else:
        assert reasons(source)["a.png"].startswith(expected)


@pytest.mark.parametrize(
    "caption", ["", " \n", "\u200b", "\ufeff", "\u3164", "\u2800 \u00ad", "\u202e\u2066"]
)
@pytest.mark.parametrize("suffix", [".txt", ".caption", ".json"])
def test_what_cannot_be_seen_is_no_caption(tmp_path: Path, caption: str, suffix: str) -> None:
    content = json.dumps({"text": caption}) if suffix == ".json" else caption
    folder = folder_of(tmp_path, {"a.png": "", f"a{suffix}": content})
    assert reasons(read(folder)) == {"a.png": "empty caption"}
    assert captions(read(folder, prefix="sks dog, ")) == {"a.png": ("sks dog",)}


def test_a_prefix_needs_no_caption_files(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"a.png": "", "b.png": "", "b.txt": "on a sofa"})
    assert captions(read(folder, prefix="sks dog, ")) == {
        "a.png": ("sks dog",),
        "b.png": ("sks dog, on a sofa",),
    }
    assert list(reasons(read(folder))) == ["a.png"]


# Names


def test_names_that_other_systems_write(tmp_path: Path) -> None:
    files = {
        "A.PNG": "", "a.TXT": "upper",
        "cat.png": "", "cat.png.txt": "both suffixes",
        "dog.v2.jpeg": "", "dog.v2.txt": "a dot inside", "dog.txt": "none",
        "cafe\u0301.webp": "", "caf\u00e9.caption": "decomposed",
        "sub/B.JPG": "", "SUB/b.txt": "a folder in another case",
    }  # fmt: skip
    source = read(folder_of(tmp_path, files))
    assert captions(source) == {
        "A.PNG": ("upper",),
        "cat.png": ("both suffixes",),
        "dog.v2.jpeg": ("a dot inside",),
        "cafe\u0301.webp": ("decomposed",),
        "sub/B.JPG": ("a folder in another case",),
    }
    assert list(reasons(source)) == ["dog.txt"]


def test_the_shorter_name_of_two_comes_first(tmp_path: Path) -> None:
    source = read(folder_of(tmp_path, {"a.png": "", "a.png.txt": "longer", "a.txt": "shorter"}))
    assert captions(source) == {"a.png": ("shorter",)} and source.rejected == []


def test_one_caption_serves_two_formats_of_a_picture(tmp_path: Path) -> None:
    source = read(folder_of(tmp_path, {"a.png": "1", "a.jpg": "2", "a.txt": "a cat"}))
    assert captions(source) == {"a.jpg": ("a cat",), "a.png": ("a cat",)}
    assert source.read("a.jpg") == b"2"


def test_the_file_of_the_very_name_comes_before_those_that_are_alike(tmp_path: Path) -> None:
    files = {"Cat.png": "", "cat.png": "", "Cat.txt": "upper", "cat.txt": "lower"}
    assert captions(read(folder_of(tmp_path, files))) == {"Cat.png": ("upper",), "cat.png": ("lower",)}


def test_several_caption_files_that_might_be_meant_are_named(tmp_path: Path) -> None:
    files = {
        "CAT.png": "",
        "Cat.txt": "one",
        "cat.txt": "two",
        "dog.png": "",
        "dog.txt": "one",
        "dog.TXT": "two",
    }
    found = reasons(read(folder_of(tmp_path, files | {"good.png": "", "good.txt": "good"})))
    assert found["CAT.png"].startswith("caption file: no such file, but several that are alike: 'Cat', 'cat'")
    assert found["dog.png"] == "caption file: several that are alike: dog.TXT, dog.txt"
    assert not {"dog.txt", "dog.TXT"} & {*found}


# Files that are none


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        directory = os.getcwd()
        os.chdir(path.parent)  # a path of a socket is short
        try:
            end.bind(path.name)
        finally:
            os.chdir(directory)


def make_dangling(path: Path) -> None:
    path.symlink_to("nothing.there")


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


ODD = [
    (make_pipe, "a pipe"),
    (make_socket, "a socket"),
    (make_dangling, "a link to nothing"),
    (make_loop, "a link to nothing"),
]


@pytest.mark.parametrize(("make", "kind"), ODD)
@pytest.mark.parametrize("suffix", [".txt", ".caption", ".json", ".TXT"])
def test_a_caption_that_is_no_file(tmp_path: Path, make, kind: str, suffix: str) -> None:
    folder_of(tmp_path / "set", {"a.png": "", "b.png": "", "b.txt": "good"})
    make(tmp_path / f"set/a{suffix}")
    source = read(tmp_path / "set", prefix="of ")
    assert captions(source) == {"b.png": ("of good",)}
    assert reasons(source) == {"a.png": f"caption file a{suffix} is {kind}"}


@pytest.mark.parametrize(("make", "kind"), ODD)
def test_an_image_that_is_no_file(tmp_path: Path, make, kind: str) -> None:
    folder_of(tmp_path / "set", {"a.txt": "bad", "b.png": "", "b.txt": "good"})
    make(tmp_path / "set/a.png")
    source = read(tmp_path / "set")
    assert captions(source) == {"b.png": ("good",)}
    assert reasons(source) == {"a.png": f"expected a file, found {kind}"}


@pytest.mark.parametrize(
    "name", ["a.tar", "a.parquet", "state.json", "a.arrow", "a.tfrecord", "openmoji.json"]
)
def test_a_pipe_of_any_other_name_is_never_opened(tmp_path: Path, name: str) -> None:
    folder_of(tmp_path / "set", {"b.png": "", "b.txt": "good"})
    make_pipe(tmp_path / "set" / name)
    assert captions(read(tmp_path / "set")) == {"b.png": ("good",)}


def test_a_caption_that_links_to_another_folder_is_not_taken(tmp_path: Path) -> None:
    secret = folder_of(tmp_path / "other", {"secret.txt": "secret", "0.png": "picture"})
    folder = folder_of(
        tmp_path / "set", {"a.png": "", "b.png": "", "c.txt": "a picture of elsewhere", "own.text": "its own"}
    )
    (folder / "a.txt").symlink_to(secret / "secret.txt")
    (folder / "b.txt").symlink_to("own.text")
    (folder / "c.png").symlink_to(secret / "0.png")
    source = read(folder)
    assert captions(source) == {"b.png": ("its own",), "c.png": ("a picture of elsewhere",)}
    assert reasons(source) == {"a.png": "caption file a.txt is a link to a file outside of the folder"}
    assert source.read("c.png") == b"picture"


def test_a_file_that_goes_away_is_an_error_of_its_row(tmp_path: Path) -> None:
    source = read(folder_of(tmp_path, {"a.png": "1", "a.txt": "a", "b.png": "2", "b.txt": "b"}))
    (tmp_path / "a.png").unlink()
    gone, there = source.images(["a.png", "b.png"])
    assert isinstance(gone, FileNotFoundError) and there == b"2"


def test_captions_of_a_list_are_not_read_and_named(tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"found none; seen: captions\.csv, name it metadata\.csv"):
        read(folder_of(tmp_path, {"a.png": "", "captions.csv": "file_name,text\na.png,x\n"}))
