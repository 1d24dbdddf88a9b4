"""The work store: rows come back as they were put, or not at all."""

import errno
import fcntl
import os
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from stages.lib.core.files import open_atomically, remove_partials, write_atomically
from stages.lib.core.fingerprints import fingerprint
from stages.lib.frame.errors import StageError
from stages.lib.frame.work_directory import work_root
from stages.lib.store import work_store as work
from stages.lib.store.work_store import WorkStore
from tests.conftest import REPOSITORY


def row(value: float) -> dict[str, np.ndarray]:
    return {"mean": np.full((4, 2, 2), value, np.float16), "logvar": np.full((4, 2, 2), -value, np.float16)}


def filled(root: Path, recipe: dict | None = None) -> WorkStore:
    store = WorkStore(root, "encode", recipe or {"weights": "a"})
    store.put(["k0", "k1"], [row(0), row(1)])
    store.put(["k2"], [row(2)])
    return store


def test_rows_survive_reopening_in_any_order(tmp_path):
    filled(tmp_path)
    store = WorkStore(tmp_path, "encode", {"weights": "a"})
    assert len(store) == 3
    found = list(store.rows(["k2", "k0", "k1", "k0"]))
    assert [float(values["mean"][0, 0, 0]) for values in found] == [2, 0, 1, 0]
    assert found[0]["logvar"].dtype == np.float16
    assert "k3" not in store


def test_another_recipe_shares_nothing(tmp_path):
    filled(tmp_path)
    assert "k0" not in WorkStore(tmp_path, "encode", {"weights": "b"})
    assert "k0" not in WorkStore(tmp_path, "other", {"weights": "a"})


@pytest.mark.parametrize("kept_bytes", [5, 100, -7])
def test_a_truncated_block_is_left_out_and_the_rest_is_kept(tmp_path, kept_bytes):
    store = filled(tmp_path)
    (block,) = (path for path in store.directory.glob("*.safetensors") if b"k0" in path.read_bytes())
    block.write_bytes(block.read_bytes()[:kept_bytes])
    reopened = WorkStore(tmp_path, "encode", {"weights": "a"})
    assert [key for key in ("k0", "k1", "k2") if key in reopened] == ["k2"]
    assert reopened.damaged(["k0", "k1", "k2"]) == []


def test_a_flipped_bit_is_found_before_anything_is_read(tmp_path):
    store = filled(tmp_path)
    for block in store.directory.glob("*.safetensors"):
        content = bytearray(block.read_bytes())
        content[-3] ^= 4
        block.write_bytes(content)
    reopened = WorkStore(tmp_path, "encode", {"weights": "a"})
    assert sorted(reopened.damaged(["k0", "k1", "k2"])) == ["k0", "k1", "k2"]
    assert len(reopened) == 0


