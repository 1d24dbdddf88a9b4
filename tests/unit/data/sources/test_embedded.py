"""Tables with images inside, as `datasets` and pyarrow write them: rows, bytes, and what is damaged."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value, load_from_disk
from tfrecord import TFRecordWriter

from stages.lib.data.sources.listing import PairSource
from stages.lib.data.sources.opening import Reading, open_source
from stages.lib.frame.errors import StageError
from tests.conftest import REPOSITORY, draw_image, png

READING = Reading("text", render_resolution=16)
PICTURES = [png(draw_image(seed)) for seed in range(30)]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SD_WORK", str(tmp_path / "work"))


def dataset(numbers: range, **columns: list[Any]) -> Dataset:
    features = Features({"image": Image(), "text": Value("string")})
    images = [{"bytes": PICTURES[number], "path": f"{number}.png"} for number in numbers]
    return Dataset.from_dict({"image": images, "text": [f"picture {n}" for n in numbers]}, features=features)


def read(path: Path, reading: Reading = READING) -> PairSource:
    with open_source(path, reading) as source:
        return source


def pairs(source: PairSource) -> dict[str, bytes | OSError]:
    """caption -> bytes, in the order of the rows; each caption is one row's."""
    contents = source.images([row.sample_id for row in source.rows])
    found = {row.captions[0]: content for row, content in zip(source.rows, contents, strict=True)}
    assert len(found) == len(source.rows)
    return found


def reasons(source: PairSource) -> dict[str, str]:
    return {row.name: row.reason for row in source.rejected}


def expected(numbers: range) -> dict[str, bytes]:
    return {f"picture {number}": PICTURES[number] for number in numbers}


def write(path: Path, images: list[Any], kind: pa.DataType = STRUCT, **columns: Any) -> Path:
    table = pa.table({"image": pa.array(images, kind), **columns})
    pq.write_table(table, path)
    return path


def test_to_parquet(tmp_path: Path) -> None:
    dataset(range(20)).to_parquet(tmp_path / "pictures.parquet")
    source = read(tmp_path / "pictures.parquet")
    assert pairs(source) == expected(range(20))
    assert source.rows[3].sample_id == "pictures.parquet/00000003"
    assert source.rejected == [] and source.num_unlisted_files == 0


@pytest.mark.parametrize("rows_in_group", [1, 7, 1000])
def test_rows_keep_their_order_whatever_the_row_groups(tmp_path: Path, rows_in_group: int) -> None:
    dataset(range(30)).to_parquet(tmp_path / "pictures.parquet", batch_size=rows_in_group)
    source = read(tmp_path / "pictures.parquet")
    assert pairs(source) == expected(range(30))
    some = [source.rows[number].sample_id for number in (0, 6, 7, 8, 29)]
    assert list(source.images(some)) == [PICTURES[number] for number in (0, 6, 7, 8, 29)]
    assert source.read("pictures.parquet/00000017") == PICTURES[17]


def test_shards_of_a_hub_data_set_make_one_source(tmp_path: Path) -> None:
    (tmp_path / "set/data").mkdir(parents=True)
    for number, name in enumerate(
        ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001")
    ):
        dataset(range(10 * number, 10 * number + 10)).to_parquet(tmp_path / f"set/data/{name}.parquet")
    (tmp_path / "set/README.md").write_text("a card")
    source = read(tmp_path / "set")
    assert pairs(source) == expected(range(30))
    assert [row.split for row in source.rows] == ["train"] * 20 + ["validation"] * 10
    assert source.num_unlisted_files == 1


@pytest.mark.parametrize("num_shards", [1, 4])
def test_save_to_disk(tmp_path: Path, num_shards: int) -> None:
    dataset(range(30)).shuffle(seed=1).save_to_disk(tmp_path / "set", num_shards=num_shards)
    source = read(tmp_path / "set")
    assert pairs(source) == expected(range(30))
    assert [row.split for row in source.rows] == [None] * 30


def test_what_lies_beside_a_saved_data_set_is_no_part_of_it(tmp_path: Path) -> None:
    dataset(range(30)).save_to_disk(tmp_path / "set", num_shards=3)
    dataset(range(10, 30)).save_to_disk(tmp_path / "set", num_shards=2)
    mapped = load_from_disk(tmp_path / "set").map(lambda row: {"text": f"{row['text']} again"})
    assert mapped[0]["text"] == "picture 10 again"
    assert (
        list((tmp_path / "set").glob("cache-*.arrow")) and len(list((tmp_path / "set").glob("data-*"))) == 5
    )
    assert pairs(read(tmp_path / "set")) == expected(range(10, 30))
    (tmp_path / "set/data-00001-of-00002.arrow").unlink()
    with pytest.raises(StageError, match=r"data-00001-of-00002\.arrow: missing, and state\.json lists it"):
        read(tmp_path / "set")


