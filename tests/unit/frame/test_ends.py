"""Processes end with what started them, and an interrupt ends them without a traceback."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

STAGE = """
import time
from pathlib import Path
from stages.lib.frame.run import run_stage

def main(params):
    Path("pid").write_text(str(__import__("os").getpid()))
    Path("pid").rename("running")
    time.sleep(60)

if __name__ == "__main__":
    run_stage("slow", (), main)
"""


@pytest.fixture
def checkout(tmp_path):
    """A directory in which ``python -m stages.slow`` runs for a minute."""
    (tmp_path / "params.yaml").write_text((REPOSITORY / "params.yaml").read_text())
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages/__init__.py").write_text((REPOSITORY / "stages/__init__.py").read_text())
    (tmp_path / "stages/slow.py").write_text(STAGE)
    (tmp_path / "stages/lib").symlink_to(REPOSITORY / "stages/lib")
    return tmp_path


def environment(**changes: str) -> dict[str, str]:
    own = ("SD_WORK", "SD_LAUNCH", "RANK", "WORLD_SIZE", "DVC_STAGE")
    return {name: value for name, value in os.environ.items() if name not in own} | changes


def start(checkout: Path, command: list[str], **changes: str) -> subprocess.Popen:
    return subprocess.Popen(
        command, cwd=checkout, env=environment(**changes), start_new_session=True, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def wait_until_running(checkout: Path) -> int:
    """Process id of the stage."""
    deadline = time.monotonic() + 60
    while not (checkout / "running").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return int((checkout / "running").read_text())


def ends(pid: int) -> bool:
    """Whether a process is gone, or a zombie of which nobody has asked, within ten seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


STARTERS = {
    "python": [
        sys.executable,
        "-c",
        "import subprocess, sys; subprocess.run([sys.executable, '-m', 'stages.slow'])",
    ],
    "shell": ["sh", "-c", f"'{sys.executable}' -m stages.slow; true"],
    "python and a shell": [
        sys.executable,
        "-c",
        "import subprocess, sys; subprocess.run(['sh', '-c', f\"'{sys.executable}' -m stages.slow; true\"])",
    ],
}


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel tells no other of its parent's end")
@pytest.mark.parametrize("variable", ["DVC_STAGE", "RANK"])
@pytest.mark.parametrize("starter", STARTERS)
def test_a_stage_ends_with_what_started_it(checkout, starter, variable):
    if (variable, starter) == ("RANK", "python and a shell"):
        pytest.skip("a launcher starts its processes itself")
    process = start(checkout, STARTERS[starter], **{variable: "0"})
    pid = wait_until_running(checkout)
    process.kill()
    process.wait()
    process.stderr.close()  # which a stage that goes on would hold
    try:
        assert ends(pid)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def test_a_stage_started_from_a_terminal_goes_on_without_its_shell(checkout):
    process = start(checkout, STARTERS["shell"])
    pid = wait_until_running(checkout)
    process.kill()
    process.wait()
    time.sleep(0.3)
    os.kill(pid, signal.SIGKILL)  # still there
    process.stderr.close()


def test_an_interrupt_is_one_line_and_status_130(checkout):
    process = start(checkout, [sys.executable, "-m", "stages.slow"])
    wait_until_running(checkout)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (130, "\nslow: interrupted; what is finished is kept\n")


@pytest.mark.parametrize("seconds", [0.2, 0.7])
def test_an_interrupt_while_libraries_load_shows_nothing(tmp_path, seconds):
    process = start(REPOSITORY, [sys.executable, "-m", "stages.show_store", str(tmp_path)])
    time.sleep(seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate()
    assert "Traceback" not in errors and "KeyboardInterrupt" not in errors


WORKERS = """
import os, signal, sys, time
from concurrent.futures import ProcessPoolExecutor
import multiprocessing
from stages.lib.frame.ends import starting_workers
import stages.encode_images

if __name__ == "__main__":
    with starting_workers():
        pool = ProcessPoolExecutor(2, multiprocessing.get_context("spawn"))
        futures = [pool.submit(time.sleep, 60) for _ in range(2)]
    os.write(1, b" ".join(str(child.pid).encode() for child in multiprocessing.active_children()) + b"\\n")
    time.sleep(float(sys.argv[1]))
    os.killpg(0, signal.SIGINT) if sys.argv[2] == "interrupt" else os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)
"""


@pytest.mark.parametrize("seconds", ["0", "0.3", "4"])
@pytest.mark.parametrize("how", ["interrupt", "kill"])
@pytest.mark.slow
def test_workers_end_with_their_stage_and_without_a_word(tmp_path, seconds, how):
    (tmp_path / "workers.py").write_text(
        f"import signal\nsignal.signal(signal.SIGINT, signal.SIG_DFL)\n{WORKERS}"
    )
    process = subprocess.Popen(
        [sys.executable, "workers.py", seconds, how], cwd=tmp_path, start_new_session=True, text=True,
        env=environment(PYTHONPATH=str(REPOSITORY)), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    workers = [int(pid) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    process.wait(30)
    try:
        assert all(map(ends, workers))
    finally:
        for pid in workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert process.communicate()[1] == ""