def test_a_partial_file_is_never_a_block(tmp_path):
    """Whoever holds its lock is writing it, on this host or in another container; else nobody is."""
    store = filled(tmp_path)
    held, left = (store.directory / f"{'0' * 32}.safetensors.{name}.partial" for name in ("held", "left"))
    left.write_bytes(b"half")
    with open(held, "wb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        assert len(WorkStore(tmp_path, "encode", {"weights": "a"})) == 3
        assert (held.exists(), left.exists()) == (True, False)
    WorkStore(tmp_path, "encode", {"weights": "a"})
    assert not held.exists()


def test_two_that_write_one_file_at_once_publish_one_whole_file(tmp_path):
    """Two containers may have one host name and one process id."""
    with open_atomically(tmp_path / "row") as first, open_atomically(tmp_path / "row") as second:
        assert len(list(tmp_path.glob("*.partial"))) == 2
        first.write(b"a" * 10)
        second.write(b"b" * 20)
        remove_partials(tmp_path)
    assert (tmp_path / "row").read_bytes() == b"a" * 10
    assert not list(tmp_path.glob("*.partial"))


def test_what_a_killed_process_was_writing_is_removed_and_what_is_being_written_stays(tmp_path):
    def killed() -> None:
        with open_atomically(tmp_path / "killed"):
            os._exit(0)

    os.waitpid(elsewhere(killed), 0)
    with open_atomically(tmp_path / "alive"):
        assert len(list(tmp_path.glob("*.partial"))) == 2
        remove_partials(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["alive"]


def test_fingerprint_ignores_key_order_alone():
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


@pytest.mark.parametrize(
    ("directory", "expected"),
    [
        ("repo", "repo/.work"),
        ("repo/.dvc/tmp/exps/tmpabc", "repo/.work"),
        ("repo/.dvc/tmp/exps/standalone/x", "repo/.work"),
    ],
)
def test_experiments_share_the_main_checkouts_work_directory(tmp_path, monkeypatch, directory, expected):
    monkeypatch.delenv("SD_WORK", raising=False)
    (tmp_path / directory).mkdir(parents=True)
    monkeypatch.chdir(tmp_path / directory)
    assert work_root() == (tmp_path / expected).resolve()
    monkeypatch.setenv("SD_WORK", str(tmp_path / "elsewhere"))
    assert work_root() == (tmp_path / "elsewhere").resolve()


def test_a_flipped_bit_anywhere_in_a_block_never_comes_back_as_data(tmp_path):
    store = filled(tmp_path)
    (path,) = (path for path in store.directory.glob("*.safetensors") if b"k0" in path.read_bytes())
    whole = path.read_bytes()
    expected = [row(0), row(1)]
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        try:
            found = list(WorkStore(tmp_path, "encode", {"weights": "a"}).rows(["k0", "k1"]))
        except (StageError, KeyError):
            continue
        for got, wanted in zip(found, expected, strict=True):
            assert all(np.array_equal(got[name], wanted[name]) for name in wanted), position
            assert got.keys() == wanted.keys(), position


def test_blocks_are_safetensors_and_the_same_bytes_in_every_process(tmp_path):
    script = """
from pathlib import Path
import numpy as np
from stages.lib.store.work_store import WorkStore
WorkStore(Path(), "encode", {"weights": "a"}).put(["k2"], [{"mean": np.ones(3), "logvar": np.zeros(2)}])
"""
    blocks = []
    for name in "ab":
        (tmp_path / name).mkdir()
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        subprocess.run([sys.executable, "-c", script], cwd=tmp_path / name, env=environment, check=True)
        blocks += (tmp_path / name).rglob("*.safetensors")
    assert blocks[0].read_bytes() == blocks[1].read_bytes()
    assert np.array_equal(safetensors.numpy.load_file(blocks[0])["mean"][0], np.ones(3))


def test_scalars_flags_and_pixels_keep_their_dtype(tmp_path):
    rows = [
        {
            "psnr": np.float32(30.5 + index),
            "cropped": np.asarray(index == 1),
            "pixels": np.full((2, 3, 3), index, np.uint8),
            "size": np.asarray([64, index], np.int64),
        }
        for index in range(3)
    ]
    WorkStore(tmp_path, "encode", {}).put(["a", "b", "c"], rows)
    store = WorkStore(tmp_path, "encode", {})
    assert store.damaged("abc") == []
    for found, expected in zip(store.rows("cab"), [rows[2], rows[0], rows[1]], strict=True):
        for name, value in expected.items():
            assert found[name].dtype == value.dtype
            assert found[name].shape == value.shape
            assert np.array_equal(found[name], value)


def test_rows_in_another_memory_layout_keep_their_values(tmp_path):
    channels_last = np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1)
    store = WorkStore(tmp_path, "encode", {})
    store.put(["a", "b"], [{"mean": channels_last}, {"mean": channels_last[:, ::-1]}])
    assert store.damaged("ab") == []
    first, second = store.rows("ab")
    assert np.array_equal(first["mean"], channels_last)
    assert np.array_equal(second["mean"], channels_last[:, ::-1])


@pytest.mark.parametrize(
    "other",
    [
        {"mean": np.zeros((4, 2, 2), np.float32), "logvar": np.zeros((4, 2, 2), np.float16)},
        {"mean": np.zeros((4, 2, 3), np.float16), "logvar": np.zeros((4, 2, 2), np.float16)},
        {"mean": np.zeros((4, 2, 2), np.float16)},
        row(0) | {"more": np.zeros(1)},
    ],
)
def test_rows_of_one_block_must_be_alike(tmp_path, other):
    store = WorkStore(tmp_path, "encode", {})
    with pytest.raises(ValueError, match=r"rows of one block must be alike: a is .*, b is "):
        store.put(["a", "b"], [row(0), other])
    assert "a" not in store


def test_a_random_order_reads_each_row_alone_and_keeps_memory_flat(tmp_path, monkeypatch):
    monkeypatch.setattr(work, "NUM_OPEN_BLOCKS", 3)
    size = 32 * 1024
    keys = [f"k{index}" for index in range(5 * 64)]
    store = WorkStore(tmp_path, "encode", {})
    for start in range(0, len(keys), 64):  # five blocks of 2 MiB
        values = [{"mean": np.full(size, index % 251, np.uint8)} for index in range(start, start + 64)]
        store.put(keys[start : start + 64], values)
    order = list(range(len(keys)))
    random.Random(0).shuffle(order)

    read = []
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda *arguments: read.append(preadv(*arguments)) or read[-1])
    num_files = len(os.listdir("/proc/self/fd"))
    tracemalloc.start()
    for index, found in zip(order, store.rows([keys[index] for index in order]), strict=True):
        assert found["mean"][0] == found["mean"][-1] == index % 251
        assert len(os.listdir("/proc/self/fd")) <= num_files + 3
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(os.listdir("/proc/self/fd")) == num_files
    assert peak < 1024**2  # half a block
    assert sum(read) < 1.5 * len(keys) * size  # the rows and headers, not the blocks


