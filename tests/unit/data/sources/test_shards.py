"""Shards of webdataset and of img2dataset, by their own writers, are read in place and say the same."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from tfrecord import TFRecordWriter, example_pb2
from webdataset import ShardWriter, TarWriter

from stages.lib.data.sources.listing import PairSource
from stages.lib.data.sources.opening import Reading, open_source
from stages.lib.frame.errors import StageError
from tests.conftest import draw_image, png

READING = Reading("text", render_resolution=16)
PICTURES = [png(draw_image(seed)) for seed in range(25)]


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing is ever unpacked there."""
    monkeypatch.setenv("SD_WORK", str(tmp_path / "work"))
    yield tmp_path / "work"
    assert not (tmp_path / "work").exists()


def read(path: Path, reading: Reading = READING) -> PairSource:
    with open_source(path, reading) as source:
        return source


def pairs(source: PairSource) -> dict[str, tuple[tuple[str, ...], bytes]]:
    """sample_id -> captions and bytes."""
    contents = source.images([row.sample_id for row in source.rows])
    found = {row.sample_id: (row.captions, data) for row, data in zip(source.rows, contents, strict=True)}
    assert not [data for _, data in found.values() if isinstance(data, OSError)]
    return found


def test_a_shard_writer(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with ShardWriter(f"{tmp_path}/set/%06d.tar", maxcount=10, verbose=0) as writer:
        for number, data in enumerate(PICTURES):
            writer.write({"__key__": f"{number:04d}", "png": data, "txt": f"pïcture {number}", "cls": 3})
    assert len(list((tmp_path / "set").iterdir())) == 3
    source = read(tmp_path / "set")
    assert pairs(source) == {
        f"{number // 10:06d}.tar/{number:04d}.png": ((f"pïcture {number}",), data)
        for number, data in enumerate(PICTURES)
    }
    assert source.rejected == [] and source.num_unlisted_files == 25  # each sample's .cls
    one = read(tmp_path / "set/000001.tar")
    assert list(pairs(one)) == [f"{number:04d}.png" for number in range(10, 20)]


def test_keys_with_folders_in_them_and_captions_of_each_kind(tmp_path: Path) -> None:
    with TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "cats/white/0", "png": PICTURES[0], "txt": "a white cat"})
        writer.write(
            {"__key__": "cats/white/1", "jpg": PICTURES[1], "json": {"caption": "a cat", "text": ["x", "y"]}}
        )
        writer.write({"__key__": "dogs/0", "webp": PICTURES[2], "json": {"caption": "a dog", "id": 3}})
        writer.write({"__key__": "dogs/1", "png": PICTURES[3], "caption": b"a brown dog"})
        writer.write({"__key__": "dogs/1.5", "png": PICTURES[4], "txt": "a dog and a half"})
        writer.write({"__key__": "dogs/2", "png": PICTURES[5]})
    expected = {
        "cats/white/0.png": (("a white cat",), PICTURES[0]),
        "cats/white/1.jpg": (("x", "y"), PICTURES[1]),
        "dogs/0.webp": (("a dog",), PICTURES[2]),
        "dogs/1.png": (("a brown dog",), PICTURES[3]),
        "dogs/1.5.png": (("a dog and a half",), PICTURES[4]),
    }
    source = read(tmp_path / "a.tar")
    assert pairs(source) == expected
    assert [row.name for row in source.rejected] == ["dogs/2.png"]
    assert source.rejected[0].reason.startswith("no caption, expected a .txt or .caption of the same name")
    (tmp_path / "set/below").mkdir(parents=True)
    (tmp_path / "a.tar").rename(tmp_path / "set/below/a.tar")
    assert pairs(read(tmp_path / "set")) == {f"below/a.tar/{name}": row for name, row in expected.items()}


