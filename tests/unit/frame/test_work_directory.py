"""SD_WORK_MAX_BYTES: the least recently used goes first, and never what a live process uses."""

import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from stages import show_work as work_listing
from stages.lib.frame import work_directory
from stages.lib.frame.errors import StageError
from stages.lib.frame.work_directory import (
    Room,
    check_work_directory,
    extraction,
    max_work_bytes,
    trim,
    units,
    use,
)
from stages.lib.store.work_store import WorkStore
from stages.lib.training.checkpoints import Checkpoints
from tests.conftest import REPOSITORY

BLOCK = 100_000  # bytes of a block's data; its header is small


def put(root: Path, recipe: str, *keys: str) -> None:
    """A block for each key, in a store that is closed again."""
    store = WorkStore(root, "encode", {"recipe": recipe})
    for key in keys:
        store.put([key], [{"mean": np.zeros(BLOCK, np.uint8)}])


def keys_left(root: Path, *recipes: str) -> list[str]:
    """Found by opening copies, which leaves the times of last use alone."""
    copy = root.with_name(root.name + "-copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(root, copy)
    found = []
    for recipe in recipes:
        store = WorkStore(copy, "encode", {"recipe": recipe})
        found += [key for key in "abcdefghij" if key in store]
    return found


def count_trims(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The arguments of each look through the work directory from now on."""
    calls: list[tuple] = []

    def counted(*arguments: object) -> int:
        calls.append(arguments)
        return trim(*arguments)

    monkeypatch.setattr(work_directory, "trim", counted)
    return calls


def held_bytes(root: Path) -> int:
    directories = work_directory.recipe_directories(root)
    return sum(unit.num_bytes for directory in directories for unit in units(directory))


@pytest.mark.parametrize(
    ("configured", "expected"),
    [(None, None), ("", None), ("0", 0), ("1000", 1000), ("20G", 20 * 2**30), ("3k", 3072), (" 1T ", 2**40)],
)
def test_the_bound_is_bytes_or_powers_of_1024(monkeypatch, configured, expected):
    monkeypatch.delenv("SD_WORK_MAX_BYTES", raising=False)
    if configured is not None:
        monkeypatch.setenv("SD_WORK_MAX_BYTES", configured)
    assert max_work_bytes() == expected


@pytest.mark.parametrize("configured", ["20 G", "-1", "1.5G", "20GB", "much", "1e9", "\u0661"])
def test_another_bound_is_refused(monkeypatch, configured):
    monkeypatch.setenv("SD_WORK_MAX_BYTES", configured)
    with pytest.raises(
        StageError, match=r"SD_WORK_MAX_BYTES: expected a whole number .* such as 20G, found '"
    ):
        max_work_bytes()


def test_without_a_bound_nothing_is_dropped(tmp_path, monkeypatch):
    monkeypatch.delenv("SD_WORK_MAX_BYTES", raising=False)
    put(tmp_path / "work", "one", "a", "b")
    trim(tmp_path / "work")
    assert keys_left(tmp_path / "work", "one") == ["a", "b"]


def test_the_least_recently_used_blocks_go_first_whatever_stage_made_them(tmp_path, monkeypatch):
    root = tmp_path / "work"
    put(root, "one", "a", "b")
    put(root, "two", "c", "d")
    put(root, "one", "e")
    WorkStore(root, "encode", {"recipe": "one"}).damaged(["a"])
    list(WorkStore(root, "encode", {"recipe": "two"}).rows(["c"]))
    # From the oldest use to the latest: b, d, e, a, c.
    for num_kept, expected in ((4, "aecd"), (3, "aec"), (2, "ac"), (1, "c")):
        monkeypatch.setenv("SD_WORK_MAX_BYTES", str(int((num_kept + 0.5) * BLOCK)))
        trim(root)
        assert sorted(keys_left(root, "one", "two")) == sorted(expected)


def test_a_put_makes_room_first(tmp_path, monkeypatch):
    root = tmp_path / "work"
    monkeypatch.setenv("SD_WORK_MAX_BYTES", str(int(3.5 * BLOCK)))
    for recipe, key in (("one", "a"), ("two", "b"), ("three", "c"), ("four", "d"), ("five", "e")):
        put(root, recipe, key)
        assert held_bytes(root) <= 3.5 * BLOCK
    assert keys_left(root, "one", "two", "three", "four", "five") == ["c", "d", "e"]
    assert len(list((root / "encode").iterdir())) == 3  # empty recipe directories are gone


def test_many_small_puts_stay_within_the_bound_and_list_the_directory_seldom(tmp_path, monkeypatch):
    root = tmp_path / "work"
    monkeypatch.setenv("SD_WORK_MAX_BYTES", str(10 * BLOCK))
    put(root, "old", *"abcdefghi")
    calls = []
    monkeypatch.setattr(
        work_directory, "trim", lambda *arguments: calls.append(arguments) or trim(*arguments)
    )
    store = WorkStore(root, "encode", {"recipe": "new"})
    for index in range(100):
        store.put([f"k{index}"], [{"mean": np.zeros(BLOCK // 33, np.uint8)}])
        assert held_bytes(root) <= 10 * BLOCK
    assert len(calls) < 60
    assert len(store) == 100


def test_the_room_of_one_writer_ends_at_the_bound(tmp_path, monkeypatch):
    put(tmp_path, "one", "a")
    bound = held_bytes(tmp_path) + 100
    monkeypatch.setenv("SD_WORK_MAX_BYTES", str(bound))
    calls = []
    monkeypatch.setattr(
        work_directory, "trim", lambda *arguments: calls.append(arguments) or trim(*arguments)
    )
    room = Room(tmp_path)
    room.make(60)
    room.make(40)
    assert len(calls) == 1
    room.make(1)
    assert len(calls) == 2


def test_the_checkpoints_of_a_run_go_together(tmp_path, monkeypatch):
    root = tmp_path / "work"
    monkeypatch.delenv("SD_WORK_MAX_BYTES", raising=False)
    for fingerprint in ("f" * 64, "e" * 64):
        checkpoints = Checkpoints(root, fingerprint)
        for step in (1, 2):
            checkpoints.save(step, {"value": torch.zeros(BLOCK // 4)})
    del checkpoints
    put(root, "one", "a")
    (older, newer) = (root / "train" / (letter * 20) for letter in "fe")
    Checkpoints(root, "f" * 64).load_latest()  # resuming is a use
    monkeypatch.setenv("SD_WORK_MAX_BYTES", str(int(3.9 * BLOCK)))
    trim(root)
    assert not newer.exists()
    assert len(list(older.glob("step-*.safetensors"))) == 2
    assert keys_left(root, "one") == ["a"]


def test_saving_a_checkpoint_makes_room(tmp_path, monkeypatch):
    root = tmp_path / "work"
    put(root, "one", "a", "b")
    monkeypatch.setenv("SD_WORK_MAX_BYTES", str(int(2.5 * BLOCK)))
    checkpoints = Checkpoints(root, "f" * 64)
    checkpoints.save(1, {"value": torch.zeros(BLOCK // 4)})
    assert keys_left(root, "one") == ["b"]
    assert checkpoints.load_latest()["global_step"] == 1


def test_what_this_process_uses_stays_however_small_the_bound(tmp_path, monkeypatch):
    root = tmp_path / "work"
    put(root, "other", "a")
    monkeypatch.setenv("SD_WORK_MAX_BYTES", str(2 * BLOCK))
    store = WorkStore(root, "encode", {"recipe": "one"})
    for key in "bcdef":
        store.put([key], [{"mean": np.zeros(BLOCK, np.uint8)}])
    assert trim(root) == held_bytes(root) > 5 * BLOCK
    assert keys_left(root, "other", "one") == list("bcdef")
    assert len(list(store.rows("bcdef"))) == 5


def test_what_was_used_since_a_time_stays(tmp_path, monkeypatch):
    root = tmp_path / "work"
    put(root, "one", "a", "b", "c")
    middle = sorted(unit.last_used for unit in units(*work_directory.recipe_directories(root)))[1]
    monkeypatch.setenv("SD_WORK_MAX_BYTES", "0")
    trim(root, used_since=middle)
    assert keys_left(root, "one") == ["b", "c"]


HOLD = """
import sys
from pathlib import Path
from stages.lib.training.checkpoints import Checkpoints
from stages.lib.store.work_store import WorkStore
root = Path(sys.argv[1])
store, checkpoints = WorkStore(root, "encode", {"recipe": "one"}), Checkpoints(root, "f" * 64)
lost = store.damaged(["a", "b"])
print("held", flush=True)
sys.stdin.readline()
print(lost, len(list(store.rows(["a", "b"]))), checkpoints.load_latest()["global_step"], flush=True)
sys.stdin.readline()
"""


def test_what_another_live_process_uses_stays_until_it_dies(tmp_path, monkeypatch):
    """It verified its blocks; whatever is trimmed elsewhere, it reads them."""
    root = tmp_path / "work"
    put(root, "one", "a", "b")
    put(root, "two", "c")
    Checkpoints(root, "f" * 64).save(7, {"value": torch.zeros(10)})
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, root], cwd=REPOSITORY, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "held\n"
        monkeypatch.setenv("SD_WORK_MAX_BYTES", "0")
        put(root, "three", "d")
        shared = WorkStore(root, "encode", {"recipe": "one"})  # of this process, in the same directory
        trim(root)
        del shared
        trim(root)
        assert keys_left(root, "one", "two", "three") == ["a", "b"]
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "[] 2 7\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    trim(root)
    assert work_directory.recipe_directories(root) == []


def test_a_directory_is_used_and_trimmed_by_turns(tmp_path, monkeypatch):
    """The trimmer removes the directory, lock and all, again and again while another takes it into use."""
    root = tmp_path / "work"
    monkeypatch.setenv("SD_WORK_MAX_BYTES", "0")
    pid = os.fork()
    if pid == 0:
        try:
            for _ in range(2000):
                trim(root)
            os._exit(0)
        finally:
            os._exit(1)
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        store = WorkStore(root, "encode", {"recipe": "one"})
        store.put(["a"], [{"mean": np.ones(3)}])
        assert store.damaged(["a"]) == []
        assert np.array_equal(next(store.rows(["a"]))["mean"], np.ones(3))
        del store
    trim(root)
    assert work_directory.recipe_directories(root) == []


def test_a_lock_removed_while_it_was_waited_for_is_taken_anew(tmp_path, monkeypatch):
    directory = tmp_path / "encode" / ("0" * 20)
    flock, removed = work_directory.fcntl.flock, []

    def remove_once(handle, operation):
        if not removed:
            removed.append(True)
            shutil.rmtree(directory)
        flock(handle, operation)

    monkeypatch.setattr(work_directory.fcntl, "flock", remove_once)
    handle = use(directory)
    assert os.path.samestat(os.fstat(handle.fileno()), (directory / "lock").stat())


def test_only_rows_and_checkpoints_are_ever_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("SD_WORK_MAX_BYTES", "0")
    others = ["tiny/unet.pt", "extracted/main/a.png", "locks/main/train", f"encode/{'0' * 20}/notes.txt"]
    for name in others:
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("mine")
    trim(tmp_path)
    assert [(tmp_path / name).read_text() for name in others] == ["mine"] * 4


def test_the_listing_says_what_is_held_and_what_made_it(tmp_path, monkeypatch):
    monkeypatch.setenv("SD_WORK_MAX_BYTES", "20G")
    recipe = {"model": "0123456789abcdef" * 4, "dtype": "float32", "clip_skip": None, "resolution": 64}
    store = WorkStore(tmp_path, "encode_images", recipe)
    values = [{"mean": np.zeros(1000, np.uint8)}] * 3
    store.put(["a", "b", "c"], values)
    store.put(["c", "d"], values[:2])
    Checkpoints(tmp_path, "f" * 64).save(700, {"value": torch.zeros(10)})
    head, images, made_with, run = work_listing.listing(tmp_path)
    assert head.startswith(f"{tmp_path}: ")
    assert head.endswith("of 20.0 GiB")
    assert images.startswith(f"encode_images/{store.directory.name}  4 rows  5.")
    assert " KiB  last used 20" in images
    assert made_with.strip() == "clip_skip null, dtype float32, model 01234567, resolution 64"
    assert run.startswith(f"train/{'f' * 20}  checkpoints step-00000700  ")

    command = [sys.executable, "-m", "stages.show_work"]
    environment = {**os.environ, "SD_WORK": str(tmp_path)}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [head, images, made_with, run]


def test_rows_dated_in_the_future_do_not_escape_the_bound(tmp_path, monkeypatch):
    store = WorkStore(tmp_path, "encode", {"recipe": "old"})
    store.put(["a"], [{"mean": np.zeros(2000, np.uint8)}])
    (block,) = store.directory.glob("*.safetensors")
    os.utime(block, (time.time() + 10**8,) * 2)
    store._use.close()
    monkeypatch.setenv("SD_WORK_MAX_BYTES", "1000")
    trim(tmp_path, used_since=time.time_ns())
    assert not block.exists()


@pytest.mark.parametrize("kind", ["file", "file above", "not writable"])
def test_a_work_directory_that_cannot_be_used_is_one_clear_error(tmp_path, monkeypatch, kind):
    (tmp_path / "taken").write_text("")
    work = {"file": tmp_path / "taken", "file above": tmp_path / "taken" / "work"}.get(
        kind, tmp_path / "work"
    )
    monkeypatch.setenv("SD_WORK", str(work))
    if kind == "not writable":  # root writes everywhere

        def refuse(**_):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(StageError, match=rf"{work}: expected a work directory that this user may write to"):
        check_work_directory()


def test_modes_follow_the_groups_of_a_shared_directory(tmp_path):
    shared, own = tmp_path / "shared", tmp_path / "own"
    for directory, mode in ((shared, 0o2775), (own, 0o755)):
        directory.mkdir()
        directory.chmod(mode)
    before = os.umask(0o022)
    try:
        for directory in (shared, own):
            WorkStore(directory, "encode", {"recipe": "x"}).put(["a"], [{"mean": np.zeros(3)}])
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in shared.rglob("*")}
    assert set(modes.values()) == {0o2775, 0o664}
    assert {stat.S_IMODE(path.stat().st_mode) for path in own.rglob("*")} == {0o755, 0o644}


def test_what_a_killed_process_unpacked_is_listed_and_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("SD_WORK", str(tmp_path))
    killed = tmp_path / "extracted" / ("a" * 32)
    (killed / "files").mkdir(parents=True)
    (killed / "files/a.png").write_bytes(bytes(5000))
    (killed / "lock").touch()
    with extraction() as mine:
        assert not killed.exists()
        (mine / "b.png").write_bytes(bytes(3000))
        text = "\n".join(work_listing.listing(tmp_path))
        assert re.search(r"extracted/[0-9a-f]{32}  an unpacked archive  2\.9 KiB", text)
        trim(tmp_path)
        assert (mine / "b.png").exists()
    assert not list((tmp_path / "extracted").iterdir())
