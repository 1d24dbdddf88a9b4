"""The work store: rows come back as they were put, or not at all."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stages.lib.stage_run import work_root
from stages.lib.work import WorkStore, fingerprint


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
    store = filled(tmp_path)
    dead, alive = (store.directory / f"x.safetensors.{pid}.partial" for pid in (2**22 + 1, os.getpid()))
    for partial in (dead, alive):
        partial.write_bytes(b"half")
    assert len(WorkStore(tmp_path, "encode", {"weights": "a"})) == 3
    assert not dead.exists()
    assert alive.exists()


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


def test_a_second_process_waits_and_names_the_first(tmp_path):
    lock = tmp_path / "lock"
    hold = f"""
import sys, time
from pathlib import Path
from stages.lib.stage_run import exclusive
with exclusive(Path({str(lock)!r}), "stage x"):
    print("held", flush=True)
    sys.stdin.read()
"""
    root = Path(__file__).parent.parent
    first = subprocess.Popen(
        [sys.executable, "-c", hold], cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "held\n"
    second = subprocess.Popen(
        [sys.executable, "-c", "import logging; logging.basicConfig()\n" + hold],
        cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    warning = second.stderr.readline()
    assert f"process {first.pid}" in warning
    first.kill()  # the kernel drops a dead holder's lock
    assert second.stdout.readline() == "held\n"
    second.communicate("")
    first.communicate()