def elsewhere(work_in_child) -> int:
    """Start a process that runs a function."""
    pid = os.fork()
    if pid == 0:
        try:
            work_in_child()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def test_processes_put_into_one_directory_at_once(tmp_path):
    store = WorkStore(tmp_path, "encode", {"weights": "a"})

    def put(process: int) -> None:
        mine = WorkStore(tmp_path, "encode", {"weights": "a"})
        for start in range(0, 60, 6):
            keys = list(range(start, start + 6))
            # Both put the same keys in another order, under one file name, and some in two blocks.
            shared = keys[::-1] if process else keys
            mine.put([f"k{index}" for index in shared], [row(index) for index in shared])
            both = [start + process, 100 + start + process]
            mine.put([f"k{index}" for index in both], [row(index) for index in both])

    children = [elsewhere(lambda process=process: put(process)) for process in (0, 1)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    store.put(["own"], [row(9)])
    assert len(store) == 1
    store.refresh()
    assert len(store) == 81
    indices = [*range(60), *(100 + start + process for start in range(0, 60, 6) for process in (0, 1))]
    keys = [f"k{index}" for index in indices]
    assert store.damaged(keys) == []
    assert [float(found["mean"][0, 0, 0]) for found in store.rows(keys)] == indices


def test_a_block_that_another_process_wrote_in_another_order_is_read_by_key(tmp_path):
    store = WorkStore(tmp_path, "encode", {"weights": "a"})
    store.put(["k0", "k1"], [row(0), row(1)])
    WorkStore(tmp_path, "encode", {"weights": "a"}).put(["k1", "k0"], [row(1), row(0)])
    assert len(list(store.directory.glob("*.safetensors"))) == 1
    assert [float(found["mean"][0, 0, 0]) for found in store.rows(["k0", "k1"])] == [0, 1]


@pytest.mark.parametrize("harm", ["gone", "flipped", "truncated"])
def test_a_block_lost_after_it_was_verified_stops_the_stage(tmp_path, harm):
    store = filled(tmp_path)
    assert store.damaged(["k0", "k1", "k2"]) == []
    for path in store.directory.glob("*.safetensors"):
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.unlink()
        if harm != "gone":
            path.write_bytes(content if harm == "flipped" else content[:-1])
    with pytest.raises(StageError, match=r"safetensors: gone or changed since it was verified"):
        list(store.rows(["k0", "k1"]))
    assert store.damaged(["k2", "k0"]) == ["k2", "k0"]
    store.put(["k0"], [row(0)])
    assert float(next(store.rows(["k0"]))["mean"][0, 0, 0]) == 0


def test_a_block_that_cannot_be_read_now_is_not_removed(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    store = filled(tmp_path)
    monkeypatch.setattr(work.Block, "__init__", fail)
    assert sorted(store.damaged(["k0", "k1", "k2"])) == ["k0", "k1", "k2"]
    monkeypatch.undo()
    assert len(WorkStore(tmp_path, "encode", {"weights": "a"})) == 3


def test_refresh_forgets_what_is_gone(tmp_path):
    store = filled(tmp_path)
    for path in store.directory.glob("*.safetensors"):
        path.unlink()
    store.refresh()
    assert "k0" not in store


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch, error):
    def fail(descriptor: int) -> None:
        raise error

    target = tmp_path / "file"
    write_atomically(target, b"before")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(type(error)) as raised:
        write_atomically(target, b"after")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert target.read_bytes() == b"before"
    if isinstance(error, OSError):
        assert raised.value.filename == str(target)
