"""Zarr stores: complete and checked, or refused with the file and a remedy."""

import hashlib
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import zarr

from stages.lib.frame.errors import StageError
from stages.lib.store.zarr_store import (
    ArraySpec,
    create_store,
    finish_store,
    iter_array,
    open_store,
    read_array,
    verify_store,
    write_rows,
)
from tests.conftest import REPOSITORY, content_fingerprint

TEXT = np.dtypes.StringDType()
REMEDY = "run `dvc repro -f -s encode_images`"


def schema(num_rows, prefix=""):
    return {
        f"{prefix}mean": ArraySpec((num_rows, 3), np.float16, ("sample", "channel")),
        f"{prefix}sample_id": ArraySpec((num_rows,), str, ("sample",)),
    }


def rows(num_rows, values=None):
    values = np.arange(num_rows * 3).reshape(num_rows, 3).astype(np.float16) if values is None else values
    return [{"mean": values[i], "sample_id": np.asarray(f"s{i} ü", TEXT)} for i in range(num_rows)]


def build(path, num_rows=150, values=None, **attributes):
    """A finished store at ``path``."""
    group = create_store(path, schema(num_rows), {"scaling_factor": 0.5, **attributes})
    write_rows(group, rows(num_rows, values))
    finish_store(path, group)
    return path


@pytest.fixture
def store(tmp_path):
    return build(tmp_path / "latents.zarr")


@pytest.fixture
def bucketed(tmp_path):
    path = tmp_path / "latents.zarr"
    group = create_store(path, schema(70, "64x96/") | schema(5, "96x64/"), {"scaling_factor": 0.5})
    write_rows(group["64x96"], rows(70))
    write_rows(group["96x64"], rows(5, np.ones((5, 3), np.float16)))
    finish_store(path, group)
    return path