def test_a_saved_data_set_of_splits_keeps_them(tmp_path: Path) -> None:
    splits = {"train": range(10), "test": range(10, 15), "extra": range(15, 20)}
    DatasetDict({name: dataset(numbers) for name, numbers in splits.items()}).save_to_disk(tmp_path / "set")
    source = read(tmp_path / "set")
    assert pairs(source) == expected(range(20))
    assert {(row.sample_id.split("/")[0], row.split) for row in source.rows} == {
        (name, name) for name in splits
    }
    DatasetDict({name: dataset(splits[name]) for name in ("train", "extra")}).save_to_disk(tmp_path / "set")
    assert {row.split for row in read(tmp_path / "set").rows} == {
        "train",
        "extra",
    }  # test is of an earlier save
    alone = read(tmp_path / "set/extra")
    assert pairs(alone) == expected(range(15, 20)) and {row.split for row in alone.rows} == {None}


def test_splits_by_usual_names_and_none_to_train_on(tmp_path: Path) -> None:
    DatasetDict(train_sft=dataset(range(3)), test_sft=dataset(range(3, 5))).save_to_disk(tmp_path / "sft")
    assert [row.split for row in read(tmp_path / "sft").rows] == ["test"] * 2 + ["train"] * 3
    DatasetDict(whole=dataset(range(3)), test=dataset(range(3, 5))).save_to_disk(tmp_path / "odd")
    with pytest.raises(StageError, match="expected a split 'train' to train on, found test, whole"):
        read(tmp_path / "odd")
    DatasetDict(whole=dataset(range(3))).save_to_disk(tmp_path / "one")
    assert {row.split for row in read(tmp_path / "one").rows} == {None}


@pytest.mark.parametrize("writer", [pa.ipc.new_stream, pa.ipc.new_file])
def test_one_arrow_file_of_either_format(tmp_path: Path, writer: Callable[..., Any]) -> None:
    images = [{"bytes": data, "path": None} for data in PICTURES]
    texts = [f"picture {number}" for number in range(30)]
    table = pa.table({"image": pa.array(images, STRUCT), "text": texts})
    with writer(str(tmp_path / "pictures.arrow"), table.schema) as file:
        file.write_table(table, max_chunksize=4)
    assert pairs(read(tmp_path / "pictures.arrow")) == expected(range(30))


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view()])
@pytest.mark.parametrize("text", [pa.string(), pa.large_string(), pa.string_view(), pa.binary()])
def test_bytes_and_texts_of_any_type(tmp_path: Path, kind: pa.DataType, text: pa.DataType) -> None:
    texts = pa.array([f"picture {number}".encode() for number in range(5)], pa.binary())
    table = pa.table({"jpg": pa.array(PICTURES[:5], kind), "txt": texts.cast(text)})
    with pa.ipc.new_file(str(tmp_path / "pictures.arrow"), table.schema) as file:
        file.write_table(table)
    assert pairs(read(tmp_path / "pictures.arrow")) == expected(range(5))


def test_lists_of_captions(tmp_path: Path) -> None:
    features = Features({"image": Image(), "text": List(Value("string"))})
    images = [{"bytes": data, "path": None} for data in PICTURES[:4]]
    texts = [["one", "two", "one"], ["a\n b", None, " "], [], None]
    rows = Dataset.from_dict({"image": images, "text": texts}, features=features)
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "set")
    for path, shard in (
        (tmp_path / "a.parquet", "a.parquet"),
        (tmp_path / "set", "data-00000-of-00001.arrow"),
    ):
        source = read(path)
        assert {row.sample_id: row.captions for row in source.rows} == {
            f"{shard}/00000000": ("one", "two"),
            f"{shard}/00000001": ("a b",),
        }
        assert [row.name[-1] for row in source.rejected] == ["1", "1", "2", "3"]
        assert {row.reason for row in source.rejected} == {"empty caption"}


def test_a_prefix_stands_alone_where_there_is_no_caption(tmp_path: Path) -> None:
    images = [{"bytes": data, "path": None} for data in PICTURES[:5]]
    write(tmp_path / "a.parquet", images, text=["one", "", None, "\u200b", "\u3164"])
    source = read(tmp_path / "a.parquet", Reading("text", 16, caption_prefix="sks dog, "))
    assert [row.captions for row in source.rows] == [("sks dog, one",), *[("sks dog",)] * 4]


