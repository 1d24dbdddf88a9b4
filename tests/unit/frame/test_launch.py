"""SD_LAUNCH: a stage as several processes, none of them left behind."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.lib.frame import launch
from stages.lib.frame import run as stage_run
from stages.lib.frame.run import run_stage
from tests.conftest import REPOSITORY

TORCHRUN = f"{sys.executable} -m torch.distributed.run --nproc-per-node 2 --master-port 0"
ACCELERATE = (
    f"{sys.executable} -m accelerate.commands.accelerate_cli launch --num_processes 2 --num_machines 1 "
    "--multi_gpu --mixed_precision no --dynamo_backend no --main_process_port 0"
)
PLAIN = f"{sys.executable} plain.py"
PLAIN_LAUNCHER = """
import os, subprocess, sys
ranks = [{**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"} for rank in (0, 1)]
processes = [subprocess.Popen([sys.executable, *sys.argv[1:]], env=environment) for environment in ranks]
sys.exit(max(process.wait() for process in processes))
"""
STAGE = """
import json, os, sys, time
from pathlib import Path
from stages.lib.frame.launch import num_processes, process_index
from stages.lib.frame.run import run_stage

def main(params):
    name = f"process{process_index()}"
    Path(name).write_text(json.dumps({
        "pid": os.getpid(),
        "parent": os.getppid(),
        "arguments": sys.argv[1:],
        "launch": os.environ.get("SD_LAUNCH"),
        "names": sorted({"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"} & set(os.environ)),
    }))
    Path(name).rename(f"{name}.json")
    BODY

if __name__ == "__main__":
    run_stage("tiny", (), main, distributed=True)
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A directory with params.yaml; nothing is launched in it yet."""
    shutil.copyfile(REPOSITORY / "params.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SD_WORK", str(tmp_path / "work"))
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for name in ("SD_WORK_MAX_BYTES", "SD_LAUNCH", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def start(body: str, launcher: str) -> subprocess.Popen:
    """Run the stage, with ``body`` in its main, as dvc would."""
    Path("tiny_stage.py").write_text(STAGE.replace("BODY", body))
    Path("plain.py").write_text(PLAIN_LAUNCHER)
    return subprocess.Popen(
        [sys.executable, "-m", "tiny_stage", "an argument", "--flag"],
        env={**os.environ, "SD_LAUNCH": launcher},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def facts(index: int) -> dict:
    return json.loads(Path(f"process{index}.json").read_text())


def is_running(pid: int) -> bool:
    status = Path("/proc", str(pid), "stat")
    return status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_accelerate_runs_the_stage_as_two_processes_of_one_group(project, monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_CPU")  # SD_LAUNCH sets it where there is no accelerator
    body = """
    from accelerate import Accelerator
    accelerator = Accelerator()
    assert (accelerator.num_processes, accelerator.process_index) == (num_processes(), process_index())
    import torch
    print(f"sum={accelerator.reduce(torch.ones(1), 'sum').item()}", flush=True)
"""
    process = start(body, ACCELERATE)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert output.count("sum=2.0") == 2
    for index in (0, 1):
        assert facts(index)["arguments"] == ["an argument", "--flag"]
        assert facts(index)["launch"] is None
        assert facts(index)["names"] == ["LOCAL_RANK", "LOCAL_WORLD_SIZE", "RANK", "WORLD_SIZE"]
        assert facts(index)["parent"] == process.pid  # the launcher took the place of dvc's child


def test_when_one_process_dies_all_end_and_the_stage_fails(project):
    body = """
    if process_index() == 1:
        while not Path("process0.json").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), 9)
    time.sleep(600)
"""
    process = start(body, TORCHRUN)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1, errors
    assert not is_running(facts(0)["pid"])


def test_the_error_of_any_process_is_shown_and_fails_the_stage(project):
    body = """
    from stages.lib.frame.errors import StageError
    if process_index() == 1:
        raise StageError("no such thing")
"""
    process = start(body, PLAIN)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "\ntiny, process 1: no such thing\n" in errors


def test_a_second_run_waits_before_it_launches(project):
    body = """
    while not Path("go").exists():
        time.sleep(0.01)
    print("done", flush=True)
