"""Running an encoder over what the work store lacks: batches, workers, overflow, several processes."""

import dataclasses
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.lib.encoding import engine as encoding
from stages.lib.encoding.batches import Encoder
from stages.lib.encoding.engine import Item, count_workers, encode_missing
from stages.lib.frame import progress
from stages.lib.frame.errors import StageError
from stages.lib.store.blocks import Row
from stages.lib.store.work_store import WorkStore
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.usefixtures("two_threads")


def load(value: float) -> np.ndarray:
    return np.array([value, 1, 1, 1], np.float32)


def build(device: str, dtype: str):
    """Doubles its inputs; what exceeds the range of float8 overflows below float32."""

    def encode(inputs: Sequence[np.ndarray]) -> list[Row]:
        assert len(inputs) == 4
        assert len({value.shape for value in inputs}) == 1
        assert torch.get_num_threads() == 1
        doubled = [value * 2 for value in inputs]
        if dtype != "float32":
            doubled = [np.where(np.abs(value) > 448, np.inf, value).astype(np.float32) for value in doubled]
        return [{"doubled": value} for value in doubled]

    return encode


ENCODER = Encoder(load, build, 4, "float32")


def items(missing: set[str]) -> Iterator[Item]:
    for key in sorted(missing, key=int):
        yield Item(key, f"sample {key}", float(key))


def run(tmp_path: Path, keys: Sequence[str], encoder: Encoder = ENCODER, items_of=items) -> WorkStore:
    store = WorkStore(tmp_path, "encode", {"encoder": encoder.dtype})
    encode_missing(store, keys, items_of, encoder, "test", "rows")
    return store


def first_values(store: WorkStore, keys: Sequence[str]) -> list[float]:
    return [float(row["doubled"][0]) for row in store.rows(keys)]


@pytest.mark.parametrize("count", [1, 15, 45])
def test_every_key_gets_its_row(tmp_path, monkeypatch, count):
    monkeypatch.setenv("SD_WORKERS", "2")
    keys = [str(number) for number in range(count)]
    assert first_values(run(tmp_path, keys), keys) == [2.0 * number for number in range(count)]


def test_only_what_is_missing_is_asked_for(tmp_path):
    asked: list[set[str]] = []

    def recorded(missing: set[str]) -> Iterator[Item]:
        asked.append(set(missing))
        yield from items({*missing, "99"})  # a row that nobody asked for is not encoded

    run(tmp_path, ["1", "2", "1"], items_of=recorded)
    store = run(tmp_path, ["2", "3"], items_of=recorded)
    assert asked == [{"1", "2"}, {"3"}]
    assert "99" not in store


def test_batches_hold_one_group_each(tmp_path, monkeypatch):
    batches = []
    monkeypatch.setattr(
        encoding, "_check_finite", lambda batch, rows, dtype: batches.append([item.group for item in batch])
    )

    def grouped(missing: set[str]) -> Iterator[Item]:
        for item in items(missing):
            yield item._replace(group=int(item.key) % 3)

    keys = [str(number) for number in range(11)]
    store = run(tmp_path, keys, items_of=grouped)
    assert all(len(set(groups)) == 1 for groups in batches)
    assert sorted(len(groups) for groups in batches) == [3, 4, 4]
    assert first_values(store, keys) == [2.0 * number for number in range(11)]


def test_a_row_that_overflows_is_encoded_again_in_float32(tmp_path):
    keys = ["1", "300", "2", "400"]
    store = run(tmp_path, keys, dataclasses.replace(ENCODER, dtype="bfloat16"))
    assert first_values(store, keys) == [2.0, 600.0, 4.0, 800.0]
    assert [bool(row["redone"]) for row in store.rows(keys)] == [False, True, False, True]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_that_stays_non_finite_names_its_sample(tmp_path, dtype):
    def broken(missing: set[str]) -> Iterator[Item]:
        for item in items(missing):
            yield item._replace(value=float("nan")) if item.key == "3" else item

    with pytest.raises(StageError, match=r"non-finite values in the encoding of sample 3\b"):
        run(tmp_path, ["1", "2", "3"], dataclasses.replace(ENCODER, dtype=dtype), broken)


