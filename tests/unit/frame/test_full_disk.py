"""A full disk: one clear error, nothing half-written, and the run continues once there is space."""

import contextlib
import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import safetensors.numpy
import torch
import zarr

from stages.lib.core.files import write_atomically
from stages.lib.frame.errors import StageError
from stages.lib.frame.full_disk import describe_full_disk
from stages.lib.frame.run import run_stage
from stages.lib.store.work_store import WorkStore
from stages.lib.training.checkpoints import Checkpoints
from tests.conftest import REPOSITORY

LARGE = np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8)


@contextlib.contextmanager
def mounted(disk: Path, options: str) -> Iterator[Path]:
    """A file system of its own, in memory; the test is skipped where none can be mounted."""
    disk.mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", str(disk)], check=True, capture_output=True
        )
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("file systems cannot be mounted here")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    with mounted(tmp_path / "disk", "size=1m") as disk:
        yield disk


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """Run a function as a stage and return the error that it stops with."""
    shutil.copyfile(REPOSITORY / "params.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SD_WORK", str(tmp_path / "work"))
    for name in ("SD_WORK_MAX_BYTES", "SD_LAUNCH", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)

    def run(main) -> str:
        with pytest.raises(SystemExit) as stopped:
            run_stage("encode", (), lambda params: main())
        return str(stopped.value.code)

    return run


def put(store: WorkStore, index: int) -> None:
    store.put([f"k{index}"], [{"mean": np.full(100_000, index, np.uint8)}])


def test_the_work_store_continues_after_space_was_made(small_disk):
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(500_000))
    store = WorkStore(small_disk / "work", "encode", {"weights": "a"})
    with pytest.raises(OSError, match=r"No space left on device: .*\.safetensors") as full:
        for index in range(10):
            put(store, index)
    assert full.value.errno == errno.ENOSPC
    assert not list(small_disk.rglob("*.partial"))
    kept = len(store)
    assert 0 < kept < 6
    again = WorkStore(small_disk / "work", "encode", {"weights": "a"})
    ballast.unlink()
    for index in range(kept, 7):
        put(again, index)
    keys = [f"k{index}" for index in range(7)]
    assert again.damaged(keys) == []
    assert [found["mean"][-1] for found in again.rows(keys)] == [*range(7)]


def test_checkpoints_keep_the_last_whole_one(small_disk):
    checkpoints = Checkpoints(small_disk, "f" * 64)
    checkpoints.save(1, {"value": torch.zeros(100_000)})
    with pytest.raises(Exception, match=r".") as raised:
        checkpoints.save(2, {"value": torch.ones(200_000)})
    assert "No space left" in describe_full_disk(raised.value)
    assert not list(small_disk.rglob("*.partial"))
    assert checkpoints.load_latest()["global_step"] == 1


def write_zarr(disk: Path) -> None:
    group = zarr.create_group(disk / "store.zarr")
    array = group.create_array("mean", shape=LARGE.shape, dtype=LARGE.dtype, compressors=None)
    array[:] = LARGE


WRITERS = {
    "python": lambda disk: (disk / "file").write_bytes(LARGE.tobytes()),
    "work": lambda disk: write_atomically(disk / "file", LARGE.tobytes()),
    "zarr": write_zarr,
    "pyarrow": lambda disk: pa.parquet.write_table(pa.table({"mean": LARGE}), disk / "pairs.parquet"),
    "safetensors": lambda disk: safetensors.numpy.save_file({"mean": LARGE}, disk / "unet.safetensors"),
    "torch": lambda disk: Checkpoints(disk, "f" * 64).save(1, {"mean": torch.from_numpy(LARGE)}),
}


@pytest.mark.parametrize("writer", WRITERS)
def test_whatever_writes_the_stage_stops_with_one_clear_error(
    stage, small_disk, tmp_path, monkeypatch, writer
):
    monkeypatch.setenv("SD_WORK", str(small_disk))  # where no error names a file, the fullest disk is it
    message = stage(lambda: WRITERS[writer](small_disk))
    assert message.startswith("\nencode: no space is left on the disk of ")
    assert f"(file system {small_disk}, " in message
    assert " bytes free): " in message
    assert message.endswith(
        "What is finished is kept. Free space there, or bound the work directory with "
        "SD_WORK_MAX_BYTES or move it with SD_WORK, and run again"
    )
    assert "\n" not in message.strip()


def test_the_stage_runs_to_its_end_after_space_was_made(stage, small_disk, monkeypatch):
    monkeypatch.setenv("SD_WORK", str(small_disk / "work"))
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(700_000))
    encoded = []

    def encode(params: object = None) -> None:
        store = WorkStore(small_disk / "work", "encode", {})
        for index in range(6):
            if f"k{index}" not in store:
                put(store, index)
                encoded.append(index)

    assert "no space is left" in stage(encode)
    assert 0 < len(encoded) < 4
    ballast.unlink()
    run_stage("encode", (), encode)
    assert encoded == [*range(6)]


def test_a_bound_makes_room_on_a_small_disk(stage, small_disk, monkeypatch):
    monkeypatch.setenv("SD_WORK_MAX_BYTES", "700K")
    for recipe in range(5):
        store = WorkStore(small_disk, "encode", {"recipe": recipe})
        for index in range(5):
            put(store, index)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_failing_write_or_an_exceeded_quota_is_told_from_other_errors(stage, monkeypatch, code):
    def fail(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    message = stage(lambda: write_atomically(Path("rows.safetensors"), b"rows"))
    assert message.startswith("\nencode: no space is left on the disk of rows.safetensors (file system /")
    assert os.strerror(code) in message
    assert not Path("rows.safetensors").exists()


def wrapped() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RuntimeError("unexpected pos 576 vs 534") from error
    except RuntimeError:
        raise StageError("the store could not be written") from None


def grouped() -> None:
    raise ExceptionGroup("two tasks", [ValueError("other"), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))])


def told() -> None:
    raise RuntimeError("I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("main", [wrapped, grouped, told])
def test_a_full_disk_is_found_behind_other_errors(stage, main):
    assert "encode: no space is left on the disk of " in stage(main)


def test_other_errors_are_not_taken_for_a_full_disk():
    error = OSError(errno.EACCES, "Permission denied")
    error.__context__ = ValueError("no space for doubt")
    error.__context__.__context__ = error  # a circle ends
    assert describe_full_disk(error) is None


def test_a_disk_without_inodes_is_told_from_one_without_bytes(tmp_path, stage):
    with mounted(tmp_path / "disk", "size=9m,nr_inodes=4") as disk:
        message = stage(lambda: [write_atomically(disk / name, b"x") for name in "abcde"])
    assert f"no inode is left on the disk of {disk}/d" in message
    assert f"(file system {disk}, " in message and "no room for another file" in message
