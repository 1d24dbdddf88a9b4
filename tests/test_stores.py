"""Zarr stores: complete and checked, or refused with a remedy."""

import numpy as np
import pytest

from stages.lib import stores
from stages.lib.errors import StageError
from stages.lib.stores import ArraySpec, create_store, finish_store, open_store, read_array, write_rows


def build(path, num_rows=150, value=None):
    schema = {
        "mean": ArraySpec((num_rows, 3), np.float16, ("sample", "channel")),
        "sample_id": ArraySpec((num_rows,), str, ("sample",)),
    }
    data = np.arange(num_rows * 3).reshape(num_rows, 3).astype(np.float16) if value is None else value
    group = create_store(path, schema, {"scaling_factor": 0.5})
    text = np.dtypes.StringDType()
    write_rows(group, ({"mean": data[i], "sample_id": np.asarray(f"s{i} ü", text)} for i in range(num_rows)))
    return group, data


@pytest.mark.parametrize("num_rows", [1, 63, 64, 65, 150])
def test_round_trip(tmp_path, num_rows):
    path = tmp_path / "a.zarr"
    group, data = build(path, num_rows)
    finish_store(path, group)
    opened = open_store(path, "encode_images")
    assert opened.attrs["scaling_factor"] == 0.5
    assert np.array_equal(read_array(path, opened, "mean", "encode_images"), data)
    assert read_array(path, opened, "sample_id", "encode_images")[-1] == f"s{num_rows - 1} ü"


def test_large_stores_are_sharded(tmp_path, monkeypatch):
    monkeypatch.setattr(stores, "UNSHARDED_ROWS", 100)
    path = tmp_path / "a.zarr"
    group, data = build(path, 1100)
    finish_store(path, group)
    assert group["mean"].shards == (512, 3)
    assert len(list((path / "mean" / "c").rglob("0"))) > 0
    assert np.array_equal(read_array(path, open_store(path, "x"), "mean", "x"), data)


def test_rows_of_zeros_are_written_so_that_files_can_be_counted(tmp_path):
    path = tmp_path / "a.zarr"
    group, _ = build(path, value=np.zeros((150, 3), np.float16))
    finish_store(path, group)
    open_store(path, "encode_images")


def test_the_same_rows_are_the_same_bytes(tmp_path):
    for name in ("a.zarr", "b.zarr"):
        group, _ = build(tmp_path / name)
        finish_store(tmp_path / name, group)
    assert stores.content_fingerprint(tmp_path / "a.zarr") == stores.content_fingerprint(tmp_path / "b.zarr")


def test_an_unfinished_store_is_refused(tmp_path):
    build(tmp_path / "a.zarr")
    with pytest.raises(StageError, match=r"not complete.*dvc repro encode_images"):
        open_store(tmp_path / "a.zarr", "encode_images")


def test_a_missing_store_is_refused(tmp_path):
    with pytest.raises(StageError, match="dvc repro tokenize"):
        open_store(tmp_path / "none.zarr", "tokenize")


def test_a_deleted_chunk_is_refused_on_opening_and_on_finishing(tmp_path):
    path = tmp_path / "a.zarr"
    group, _ = build(path)
    chunk = path / "mean" / "c" / "1" / "0"
    content = chunk.read_bytes()
    chunk.unlink()
    with pytest.raises(StageError, match=r"mean: expected 3 chunk files, found 2"):
        finish_store(path, group)
    chunk.write_bytes(content)
    finish_store(path, group)
    chunk.unlink()
    with pytest.raises(StageError, match=r"mean: expected 3 chunk files, found 2; run `dvc repro train`"):
        open_store(path, "train")


def test_a_flipped_bit_is_refused(tmp_path):
    path = tmp_path / "a.zarr"
    group, _ = build(path)
    finish_store(path, group)
    chunk = path / "mean" / "c" / "1" / "0"
    content = bytearray(chunk.read_bytes())
    content[10] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(StageError, match=r"mean: damaged.*dvc repro -f encode_images"):
        read_array(path, open_store(path, "encode_images"), "mean", "encode_images")


def test_what_a_kill_left_is_removed(tmp_path):
    path = tmp_path / "a.zarr"
    group, _ = build(path)
    (path / "mean" / "c" / "0" / "0.partial").write_bytes(b"x")
    finish_store(path, group)
    assert not list(path.rglob("*.partial"))


def test_rows_that_break_the_schema_are_refused(tmp_path):
    group = create_store(tmp_path / "a.zarr", {"mean": ArraySpec((2, 3), np.float16, ("sample", "c"))}, {})
    with pytest.raises(StageError, match="schema"):
        write_rows(group, [{"mean": np.zeros(3, np.float32)}] * 2)
    with pytest.raises(StageError, match="schema"):
        write_rows(group, [{"mean": np.zeros(4, np.float16)}] * 2)