"""
    first = start(body, PLAIN)
    while not (Path("process0.json").exists() and Path("process1.json").exists()):
        assert first.poll() is None
        time.sleep(0.01)
    second = start(body, PLAIN)
    holder = facts(0)["pid"]
    assert f"stage tiny is being run by process {holder} since" in second.stderr.readline()
    assert facts(1)["parent"] == first.pid  # no process of the second run has begun
    Path("go").touch()
    for process in (first, second):
        output, errors = process.communicate(timeout=120)
        assert (process.returncode, output.count("done")) == (0, 2), errors
    assert facts(1)["parent"] == second.pid


@pytest.fixture
def executed(monkeypatch):
    """Commands that would have replaced this process, with their environment."""
    calls = []
    monkeypatch.setattr(launch.os, "execvpe", lambda *arguments: calls.append(arguments))
    monkeypatch.setattr(sys, "argv", ["pytest", "one"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", type("Spec", (), {"name": "stages.train"}))
    return calls


def test_the_command_is_the_launcher_and_this_module_with_its_arguments(project, monkeypatch, executed):
    monkeypatch.setenv("SD_LAUNCH", "env 'A B=c' true --num_processes 2")
    run_stage("train", (), lambda params: pytest.fail("it ran here"), distributed=True)
    ((program, command, environment),) = executed
    assert program == "env"
    assert command == ["env", "A B=c", "true", "--num_processes", "2", "-m", "stages.train", "one"]
    assert "SD_LAUNCH" not in environment


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_a_process_that_was_launched_does_not_launch(project, monkeypatch, executed, name):
    ran = []
    monkeypatch.setenv("SD_LAUNCH", "true")
    monkeypatch.setenv(name, "0")
    run_stage("train", (), ran.append, distributed=True)
    assert len(ran) == 1
    assert executed == []


@pytest.mark.parametrize(("launcher", "distributed"), [("true", False), ("", True), (None, True)])
def test_other_stages_and_those_without_a_launcher_run_here(
    project, monkeypatch, executed, launcher, distributed
):
    ran = []
    if launcher is not None:
        monkeypatch.setenv("SD_LAUNCH", launcher)
    run_stage("prepare", (), ran.append, distributed=distributed)
    assert len(ran) == 1
    assert executed == []


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        ("accelerat launch", r"no program 'accelerat' on PATH; install it or correct SD_LAUNCH"),
        ("accelerate 'launch", r"cannot be split into words: No closing quotation"),
    ],
)
def test_a_launcher_that_is_not_there_is_one_clear_error(project, monkeypatch, launcher, message):
    monkeypatch.setenv("SD_LAUNCH", launcher)
    with pytest.raises(SystemExit, match=f"train: SD_LAUNCH: .*{message}"):
        run_stage("train", (), lambda params: None, distributed=True)


def test_only_the_first_process_takes_the_turn_and_trims(project, monkeypatch):
    trimmed = []
    monkeypatch.setattr(stage_run, "trim", lambda *_, **__: trimmed.append(1) or 0)
    lock = project / "data" / ".locks" / "train"
    monkeypatch.setenv("RANK", "1")
    run_stage("train", (), lambda params: None)
    assert (lock.exists(), trimmed) == (False, [])
    monkeypatch.setenv("RANK", "0")
    run_stage("train", (), lambda params: None)
    assert (lock.exists(), trimmed) == (True, [1])


CONNECTED = """
import atexit, os, sys
import torch.distributed as distributed
from stages.lib.frame.errors import StageError
from stages.lib.frame.run import run_command

atexit.register(lambda: print("taken apart, connected:", distributed.is_initialized()))

def main():
    distributed.init_process_group("gloo")
    distributed.barrier()
    if "fail" in sys.argv:
        raise StageError("a reason")

run_command("tiny", main)
"""


def both(tmp_path, *arguments: str) -> list[tuple[int, str, str]]:
    """Status, output and errors of two connected processes."""
    (tmp_path / "connected.py").write_text(CONNECTED)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, "connected.py", *arguments],
            env={**os.environ, **address, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    return [(*process.communicate(), process.returncode)[::-1] for process in started]


def test_a_failed_one_of_several_ends_before_python_is_taken_apart(project):
    """Threads of its connections would end it by a signal then, at times."""
    for index, (status, errors, output) in enumerate(both(project, "fail")):
        assert (status, output) == (1, "")
        assert errors.strip() == ("tiny: a reason", "tiny, process 1: a reason")[index]


def test_processes_that_are_done_close_their_connections(project):
    assert both(project) == [(0, "", "taken apart, connected: False\n")] * 2