def test_one_folder_of_all_keys_is_left_out_of_the_names_of_one_tar_alone(tmp_path: Path) -> None:
    with TarWriter(str(tmp_path / "a.tar")) as writer:
        for number in range(2):
            writer.write({"__key__": f"all/{number}", "png": PICTURES[number], "txt": "a"})
    assert list(pairs(read(tmp_path / "a.tar"))) == ["0.png", "1.png"]
    (tmp_path / "set").mkdir()
    (tmp_path / "a.tar").rename(tmp_path / "set/a.tar")
    assert list(pairs(read(tmp_path / "set"))) == ["a.tar/all/0.png", "a.tar/all/1.png"]


def test_the_same_keys_in_two_shards_are_two_samples(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for shard in range(2):
        with TarWriter(f"{tmp_path}/set/{shard}.tar") as writer:
            writer.write({"__key__": "0", "png": PICTURES[shard], "txt": f"shard {shard}"})
    assert pairs(read(tmp_path / "set")) == {
        f"{shard}.tar/0.png": ((f"shard {shard}",), PICTURES[shard]) for shard in range(2)
    }


def test_a_caption_of_another_shard_or_of_the_folder_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with TarWriter(f"{tmp_path}/set/0.tar") as writer:
        writer.write({"__key__": "0", "png": PICTURES[0]})
        writer.write({"__key__": "1", "png": PICTURES[1], "txt": "its own"})
    with TarWriter(f"{tmp_path}/set/1.tar") as writer:
        writer.write({"__key__": "0", "txt": "of another shard"})
    (tmp_path / "set/0.txt").write_text("of the folder")
    source = read(tmp_path / "set")
    assert pairs(source) == {"0.tar/1.png": (("its own",), PICTURES[1])}
    assert [row.name for row in source.rejected] == ["0.tar/0.png", "0.txt", "1.tar/0.txt"]


def test_a_table_in_a_tar_lists_its_images(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"file_name": f"{n}.png", "text": f"picture {n}"}) + "\n" for n in range(3))
    with TarWriter(str(tmp_path / "a.tar")) as writer:
        writer.write({"__key__": "metadata", "jsonl": lines.encode()})
        for number in range(3):
            writer.write({"__key__": f"{number}", "png": PICTURES[number]})
    assert pairs(read(tmp_path / "a.tar")) == {f"{n}.png": ((f"picture {n}",), PICTURES[n]) for n in range(3)}


def test_a_damaged_shard_refuses_the_source_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    with ShardWriter(f"{tmp_path}/set/%06d.tar", maxcount=10, verbose=0) as writer:
        for number, data in enumerate(PICTURES):
            writer.write({"__key__": f"{number:04d}", "png": data, "txt": "a"})
    path = tmp_path / "set/000001.tar"
    path.write_bytes(path.read_bytes().rstrip(b"\0"))
    with pytest.raises(StageError, match=r"set/000001\.tar: cannot be unpacked .*; nothing of it is used"):
        read(tmp_path / "set")


def test_compressed_shards_name_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    for shard in range(2):
        with TarWriter(f"{tmp_path}/set/{shard}.tar.gz", compress=True) as writer:
            writer.write({"__key__": "0", "png": PICTURES[0], "txt": "a"})
    with pytest.raises(StageError, match=r"seen: 0\.tar\.gz, unpack it there"):
        read(tmp_path / "set")


# img2dataset

IMG2DATASET = importlib.util.find_spec("img2dataset")  # needs opencv, albumentations and an old pandas to run
SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("url", "caption", "key", "status", "error_message")]
    + [("width", pa.int32()), ("height", pa.int32()), ("sha256", pa.string()), ("similarity", pa.float64())]
)


