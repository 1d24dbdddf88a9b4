"""TFRecords as the package `tfrecord` writes them: rows, texts and bytes, and every flipped bit."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tfrecord import TFRecordWriter, example_pb2

from stages.lib.data.sources.listing import PairSource
from stages.lib.data.sources.opening import Reading, open_source
from stages.lib.data.sources.tfrecord import example, records
from stages.lib.frame.errors import StageError
from tests.conftest import draw_image, png

READING = Reading("text", render_resolution=16)
PICTURES = [png(draw_image(seed)) for seed in range(6)]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    writer = TFRecordWriter(str(path))
    for row in rows:
        writer.write({name: (value, kind_of(value)) for name, value in row.items()})
    writer.close()
    return path


def kind_of(value: Any) -> str:
    first = next(iter(value), b"") if isinstance(value, list) else value
    return {bytes: "byte", int: "int", float: "float"}[type(first)]


def read(path: Path, reading: Reading = READING) -> PairSource:
    with open_source(path, reading) as source:
        return source


def found_in(source: PairSource) -> list[tuple[tuple[str, ...], bytes | OSError]]:
    contents = source.images([row.sample_id for row in source.rows])
    return [(row.captions, content) for row, content in zip(source.rows, contents, strict=True)]


def usual(caption: str = "text") -> list[dict[str, Any]]:
    return [
        {"image": data, caption: f"a pïcture {n}".encode(), "width": 80, "score": 0.5, "key": b"%d" % n}
        for n, data in enumerate(PICTURES)
    ]


def test_rows_of_a_file_and_of_shards(tmp_path: Path) -> None:
    expected = [((f"a pïcture {number}",), data) for number, data in enumerate(PICTURES)]
    source = read(write(tmp_path / "a.tfrecord", usual()))
    assert found_in(source) == expected
    assert source.rows[5].sample_id == "a.tfrecord/00000005"
    (tmp_path / "set").mkdir()
    write(tmp_path / "set/data-00000-of-00002.tfrecord", usual()[:2])
    write(tmp_path / "set/data-00001-of-00002.tfrecord", usual()[2:])
    source = read(tmp_path / "set")
    assert found_in(source) == expected
    assert list(source.images([source.rows[number].sample_id for number in (1, 3)])) == [
        PICTURES[1],
        PICTURES[3],
    ]


@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
def test_text_is_told_from_images_whatever_they_are_named(tmp_path: Path, suffix: str) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (65, 66, 67)).save(buffer, suffix)
    rows = [{"source/name": b"cat.png", "picture": buffer.getvalue(), "prompt": "猫".encode(), "label": 3}]
    path = write(tmp_path / "a.tfrecord", rows)
    assert found_in(read(path, Reading("prompt", 16))) == [(("猫",), buffer.getvalue())]
    with pytest.raises(StageError, match=r"no column 'text', its columns of text are prompt, source/name;"):
        read(path)


def test_captions_that_are_missing_empty_several_or_no_text(tmp_path: Path) -> None:
    rows = usual()
    del rows[0]["text"]
    rows[1]["text"] = b""
    rows[2]["text"] = [b"one", b"two"]
    rows[3]["text"] = b"\xff\xfe"
    rows[4]["text"] = []
    rows[5]["image"] = []
    source = read(write(tmp_path / "a.tfrecord", rows))
    assert {row.name[-1]: row.reason for row in source.rejected} == {
        "0": "empty caption",
        "1": "empty caption",
        "3": r"caption is not text: b'\xff\xfe'",
        "4": "empty caption",
    }
    (several, content), (last, missing) = found_in(source)
    assert (several, content, last) == (("one", "two"), PICTURES[2], ("a pïcture 5",))
    assert isinstance(missing, OSError) and missing.strerror == "the row holds no image"


def test_an_example_is_read_as_protobuf_reads_it() -> None:
    draws = random.Random(0)
    for _ in range(200):
        features = {}
        for number in range(draws.randint(0, 5)):
            feature = example_pb2.Feature()
            kind = draws.choice(["bytes", "float", "int64", "none"])
            if kind == "bytes":
                values = [
                    draws.randbytes(draws.choice([0, 1, 127, 128, 300])) for _ in range(draws.randint(0, 3))
                ]
                feature.bytes_list.SetInParent()
                feature.bytes_list.value.extend(values)
            elif kind == "float":
                feature.float_list.value.extend(draws.random() for _ in range(draws.randint(0, 40)))
            elif kind == "int64":
                feature.int64_list.value.extend(draws.randint(-(2**63), 2**63 - 1) for _ in range(3))
            features[f"{'ñ' * draws.randint(0, 80)}{number}"] = feature
        whole = example_pb2.Example(features=example_pb2.Features(feature=features))
        assert example(whole.SerializeToString()) == {
            name: list(feature.bytes_list.value)
            for name, feature in whole.features.feature.items()
            if feature.WhichOneof("kind") == "bytes_list"
        }


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.tfrecord", [{"image": b"\xff12", "text": b"a"}, {"image": b"\xff3", "text": b"b"}]
    )
    whole = path.read_bytes()
    assert len(list(records(memoryview(whole)))) == 2
    for position in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[position // 8] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises(StageError, match=r"a\.tfrecord: damaged, or of another kind .*at byte \d+"):
            read(path)


def test_every_cut_but_one_between_records_is_found(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.tfrecord", usual()).read_bytes()
    ends = [record.offset + record.size + 4 for record in records(memoryview(whole))]
    assert ends[-1] == len(whole) and len(ends) == 6
    for end in {*range(0, len(whole), 37), *(end + step for end in ends for step in (-4, -1, 1, 5, 11, 12))}:
        if end in ends or end > len(whole):
            continue
        (tmp_path / "a.tfrecord").write_bytes(whole[:end])
        with pytest.raises(StageError, match="damaged, or of another kind"):
            read(tmp_path / "a.tfrecord")


def test_records_that_are_no_examples_are_one_error(tmp_path: Path) -> None:
    draws, path = random.Random(1), tmp_path / "a.tfrecord"
    contents = [b"text", b"\xff" * 30, b"\x0a\x80", b"\x0b", *(draws.randbytes(40) for _ in range(300))]
    for content in contents:
        with open(path, "wb") as file:
            size = len(content).to_bytes(8, "little")
            file.write(size + TFRecordWriter.masked_crc(size) + content + TFRecordWriter.masked_crc(content))
        with pytest.raises(StageError, match=r"a\.tfrecord: (damaged|expected a column of images)"):
            read(path)
