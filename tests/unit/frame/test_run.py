"""The frame around a stage: its turn, its errors, and the work directory trimmed at its end."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stages.lib.frame.errors import StageError
from stages.lib.frame.params import UndeclaredParameter
from stages.lib.frame.run import run_stage
from stages.lib.frame.work_directory import recipe_directories, units
from stages.lib.store.work_store import WorkStore
from tests.conftest import REPOSITORY

BLOCK = 100_000


@pytest.fixture
def root(tmp_path, monkeypatch):
    """The work directory of a project with params.yaml."""
    shutil.copyfile(REPOSITORY / "params.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    for name in ("SD_WORK_MAX_BYTES", "SD_LAUNCH", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SD_WORK", str(tmp_path / "work"))
    return tmp_path / "work"


def put(root: Path, recipe: str, *keys: str) -> WorkStore:
    store = WorkStore(root, "encode", {"recipe": recipe})
    for key in keys:
        store.put([key], [{"mean": np.zeros(BLOCK, np.uint8)}])
    return store


def num_blocks(root: Path) -> int:
    return sum(len(units(directory)) for directory in recipe_directories(root))


@pytest.mark.parametrize("fails", [False, True])
def test_the_end_of_a_stage_drops_what_it_did_not_use(root, monkeypatch, fails, caplog):
    put(root, "earlier", "a", "b")
    put(root, "mine", "c", "d")
    monkeypatch.setenv("SD_WORK_MAX_BYTES", "4000")

    def main(params):
        assert put(root, "mine").damaged(["d"]) == []
        put(root, "mine", "e")
        if fails:
            raise StageError("no such thing")

    if fails:
        with pytest.raises(SystemExit, match="encode: no such thing"):
            run_stage("encode", (), main)
    else:
        run_stage("encode", (), main)
    store = put(root, "mine")
    assert [key for key in "cde" if key in store] == ["d", "e"]
    assert len(list((root / "encode").iterdir())) == 1
    (warning,) = (record.message for record in caplog.records if record.levelname == "WARNING")
    assert re.search(r"work: what is in use needs 195\.\d KiB, SD_WORK_MAX_BYTES is 3\.9 KiB", warning)


def test_a_bound_that_holds_is_kept_without_a_word(root, monkeypatch, caplog):
    put(root, "earlier", "a", "b", "c")
    monkeypatch.setenv("SD_WORK_MAX_BYTES", str(int(2.5 * BLOCK)))
    run_stage("encode", (), lambda params: put(root, "mine", "d") and None)
    assert num_blocks(root) == 2
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_a_bad_bound_stops_the_stage_before_it_starts(root, monkeypatch):
    monkeypatch.setenv("SD_WORK_MAX_BYTES", "plenty")
    ran = []
    with pytest.raises(SystemExit, match=r"encode: SD_WORK_MAX_BYTES: expected .* found 'plenty'"):
        run_stage("encode", (), ran.append)
    assert ran == []


def test_an_error_of_the_code_is_one_line_and_keeps_its_traceback(root, monkeypatch):
    def main(params):
        raise ZeroDivisionError

    with pytest.raises(SystemExit, match=r"unexpected ZeroDivisionError: .*report it with .*encode\.txt"):
        run_stage("encode", (), main)
    assert "raise ZeroDivisionError" in (root / "errors" / "encode.txt").read_text()
    monkeypatch.setenv("SD_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        run_stage("encode", (), main)


def test_params_that_moved_while_the_stage_ran_fail_it(root):
    def main(params):
        text = Path("params.yaml").read_text()
        Path("params.yaml").write_text(text.replace("learning_rate: ", "learning_rate: 1"))

    with pytest.raises(SystemExit, match=r"params\.yaml: train changed while the stage ran"):
        run_stage("train", ("train",), main)
    with pytest.raises(SystemExit, match=r"params\.yaml: train\.learning_rate changed while the stage ran"):
        run_stage("train", ("train.learning_rate",), main)
    run_stage("train", ("train.seed", "evaluate"), main)


def test_a_stage_cannot_read_what_it_does_not_declare(root, monkeypatch):
    monkeypatch.setenv("SD_TRACEBACK", "1")
    run_stage("train", ("train.seed",), lambda params: params.train.seed and None)
    with pytest.raises(UndeclaredParameter, match=r"train\.learning_rate: dvc\.yaml does not list it"):
        run_stage("train", ("train.seed",), lambda params: params.train.learning_rate)


HOLD = """
import logging, sys
from pathlib import Path
from stages.lib.frame.locks import exclusive
logging.basicConfig()
with exclusive(Path(sys.argv[1]), "stage x"):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(lock: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, lock], cwd=REPOSITORY, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_a_second_process_waits_and_names_the_first_until_it_is_killed(tmp_path):
    first = hold(tmp_path / "lock")
    assert first.stdout.readline() == "held\n"
    second = hold(tmp_path / "lock")
    warning = second.stderr.readline()
    assert re.search(
        rf"waiting for its end: stage x is being run by process {first.pid} since \d{{4}}-\d\d-\d\d "
        rf"\d\d:\d\d:\d\d \(`{re.escape(sys.executable)} -c .*",
        warning,
    )
    first.send_signal(signal.SIGKILL)  # the kernel drops a dead holder's lock
    assert second.stdout.readline() == "held\n"
    third = hold(tmp_path / "lock")
    assert f"process {second.pid} " in third.stderr.readline()
    second.communicate("")
    assert third.stdout.readline() == "held\n"
    third.communicate("")
    first.communicate()


STAGE = """
import sys
from stages.lib.frame.run import run_stage

def main(params):
    print("runs", flush=True)
    sys.stdin.readline()

if __name__ == "__main__":
    run_stage("slow", (), main)
"""


def test_a_stage_whose_dvc_was_killed_is_waited_for(root, tmp_path):
    """What dvc does: a shell runs the stage; killing that parent leaves the stage running."""
    (tmp_path / "slow.py").write_text(STAGE)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    read, write = os.pipe()
    pipes = {"stdout": subprocess.PIPE, "text": True, "env": environment}
    dvc = subprocess.Popen(
        f"{sys.executable} -m slow; true", shell=True, stdin=read, stderr=subprocess.DEVNULL, **pipes
    )
    assert dvc.stdout.readline() == "runs\n"
    dvc.kill()
    dvc.wait()
    again = subprocess.Popen(
        [sys.executable, "-m", "slow"], stdin=subprocess.PIPE, stderr=subprocess.PIPE, **pipes
    )
    assert re.search(r"stage slow is being run by process \d+ since .*-m slow", again.stderr.readline())
    os.write(write, b"\n")
    assert again.stdout.readline() == "runs\n"
    _, errors = again.communicate("\n")
    assert (again.returncode, errors) == (0, "")
    os.close(read)
    os.close(write)
    dvc.stdout.close()