@pytest.mark.parametrize(
    ("device", "local_processes", "expected"),
    [("cpu", "1", 40), ("cpu", "8", 5), ("cpu", "64", 1), ("cuda", "1", 16), ("cuda", "8", 5)],
)
def test_processes_of_this_machine_share_the_cores_that_they_may_use(
    monkeypatch, device, local_processes, expected
):
    monkeypatch.delenv("SD_WORKERS", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local_processes)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(40)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 96)
    assert count_workers(device) == expected
    monkeypatch.setenv("SD_WORKERS", "24")
    assert count_workers(device) == 24


@pytest.mark.parametrize("configured", ["two", "0", "-1", "1.5"])
def test_a_bad_number_of_workers_is_one_clear_error(tmp_path, monkeypatch, configured):
    monkeypatch.setenv("SD_WORKERS", configured)
    message = f"SD_WORKERS: expected the number of encoder processes, 1 or more, got '{configured}'; unset it"
    with pytest.raises(StageError, match=re.escape(message)):
        run(tmp_path, ["1"])


def test_progress_and_log_say_what_is_encoded_and_reused(tmp_path, monkeypatch, capsys, caplog):
    monkeypatch.setattr(progress, "LINE_SECONDS", 0.0)
    run(tmp_path, ["1", "2"])
    capsys.readouterr()
    with caplog.at_level("INFO"):
        run(tmp_path, ["0", "1", "2", "3", "4", "5"])
    first, *_, last = capsys.readouterr().err.splitlines()
    assert first.startswith("test: 2 of 6 rows, ")
    assert re.fullmatch(r"test: 6 of 6 rows, .* left, encoded=4, reused=2", last)
    assert "test: 4 rows encoded, 2 reused" in caplog.text
    run(tmp_path, ["0", "1"])
    assert capsys.readouterr().err == ""


@pytest.fixture
def gpu(monkeypatch):
    """An encoder for a GPU computes on the CPU."""

    def build_here(device: str, dtype: str):
        assert device == "cuda"
        encode = build("cpu", dtype)

        def with_one_thread(inputs):
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                return encode(inputs)
            finally:
                torch.set_num_threads(threads)

        return with_one_thread

    built = encoding.InProcess(dataclasses.replace(ENCODER, build=build_here), "cuda")
    monkeypatch.setattr(encoding, "InProcess", lambda encoder, device: built)


def test_on_a_gpu_workers_load_and_this_process_encodes(tmp_path, monkeypatch, gpu):
    monkeypatch.setenv("SD_WORKERS", "2")
    keys = [str(number) for number in range(30)]
    store = WorkStore(tmp_path, "encode", {})
    encoding._encode(store, items(set(keys)), ENCODER, "cuda", lambda count: None)
    assert first_values(store, keys) == [2.0 * number for number in range(30)]


class Threads(ThreadPoolExecutor):
    """Worker processes that start at once."""

    def __init__(self, num_workers, context, initializer, initargs):
        super().__init__(num_workers, initializer=initializer, initargs=initargs)


@pytest.mark.parametrize(("num_workers", "bound", "block"), [(2, 64, 48), (16, 160, 32)])
def test_a_kill_loses_less_than_a_block(tmp_path, monkeypatch, num_workers, bound, block):
    """Rows in flight and rows not yet written, at any moment; with many workers 5/4 of those in flight."""
    monkeypatch.setenv("SD_WORKERS", str(num_workers))
    monkeypatch.setattr(encoding, "ProcessPoolExecutor", Threads)
    asked = most = 0
    sizes: list[int] = []
    put = WorkStore.put

    def counted(missing: set[str]) -> Iterator[Item]:
        nonlocal asked
        for item in items(missing):
            asked += 1
            yield item

    def recorded(self, keys, rows):
        nonlocal most
        most = max(most, asked - sum(sizes))
        put(self, keys, rows)
        sizes.append(len(keys))

    monkeypatch.setattr(WorkStore, "put", recorded)
    run(tmp_path, [str(number) for number in range(500)], ENCODER, counted)
    assert sum(sizes) == 500
    assert most < bound
    assert set(sizes[:-1]) == {block}