class RawTFRecordWriter(TFRecordWriter):
    """As TensorFlow's, which is given the bytes of an example."""

    def write(self, datum: bytes, sequence_datum: None = None) -> None:
        size = len(datum).to_bytes(8, "little")
        self.file.write(size + self.masked_crc(size) + datum + self.masked_crc(datum))


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The module of img2dataset's writers, with the package `tfrecord` in the place of TensorFlow."""
    if IMG2DATASET is None or IMG2DATASET.origin is None:
        pytest.skip("pip install --no-deps img2dataset==1.47.0")
    path = Path(IMG2DATASET.origin).parent / "writer.py"
    spec = importlib.util.spec_from_file_location("img2dataset_writer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    classes = {name: getattr(example_pb2, name) for name in dir(example_pb2) if name[0].isupper()}
    for name, values in (
        ("tensorflow_io", {}),
        ("tensorflow.python.lib.io.tf_record", {"TFRecordWriter": RawTFRecordWriter}),
        ("tensorflow.python.training.training", classes),
    ):
        stand_in = types.ModuleType(name)
        vars(stand_in).update(values)
        for depth in range(1, name.count(".") + 1):
            above = ".".join(name.split(".")[:depth])
            monkeypatch.setitem(sys.modules, above, sys.modules.get(above) or types.ModuleType(above))
        monkeypatch.setitem(sys.modules, name, stand_in)
    return module


def download(writer: Any, folder: Path, first: int) -> None:
    """What img2dataset writes of a shard of ten, the last of which could not be fetched."""
    for number in range(first, first + 10):
        is_there = number % 10 != 9
        key = f"{number // 10:05d}{number % 10:04d}"
        caption = {1: "", 2: None, 3: " two\nlines "}.get(number, f"pïcture {number}")
        meta = {
            "url": f"https://example.com/{number}.png",
            "caption": caption,
            "key": key,
            "status": "success" if is_there else "failed_to_download",
            "error_message": None if is_there else "timed out",
            "width": 80 if is_there else None,
            "height": 72 if is_there else None,
            "sha256": "0" * 64 if is_there else None,
            "similarity": 0.25,
        }
        writer.write(PICTURES[number] if is_there else None, key, caption, meta)
    writer.close()
    (folder / f"{first // 10:05d}_stats.json").write_text(json.dumps({"count": 10, "successes": 9}))


FORMATS = ["Files", "WebDataset", "Parquet", "TFRecord"]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("caption_column", ["text", "caption", "url"])
def test_the_formats_of_img2dataset_say_the_same(
    tmp_path: Path, writers: types.ModuleType, form: str, caption_column: str
) -> None:
    make = getattr(writers, f"{form}SampleWriter")
    schema = SCHEMA.append(pa.field("txt", pa.string())) if form == "Parquet" else SCHEMA
    (tmp_path / "set").mkdir()
    for shard in range(2):
        writer = make(shard, str(tmp_path / "set"), True, 5, schema, "png")
        download(writer, tmp_path / "set", 10 * shard)
    source = read(tmp_path / "set", Reading(caption_column, 16))
    contents = source.images([row.sample_id for row in source.rows])
    found = {
        row.captions: data
        for row, data in zip(source.rows, contents, strict=True)
        if not isinstance(data, OSError)
    }
    there = [number for number in range(20) if number % 10 != 9]
    if caption_column == "url":
        said = {number: f"https://example.com/{number}.png" for number in there}
    else:
        said = {number: f"pïcture {number}" for number in there if number not in (1, 2)} | {3: "two lines"}
    assert found == {(caption,): PICTURES[number] for number, caption in said.items()}
    assert [row.reason for row in source.rejected] == ["empty caption"] * (len(there) - len(said))


def test_what_the_formats_of_img2dataset_need_is_not_read_as_text(
    tmp_path: Path, writers: types.ModuleType
) -> None:
    """A Parquet file without images lies beside the shards of every other format."""
    (tmp_path / "set").mkdir()
    for form in ("Files", "WebDataset", "TFRecord"):
        (tmp_path / form).mkdir()
        download(
            getattr(writers, f"{form}SampleWriter")(0, str(tmp_path / form), True, 5, SCHEMA, "png"),
            tmp_path / form,
            0,
        )
        assert (tmp_path / form / "00000.parquet").is_file()
        assert len(read(tmp_path / form).rows) == 7