def files_of(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


def refused(path):
    """What `open_store` says, one line that ends in the remedy."""
    with pytest.raises(StageError) as error:
        open_store(path, "encode_images")
    message = str(error.value)
    assert message.startswith(str(path))
    assert message.endswith(REMEDY)
    assert "\n" not in message
    return message


def edit_attributes(path, **changes):
    document = json.loads((path / "zarr.json").read_text())
    document["attributes"] |= changes
    document["attributes"] = {name: v for name, v in document["attributes"].items() if v is not None}
    (path / "zarr.json").write_text(json.dumps(document))


@pytest.mark.parametrize("num_rows", [1, 63, 64, 65, 150])
def test_round_trip(tmp_path, num_rows):
    path = build(tmp_path / "a.zarr", num_rows)
    opened = open_store(path, "encode_images")
    expected = np.arange(num_rows * 3).reshape(num_rows, 3)
    assert opened.attrs["scaling_factor"] == 0.5
    assert np.array_equal(read_array(path, opened, "mean", "encode_images"), expected)
    assert read_array(path, opened, "sample_id", "encode_images")[-1] == f"s{num_rows - 1} ü"


def test_groups_hold_arrays_of_their_own(bucketed):
    opened = verify_store(bucketed, "encode_images")
    assert sorted(opened.group_keys()) == ["64x96", "96x64"]
    assert read_array(bucketed, opened, "64x96/mean", "encode_images").shape == (70, 3)
    assert (read_array(bucketed, opened["96x64"], "mean", "encode_images") == 1).all()
    assert "missing 64x96/mean/c/1/0;" in ((bucketed / "64x96/mean/c/1/0").unlink() or refused(bucketed))


def test_a_store_is_plain_zarr(bucketed):
    group = zarr.open_group(bucketed, mode="r")
    assert group["96x64/mean"].metadata.dimension_names == ("sample", "channel")
    assert group["64x96/sample_id"][69] == "s69 ü"


def test_ten_thousand_rows_and_more_are_sharded(tmp_path):
    values = np.arange(30_003).reshape(-1, 3).astype(np.float32).astype(np.float16)
    path = build(tmp_path / "a.zarr", 10_001, values)
    group = verify_store(path, "encode_images")
    assert group["mean"].shards == (512, 3)
    assert group["mean"].chunks == (8, 3)
    assert np.array_equal(read_array(path, group, "mean", "x"), values)
    blocks = list(iter_array(path, group, "mean", "x"))
    assert [len(block) for block in blocks] == [512] * 19 + [273]
    assert np.array_equal(np.concatenate(blocks), values)
    for damage in (flip, truncate, delete):
        for name in ("mean/c/7/0", "sample_id/c/19"):
            copy = shutil.copytree(path, tmp_path / f"{damage.__name__}-{name[:4]}")
            damage(copy / name)
            assert name in refused(copy)


def test_rows_of_zeros_are_written_so_that_files_can_be_counted(tmp_path):
    verify_store(build(tmp_path / "a.zarr", values=np.zeros((150, 3), np.float16)), "encode_images")


def test_the_same_rows_are_the_same_bytes_and_fingerprint(tmp_path):
    one, other = build(tmp_path / "a.zarr"), build(tmp_path / "elsewhere" / "b.zarr")
    assert [file.read_bytes() for file in files_of(one)] == [file.read_bytes() for file in files_of(other)]
    assert content_fingerprint(one) == content_fingerprint(other)
    fingerprint = open_store(one, "x").attrs["fingerprint"]
    assert re.fullmatch("[0-9a-f]{64}", fingerprint)
    assert open_store(other, "x").attrs["fingerprint"] == fingerprint
    values = np.arange(450).reshape(150, 3).astype(np.float16)
    values[149, 2] += 1
    changed = [
        build(tmp_path / "c.zarr", values=values),
        build(tmp_path / "d.zarr", scaling_factor=0.25),
        build(tmp_path / "e.zarr", resolution=64),
        build(tmp_path / "f.zarr", 149),
    ]
    assert len({fingerprint, *(open_store(path, "x").attrs["fingerprint"] for path in changed)}) == 5


def test_the_recorded_hashes_are_those_of_sha256(store):
    recorded = open_store(store, "x").attrs["files"]
    files = [file for file in files_of(store) if file != store / "zarr.json"]
    assert recorded == {
        file.relative_to(store).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def empty(file):
    file.write_bytes(b"")


def delete(file):
    file.unlink()


@pytest.mark.parametrize("damage", [flip, truncate, empty, delete])
def test_damage_to_any_file_names_it(store, tmp_path, damage):
    for file in files_of(store):
        name = file.relative_to(store).as_posix()
        copy = shutil.copytree(store, tmp_path / "copy")
        damage(copy / name)
        if damage is delete and name == "zarr.json":
            with pytest.raises(StageError, match=r"expected a Zarr store, found none; run `dvc repro enc"):
                open_store(copy, "encode_images")
        else:
            kind = "missing" if damage is delete else "changed"
            expected = "zarr.json: " if name == "zarr.json" else f"damaged, {kind} {name}; "
            assert expected in refused(copy)
        shutil.rmtree(copy)


def test_every_byte_of_the_root_counts(tmp_path):
    path = build(tmp_path / "a.zarr", 1)
    content = (path / "zarr.json").read_bytes()
    for position in range(len(content)):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        (path / "zarr.json").write_bytes(flipped)
        refused(path)


def test_a_deleted_array_is_named(store):
    shutil.rmtree(store / "mean")
    assert "missing mean/c/0/0, mean/c/1/0, mean/c/2/0 and 1 more;" in refused(store)


def test_a_file_too_many_is_named(store):
    (store / "mean/c/3").mkdir()
    (store / "mean/c/3/0").write_bytes(b"x")
    assert "unexpected mean/c/3/0;" in refused(store)


def test_files_of_another_run_are_named(store, tmp_path):
    other = build(tmp_path / "b.zarr", values=np.ones((150, 3), np.float16))
    shutil.copy(other / "mean/c/1/0", store / "mean/c/1/0")  # its checksum is right
    assert "changed mean/c/1/0;" in refused(store)


@pytest.mark.parametrize("change", [{"scaling_factor": 0.18215}, {"extra": 1}, {"complete": None}])
def test_attributes_changed_by_hand_are_refused(store, change):
    edit_attributes(store, **change)
    assert "zarr.json: changed since it was written" in refused(store)


def test_an_unfinished_store_is_refused(tmp_path, store):
    edit_attributes(store, complete=False, fingerprint=None, files=None)
    assert "not complete" in refused(store)

    def killed():
        yield from rows(100)
        raise KeyboardInterrupt

    path = tmp_path / "b.zarr"
    group = create_store(path, schema(150), {})
    with pytest.raises(KeyboardInterrupt):
        write_rows(group, killed())
    assert (path / "mean/c/0/0").exists()
    assert not (path / "mean/c/1/0").exists()
    assert "not complete" in refused(path)
    with pytest.raises(StageError, match=r"mean: expected 3 chunk files, found 1"):
        finish_store(path, group)
    assert "not complete" in refused(path)


def test_a_kill_while_the_last_file_is_written_leaves_the_store_incomplete(tmp_path, monkeypatch):
    path = tmp_path / "a.zarr"
    group = create_store(path, schema(150), {})
    write_rows(group, rows(150))
    before = (path / "zarr.json").read_bytes()

    def killed(*_):
        raise OSError("killed before the rename")

    monkeypatch.setattr("pathlib.Path.replace", killed)
    with pytest.raises(OSError, match="killed"):
        finish_store(path, group)
    monkeypatch.undo()
    assert (path / "zarr.json").read_bytes() == before
    assert "not complete" in refused(path)


def test_a_missing_store_is_refused(tmp_path):
    with pytest.raises(StageError, match="found none; run `dvc repro tokenize`"):
        open_store(tmp_path / "none.zarr", "tokenize")


def test_what_a_kill_left_is_removed(tmp_path):
    path = tmp_path / "a.zarr"
    group = create_store(path, schema(150), {})
    write_rows(group, rows(150))
    (path / "mean" / "c" / "0" / "0.partial").write_bytes(b"x")
    finish_store(path, group)
    assert not list(path.rglob("*.partial"))
    open_store(path, "encode_images")


def test_a_file_that_changes_after_opening_is_not_read_as_data(store):
    group = open_store(store, "encode_images")
    flip(store / "mean/c/1/0")
    with pytest.raises(StageError, match=r"mean: damaged.*dvc repro -f -s encode_images"):
        read_array(store, group, "mean", "encode_images")
    with pytest.raises(StageError, match=r"mean/c/1/0: damaged.*dvc repro -f -s encode_images"):
        list(iter_array(store, group, "mean", "encode_images"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_named(tmp_path, value):
    values = np.zeros((150, 3), np.float16)
    values[[70, 149], 1] = value
    path = build(tmp_path / "a.zarr", values=values)
    with pytest.raises(StageError, match=r"a\.zarr/mean: non-finite values in rows 70;"):
        verify_store(path, "encode_images")


def test_arrays_of_a_group_have_as_many_rows(tmp_path):
    path = tmp_path / "a.zarr"
    arrays = {"mean": schema(150)["mean"], "sample_id": schema(100)["sample_id"]}
    group = create_store(path, arrays, {})
    write_rows(group, ({"mean": row["mean"]} for row in rows(150)))
    write_rows(group, ({"sample_id": row["sample_id"]} for row in rows(100)))
    finish_store(path, group)
    with pytest.raises(StageError, match=r"sample_id: 100 rows, other arrays beside it have 150"):
        verify_store(path, "encode_images")


@pytest.mark.parametrize("num_rows", [64, 149, 151])
def test_another_number_of_rows_is_refused(tmp_path, num_rows):
    group = create_store(tmp_path / "a.zarr", schema(150), {})
    with pytest.raises(StageError, match=rf"^{tmp_path}/a\.zarr/mean: expected 150 rows, got {num_rows}; "):
        write_rows(group, rows(num_rows))


def test_rows_that_break_the_schema_are_refused(tmp_path):
    group = create_store(tmp_path / "a.zarr", {"mean": ArraySpec((2, 3), np.float16, ("sample", "c"))}, {})
    with pytest.raises(StageError, match="schema"):
        write_rows(group, [{"mean": np.zeros(3, np.float32)}] * 2)
    with pytest.raises(StageError, match="schema"):
        write_rows(group, [{"mean": np.zeros(4, np.float16)}] * 2)


def test_an_array_without_rows_is_refused(tmp_path):
    with pytest.raises(StageError, match=r"64x96/mean: expected one row or more, got none"):
        create_store(tmp_path / "a.zarr", schema(0, "64x96/"), {})


def show(path):
    command = [sys.executable, "-m", "stages.show_store", str(path)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_a_store_is_shown(bucketed):
    shown = show(bucketed)
    assert shown.returncode == 0
    assert shown.stderr == ""
    fingerprint = open_store(bucketed, "x").attrs["fingerprint"]
    for part in (
        "scaling_factor: 0.5",
        "complete: true",
        fingerprint,
        "64x96/mean: float16, sample 70, channel 3",
        f"chunks (64, 3), 2 of 2 files, {2 * (64 * 3 * 2 + 4)} bytes",  # the last chunk is padded
        "96x64/sample_id: text, sample 5",
        "every file has the hash recorded",
    ):
        assert part in shown.stdout, (part, shown.stdout)


def test_a_store_that_is_not_whole_is_shown_with_status_1(bucketed):
    (bucketed / "96x64/mean/c/0/0").unlink()
    shown = show(bucketed)
    assert shown.returncode == 1
    assert "0 of 1 files" in shown.stdout
    assert "every file" not in shown.stdout
    assert f"missing 96x64/mean/c/0/0; {REMEDY}" in shown.stderr
    assert "Traceback" not in shown.stderr
    (bucketed / "64x96/mean/zarr.json").write_bytes(b"{")
    shown = show(bucketed)
    assert shown.returncode == 1
    assert "changed 64x96/mean/zarr.json" in shown.stderr
    assert "Traceback" not in shown.stderr