def test_a_killed_worker_is_one_clear_error(tmp_path, monkeypatch):
    class Killed(Threads):
        def submit(self, *_):
            future: Future = Future()
            future.set_exception(BrokenProcessPool())
            return future

    monkeypatch.setenv("SD_WORKERS", "2")
    monkeypatch.setattr(encoding, "ProcessPoolExecutor", Killed)
    with pytest.raises(
        StageError, match=r"an encoder process was killed, .*; 2 ran at once: lower SD_WORKERS"
    ):
        run(tmp_path, [str(number) for number in range(45)])


def test_on_a_gpu_a_kill_loses_less_than_two_blocks_and_two_batches(tmp_path, monkeypatch, gpu):
    """Rows encoded and not yet written, where writing is slower than encoding."""
    monkeypatch.setenv("SD_WORKERS", "2")
    monkeypatch.setattr(encoding, "ProcessPoolExecutor", Threads)
    monkeypatch.setattr(encoding, "GPU_BLOCK_ROWS", 16)
    encoded = most = 0
    sizes: list[int] = []

    def recorded(self, keys, rows):
        time.sleep(0.05)
        sizes.append(len(keys))

    def done(count: int) -> None:
        nonlocal encoded, most
        encoded += count
        most = max(most, encoded - sum(sizes))

    monkeypatch.setattr(WorkStore, "put", recorded)
    store = WorkStore(tmp_path, "encode", {})
    encoding._encode(store, items({str(number) for number in range(200)}), ENCODER, "cuda", done)
    assert sum(sizes) == 200
    assert set(sizes[:-1]) == {16}
    assert most < 2 * (16 + 4)


def test_two_processes_share_the_rows_and_both_see_all(tmp_path):
    script = f"""
from pathlib import Path
from stages.lib.encoding.engine import encode_missing, processes
from stages.lib.store.work_store import WorkStore
from tests.unit.encoding.test_engine import ENCODER, items

if __name__ == "__main__":
    keys = [str(number) for number in range(24)]
    store = WorkStore(Path({str(tmp_path / "work")!r}), "encode", {{}})
    written = []
    put = store.put
    store.put = lambda keys, rows: (written.extend(keys), put(keys, rows))
    encode_missing(store, keys, items, ENCODER, "test", "rows")
    assert [float(row["doubled"][0]) for row in store.rows(keys)] == [2.0 * int(key) for key in keys]
    Path({str(tmp_path)!r}, f"rank{{processes().process_index}}").write_text(" ".join(written))
"""
    (tmp_path / "stage.py").write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "SD_WORKERS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    subprocess.run([*launch, tmp_path / "stage.py"], check=True, env=environment, cwd=tmp_path)
    shares = [set((tmp_path / f"rank{rank}").read_text().split()) for rank in range(2)]
    assert shares[0].isdisjoint(shares[1])
    assert shares[0] | shares[1] == {str(number) for number in range(24)}
    assert min(map(len, shares)) > 4


def test_workers_end_with_their_parent(tmp_path):
    script = f"""
import os, sys, time
from pathlib import Path
from stages.lib.encoding.batches import Encoder
from stages.lib.encoding.engine import Item, encode_missing
from stages.lib.store.work_store import WorkStore

def build(device, dtype):
    Path({str(tmp_path)!r}, str(os.getpid())).touch()
    def encode(inputs):
        time.sleep(60)
    return encode

def items(missing):
    return (Item(key, key, 0) for key in missing)

if __name__ == "__main__":
    store = WorkStore(Path({str(tmp_path / "work")!r}), "x", {{}})
    encode_missing(store, [str(i) for i in range(40)], items, Encoder(abs, build, 1, "float32"), "x", "rows")
"""
    (tmp_path / "stage.py").write_text(script)
    environment = {**os.environ, "SD_WORKERS": "2", "PYTHONPATH": str(REPOSITORY)}
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "stage.py"], env=environment, stderr=subprocess.DEVNULL
    )

    def workers() -> list[int]:
        return [int(path.name) for path in tmp_path.iterdir() if path.name.isdigit()]

    def wait(condition) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.1)

    wait(lambda: len(workers()) == 2)
    parent.kill()
    parent.wait()
    wait(lambda: not any(Path("/proc", str(pid), "exe").exists() for pid in workers()))
