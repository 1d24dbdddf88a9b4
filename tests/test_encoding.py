"""Running an encoder over what the work store lacks: batches, workers, overflow, several processes."""

import dataclasses
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from stages.lib import encoding
from stages.lib.encoding import Encoder, Item, encode_missing
from stages.lib.errors import StageError
from stages.lib.work import Row, WorkStore

REPOSITORY = Path(__file__).parent.parent


def load(value: float) -> np.ndarray:
    return np.full(4, value, np.float32)


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


def test_on_a_gpu_workers_load_and_this_process_encodes(tmp_path, monkeypatch):
    """The same rows by the way that a GPU takes, with the encoder on the CPU."""
    monkeypatch.setenv("SD_WORKERS", "2")
    keys = [str(number) for number in range(30)]
    store = WorkStore(tmp_path, "encode", {})

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
    encoding._encode(store, items(set(keys)), ENCODER, "cuda", lambda count: None)
    assert first_values(store, keys) == [2.0 * number for number in range(30)]


def test_a_kill_loses_less_than_a_block(tmp_path, monkeypatch):
    """Rows in work and rows not yet written, at any moment, are at most 64."""
    monkeypatch.setenv("SD_WORKERS", "2")
    monkeypatch.setattr(encoding, "_is_finite", lambda row: True)
    asked = 0

    def counted(missing: set[str]) -> Iterator[Item]:
        nonlocal asked
        for item in items(missing):
            asked += 1
            yield item

    written = 0
    most = 0
    put = WorkStore.put

    def recorded(self, keys, rows):
        nonlocal written, most
        most = max(most, asked - written)
        put(self, keys, rows)
        written += len(keys)

    monkeypatch.setattr(WorkStore, "put", recorded)
    keys = [str(number) for number in range(400)]
    run(tmp_path, keys, dataclasses.replace(ENCODER), counted)
    assert written == 400
    assert most <= encoding.BLOCK_ROWS + 4 * (4 + 1)  # and what is read ahead


def test_two_processes_share_the_rows_and_both_see_all(tmp_path):
    script = f"""
from pathlib import Path
from stages.lib.encoding import encode_missing, processes
from stages.lib.work import WorkStore
from tests.test_encoding import ENCODER, items

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
from stages.lib.encoding import Encoder, Item, encode_missing
from stages.lib.work import WorkStore

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