def test_rows_without_an_image_are_named_with_the_reason(tmp_path: Path) -> None:
    images = [
        {"bytes": PICTURES[0], "path": None},
        None,
        {"bytes": None, "path": "cats/1.png"},
        {"bytes": None},
    ]
    write(tmp_path / "a.parquet", images, text=[f"picture {number}" for number in range(4)])
    found = pairs(read(tmp_path / "a.parquet"))
    assert found["picture 0"] == PICTURES[0]
    shown = {caption: getattr(content, "strerror", None) for caption, content in found.items()}
    assert shown == {
        "picture 0": None,
        "picture 1": "the row holds no image",
        "picture 2": "the row holds no image, but a path, cats/1.png; `datasets.save_to_disk` puts the image "
        "itself there",
        "picture 3": "the row holds no image",
    }


def test_captions_that_are_none_are_rejected_by_row(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", PICTURES[:2], pa.binary(), text=[5, 6])
    assert reasons(read(tmp_path / "a.parquet")) == {
        "a.parquet/00000000": "caption is not text: 5",
        "a.parquet/00000001": "caption is not text: 6",
    }
    write(
        tmp_path / "b.parquet", PICTURES[:2], pa.binary(), text=pa.array([b"\xff", "ü".encode()], pa.binary())
    )
    source = read(tmp_path / "b.parquet")
    assert reasons(source) == {"b.parquet/00000000": r"caption is not text: b'\xff'"}
    assert source.rows[0].captions == ("ü",)


def test_the_column_of_captions(tmp_path: Path) -> None:
    images = [{"bytes": PICTURES[0], "path": None}]
    write(tmp_path / "a.parquet", images, caption=["short"], long=["long"], number=[1], tags=[["a", "b"]])
    path = tmp_path / "a.parquet"
    assert read(path).rows[0].captions == ("short",)  # there is no text
    assert read(path, Reading("long", 16)).rows[0].captions == ("long",)
    assert read(path, Reading("tags", 16)).rows[0].captions == ("a", "b")
    write(path, images, long=["long"], number=[1], tags=[["a"]])
    with pytest.raises(
        StageError, match=r"no column 'text', its columns of text are long, tags; set prepare"
    ):
        read(path)
    write(path, images, number=[1])
    with pytest.raises(StageError, match="its columns of text are none"):
        read(path)


def test_the_column_of_images(tmp_path: Path) -> None:
    path, texts = tmp_path / "a.parquet", ["picture 0"]
    others = {"conditioning": pa.array([b"other"]), "image.small": pa.array([b"small"])}
    table = pa.table(
        {**others, "image": pa.array(PICTURES[:1]), "text": texts, **{"image.z": pa.array([b"z"])}}
    )
    pq.write_table(table, path)
    assert pairs(read(path)) == expected(range(1))
    pq.write_table(table.rename_columns(["conditioning", "small", "picture", "text", "z"]), path)
    with pytest.raises(
        StageError, match="expected one column of images, found conditioning, small, picture, z"
    ):
        read(path)
    pq.write_table(table.select(["text"]), path)
    with pytest.raises(
        StageError, match=r"expected a column of images, .* found text; images that are named"
    ):
        read(path)
    pq.write_table(
        pa.table({"picture": pa.array(PICTURES[:1]), "text": texts, "image": ["a/path.png"]}), path
    )
    assert pairs(read(path)) == expected(range(1))


def test_images_given_by_path_are_embedded_by_save_to_disk_alone(tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(PICTURES[number])
    lines = [json.dumps({"file_name": f"{number}.png", "text": f"picture {number}"}) for number in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    rows = Dataset.from_dict(
        {"image": [str(folder / f"{n}.png") for n in range(4)], "text": [f"picture {n}" for n in range(4)]},
        features=Features({"image": Image(), "text": Value("string")}),
    )
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "saved")
    for path in (folder, tmp_path / "saved"):
        assert pairs(read(path)) == expected(range(4))
    for content in pairs(read(tmp_path / "a.parquet")).values():
        assert isinstance(content, OSError) and str(folder) in content.strerror


def damages(whole: bytes) -> list[bytes]:
    draws = random.Random(0)
    cuts = [whole[: draws.randrange(len(whole))] for _ in range(10)]
    return [b"", b"PAR1", b"no table", whole[:-1], whole[len(whole) // 2 :], bytes(len(whole)), *cuts]


@pytest.mark.parametrize("form", ["a.parquet", "set/data-00000-of-00001.arrow", "a.arrow"])
def test_a_cut_file_is_one_error_that_names_it(tmp_path: Path, form: str) -> None:
    rows = dataset(range(30))
    rows.save_to_disk(tmp_path / "set")
    rows.to_parquet(tmp_path / "a.parquet")
    shutil.copyfile(tmp_path / "set/data-00000-of-00001.arrow", tmp_path / "a.arrow")
    path = tmp_path / form
    whole, source = path.read_bytes(), path.parent if path.parent.name == "set" else path
    for damaged in damages(whole):
        path.write_bytes(damaged)
        with pytest.raises(StageError, match=f"{path.name}: damaged, or of another kind"):
            pairs(read(source))


@pytest.mark.parametrize("form", ["a.parquet", "a.arrow"])
def test_a_flipped_bit_never_raises_another_error(tmp_path: Path, form: str) -> None:
    rows = dataset(range(8))
    rows.to_parquet(tmp_path / "a.parquet")
    rows.save_to_disk(tmp_path / "set")
    shutil.copyfile(tmp_path / "set/data-00000-of-00001.arrow", tmp_path / "a.arrow")
    whole, draws = (tmp_path / form).read_bytes(), random.Random(2)
    for _ in range(150):
        damaged = bytearray(whole)
        damaged[draws.randrange(len(whole))] ^= 1 << draws.randrange(8)
        (tmp_path / form).write_bytes(damaged)
        try:
            pairs_or_fewer = read(tmp_path / form)
            list(pairs_or_fewer.images([row.sample_id for row in pairs_or_fewer.rows]))
        except StageError:
            continue


@pytest.mark.parametrize("content", ["", "[]", "{}", "{", '{"_data_files": [{}]}', '{"_data_files": 3}'])
def test_a_damaged_list_of_a_saved_data_set_is_one_error(tmp_path: Path, content: str) -> None:
    DatasetDict(train=dataset(range(3)), test=dataset(range(3, 5))).save_to_disk(tmp_path / "set")
    for name in ("train/state.json", "dataset_dict.json"):
        whole = (tmp_path / "set" / name).read_text()
        (tmp_path / "set" / name).write_text(content)
        with pytest.raises(StageError, match=f"{name}: damaged"):
            read(tmp_path / "set")
        (tmp_path / "set" / name).write_text(whole)


def test_a_table_in_a_tar_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    dataset(range(3)).to_parquet(tmp_path / "set/a.parquet")
    shutil.make_archive(str(tmp_path / "set"), "tar", tmp_path / "set")
    with pytest.raises(StageError, match=r"a\.parquet: a table inside a tar is not read; unpack it"):
        read(tmp_path / "set.tar")
    shutil.make_archive(str(tmp_path / "set"), "zip", tmp_path / "set")
    with open_source(tmp_path / "set.zip", READING) as source:
        assert pairs(source) == expected(range(3))


_READ_THROUGH = """
import sys
from pathlib import Path
from stages.lib.data.sources.opening import Reading, open_source

def resident():  # kilobytes of this process's own, without pages of files
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon"))

before, most, size = resident(), 0, 0
with open_source(Path(sys.argv[1]), Reading("text", 16)) as source:
    for content in source.images([row.sample_id for row in source.rows]):
        most, size = max(most, resident()), size + len(content)
print(size, (most - before) * 1024)
"""


@pytest.mark.parametrize("form", ["a.parquet", "a.arrow", "a.tfrecord"])
def test_memory_does_not_grow_with_a_file(tmp_path: Path, form: str) -> None:
    size, count, draws = 2**20, 160, random.Random(0)
    schema = pa.schema([("image", STRUCT), ("text", pa.string())])
    rows = ({"image": {"bytes": draws.randbytes(size), "path": None}, "text": "a"} for _ in range(count))
    if form == "a.parquet":
        table = pa.Table.from_pylist(list(rows), schema)  # a page is read as a whole: a page for each row
        pq.write_table(table, tmp_path / form, row_group_size=count, write_batch_size=1)
        assert pq.ParquetFile(tmp_path / form).num_row_groups == 1
    elif form == "a.arrow":
        with pa.ipc.new_stream(str(tmp_path / form), schema) as file:
            file.write_table(pa.Table.from_pylist(list(rows), schema))
    else:
        writer = TFRecordWriter(str(tmp_path / form))
        for row in rows:
            writer.write({"image": (row["image"]["bytes"], "byte"), "text": (b"a", "byte")})
        writer.close()
    command = [sys.executable, "-c", _READ_THROUGH, str(tmp_path / form)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    read_bytes, growth = map(int, done.stdout.split())
    assert read_bytes == count * size
    assert growth < 48 * size  # a batch, its copies, and what allocators keep
