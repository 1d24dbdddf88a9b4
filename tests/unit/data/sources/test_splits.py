"""Splits by names are those of Hugging Face `datasets`; several sources make one."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, Value, load_dataset
from webdataset import TarWriter

from stages.lib.data.sources.listing import PairSource, SourceRow
from stages.lib.data.sources.opening import Reading, open_source, open_sources
from stages.lib.data.sources.splits import agreed_splits, split_named
from stages.lib.frame.errors import StageError
from tests.conftest import draw_image, png

READING = Reading("text", render_resolution=16)
PICTURES = [png(draw_image(seed)) for seed in range(12)]
FEATURES = Features({"image": Image(), "text": Value("string")})


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_WORK", str(tmp_path / "work"))


def read(path: Path, reading: Reading = READING) -> PairSource:
    with open_source(path, reading) as source:
        return source


def found_in(source: PairSource) -> dict[str, str | None]:
    """caption -> split."""
    return {row.captions[0]: row.split for row in source.rows}


def by_datasets(tmp_path: Path, kind: str, folder: Path, column: str) -> dict[str, str]:
    """caption -> split, as `datasets` loads the folder."""
    loaded = load_dataset(kind, data_dir=str(folder), cache_dir=str(tmp_path / "cache"))
    return {
        caption: split for split, rows in loaded.items() for caption in rows.select_columns([column])[column]
    }


LAYOUTS = {
    "folders": ["train/{}.png", "validation/{}.png", "test/{}.png"],
    "other words": ["training/{}.png", "dev/{}.png", "evaluation/{}.png"],
    "short words": ["train/{}.png", "val/{}.png", "eval/{}.png"],
    "folders below": [
        "pictures/train/cats/{}.png",
        "pictures/valid/dogs/{}.png",
        "pictures/train/dogs/{}.png",
    ],
    "words in folders": ["my-train_set/{}.png", "my-test.set/{}.png", "2 train/{}.png"],
    "files": ["train_{}.png", "test_{}.png", "train-{}.png"],
    "files in folders": ["cats/train.{}.png", "dogs/validation {}.png", "cats/test-{}.png"],
    "a folder before a file": ["train/test_{}.png", "test/train_{}.png", "train/{}.png"],
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_an_imagefolder(tmp_path: Path, layout: list[str]) -> None:
    names = [layout[number % 3].format(number) for number in range(12)]
    for number, name in enumerate(names):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(PICTURES[number])
    for folder in {Path(name).parent for name in names}:
        beside = [name for name in names if Path(name).parent == folder]
        lines = [json.dumps({"file_name": Path(name).name, "text": name}) for name in beside]
        (tmp_path / "set" / folder / "metadata.jsonl").write_text("\n".join(lines))
    found = found_in(read(tmp_path / "set"))
    assert {*found.values()} > {"train"}
    if Path(names[0]).parent == Path():  # a metadata file is in no split of files by their names
        loaded = load_dataset("imagefolder", data_dir=str(tmp_path / "set"), drop_metadata=True,
                              cache_dir=str(tmp_path / "cache"))  # fmt: skip
        assert {split: len(rows) for split, rows in loaded.items()} == {
            split: [*found.values()].count(split) for split in {*found.values()}
        }
    elif layout is LAYOUTS["files in folders"]:
        assert found == {name: ["train", "validation", "test"][n % 3] for n, name in enumerate(names)}
    else:
        assert found == by_datasets(tmp_path, "imagefolder", tmp_path / "set", "text")


TABLES = {
    "shards": ["data/train-00000-of-00002", "data/train-00001-of-00002", "data/test-00000-of-00001"],
    "shards of any name": [
        "data/train-00000-of-00001",
        "data/extra-00000-of-00001",
        "data/val-00000-of-00001",
    ],
    "folders": ["train/0", "train/1", "validation/0"],
    "files": ["train", "test", "my_validation"],
    "files with numbers": ["pictures-train-0", "pictures-train-1", "pictures-dev-0"],
}


@pytest.mark.parametrize("layout", TABLES.values(), ids=TABLES)
def test_parquet(tmp_path: Path, layout: list[str]) -> None:
    for index, name in enumerate(layout):
        numbers = range(4 * index, 4 * index + 4)
        images = [{"bytes": PICTURES[number], "path": None} for number in numbers]
        rows = Dataset.from_dict(
            {"image": images, "text": [f"{name} {n}" for n in numbers]}, features=FEATURES
        )
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        rows.to_parquet(tmp_path / "set" / f"{name}.parquet")
    found = found_in(read(tmp_path / "set"))
    reference = by_datasets(tmp_path, "parquet", tmp_path / "set", "text")
    assert found == {text: {"val": "validation"}.get(split, split) for text, split in reference.items()}
    assert len({*found.values()}) > 1


@pytest.mark.parametrize("layout", [TABLES["files"], TABLES["files with numbers"], TABLES["folders"]])
def test_tars_of_a_webdataset(tmp_path: Path, layout: list[str]) -> None:
    for index, name in enumerate(layout):
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        with TarWriter(str(tmp_path / "set" / f"{name}.tar")) as writer:
            for number in range(4 * index, 4 * index + 4):
                writer.write({"__key__": f"{number:04d}", "png": PICTURES[number], "txt": f"{name} {number}"})
    found = found_in(read(tmp_path / "set"))
    assert found == by_datasets(tmp_path, "webdataset", tmp_path / "set", "txt")
    assert len({*found.values()}) > 1


@pytest.mark.parametrize(
    "layout",
    [
        ["cats/{}.png", "dogs/{}.png"],
        ["train/{}.png", "train/sub/{}.png"],
        ["test/{}.png", "validation/{}.png"],  # nothing to train on
        ["latest/{}.png", "trainer/{}.png"],
        ["train/{}.png", "test/{}.png", "other/{}.png"],
        ["train/{}.png", "{}.png"],
    ],
)
def test_what_is_not_split_as_a_whole_has_no_splits(
    tmp_path: Path, layout: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    for number in range(12):
        path = tmp_path / "set" / layout[number % len(layout)].format(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PICTURES[number])
        path.with_suffix(".txt").write_text(f"picture {number}")
    assert set(found_in(read(tmp_path / "set")).values()) == {None}
    warned = (
        "names of folders or files say test for 4, train for 4, but for 4 of 12 rows nothing" in caplog.text
    )
    assert warned == (len(layout) == 3)


def test_upper_case_and_words_of_a_split() -> None:
    rows = [SourceRow(name, ("a",)) for name in ("Train/a.png", "TEST/a.png")]
    assert [row.split for row in agreed_splits(rows)] == ["train", "test"]
    assert [split_named(name) for name in ("train_sft", "my-Val", "test.2", "contest", "extra")] == [
        "train", "validation", "test", "contest", "extra"
    ]  # fmt: skip


def test_a_file_of_two_splits_is_in_the_one_that_is_trained_on() -> None:
    rows = [SourceRow(name, ("a",)) for name in ("train/test/a.png", "test/b.png", "test/val/c.png")]
    assert [row.split for row in agreed_splits(rows)] == ["train", "test", "validation"]


def test_splits_that_a_source_says_come_before_those_of_names() -> None:
    rows = [SourceRow("a/test.arrow/0", ("a",), "train"), SourceRow("b/train.arrow/0", ("a",), "test")]
    assert agreed_splits(rows) == rows
    assert [row.split for row in agreed_splits(rows[1:])] == [None]


# Several sources


def layout_of_several(root: Path) -> None:
    for name in ("dog/a.png", "dog-b/a.png", "dog b/a.png", "10_kohya/3_cat/a.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
        if "dog/" not in name:
            (root / name).with_suffix(".txt").write_text(name)
    images = [{"bytes": data, "path": None} for data in PICTURES[:3]]
    rows = Dataset.from_dict({"image": images, "prompt": ["one", "two", "three"]})
    rows.to_parquet(root / "dog.parquet")
    with TarWriter(str(root / "dog.tar")) as writer:
        writer.write({"__key__": "0", "png": PICTURES[5], "txt": "of a tar"})
        writer.write({"__key__": "1", "png": PICTURES[6]})


def test_several_sources_of_several_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout_of_several(tmp_path)
    monkeypatch.chdir(tmp_path)
    readings = {
        "dog-b": READING,
        "./dog/": Reading("text", 16, "sks dog", 5),
        "dog b": Reading("text", 16, "photo of "),
        "dog.parquet": Reading("prompt", 16, "say ", 2),
        "10_kohya": Reading("text", 16, repeats=2),
        str(tmp_path / "dog.tar"): READING,
    }
    with open_sources(readings) as source:
        ids = [row.sample_id for row in source.rows]
        contents = dict(zip(ids, source.images(ids), strict=True))
    of_tar = f"{str(tmp_path / 'dog.tar').strip('/')}"
    assert {row.sample_id: (row.captions, row.repeats, contents[row.sample_id]) for row in source.rows} == {
        "dog/a.png": (("sks dog",), 5, b"dog/a.png"),
        "dog-b/a.png": (("dog-b/a.png",), 1, b"dog-b/a.png"),
        "dog b/a.png": (("photo of dog b/a.png",), 1, b"dog b/a.png"),
        "10_kohya/3_cat/a.png": (("10_kohya/3_cat/a.png",), 6, b"10_kohya/3_cat/a.png"),
        "dog.parquet/dog.parquet/00000000": (("say one",), 2, PICTURES[0]),
        "dog.parquet/dog.parquet/00000001": (("say two",), 2, PICTURES[1]),
        "dog.parquet/dog.parquet/00000002": (("say three",), 2, PICTURES[2]),
        f"{of_tar}/0.png": (("of a tar",), 1, PICTURES[5]),
    }
    assert ids == sorted(ids)
    assert [row.name for row in source.rejected] == [f"{of_tar}/1.png"]


def test_each_source_keeps_its_own_splits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a/train/0.png", "a/test/1.png", "b/2.png", "train/3.png", "test/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
        (tmp_path / name).with_suffix(".txt").write_text(name)
    monkeypatch.chdir(tmp_path)
    with open_sources(dict.fromkeys(("a", "b", "train", "test"), READING)) as source:
        assert found_in(source) == {
            "a/test/1.png": "test", "a/train/0.png": "train", "b/2.png": None, "test/4.png": None,
            "train/3.png": None,
        }  # fmt: skip


def test_a_source_inside_another_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout_of_several(tmp_path)
    monkeypatch.chdir(tmp_path)
    for inner in ("10_kohya/3_cat", "./10_kohya/../10_kohya/3_cat/"):
        with (
            pytest.raises(StageError, match=r"10_kohya/3_cat/? lies inside 10_kohya, so that its images"),
            open_sources({"10_kohya": READING, inner: READING}),
        ):
            pass


@pytest.mark.parametrize("other", ["./dog", "dog/", "dog/../dog", "link"])
def test_a_source_by_two_names_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    layout_of_several(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("dog")
    with pytest.raises(StageError, match="is the same as"), open_sources({"dog": READING, other: READING}):
        pass
    with pytest.raises(StageError, match=r"dog lies inside \."), open_sources({"dog": READING, ".": READING}):
        pass


def test_a_missing_source_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    layout_of_several(tmp_path)
    readings = {str(tmp_path / name): READING for name in ("dog-b", "gone")}
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(StageError, match=r"prepare\.source .*/gone: expected a folder"),
        open_sources(readings),
    ):
        pass
