"""The README's steps with one's own images, some of them broken: dvc repro, exp run, --temp and the queue."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from dvc.utils.serialize import modify_yaml

from tests.checkpoints import tiny_pipeline
from tests.conftest import REPOSITORY, SMALL, draw_image

NUM_PICTURES, BROKEN = 30, ("03.png", "11.png", "27.png")
WAITED = 240  # seconds for the queue


def section() -> str:
    return re.search(r"## Your own images\n(.*?)\n## ", (REPOSITORY / "README.md").read_text(), re.DOTALL)[1]


def commands() -> list[str]:
    """The commands of the section's first block."""
    block = re.search(r"```console\n(.*?)```", section(), re.DOTALL)[1]
    return [line.removeprefix("$ ") for line in block.splitlines()]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of this pipeline with a random base, and pictures in the home directory."""
    home = tmp_path_factory.mktemp("home")
    root = home / "clone"
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "stages", "data/openmoji", ".dvc",
         ".dvcignore", ".gitignore", "None", "dvc.yaml", "params.yaml"],
        cwd=REPOSITORY, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    if not tracked:  # no git here: the tree as it is
        tracked = [
            str(path.relative_to(REPOSITORY))
            for name in ("stages", "data/openmoji")
            for path in (REPOSITORY / name).rglob("*.*")
        ] + [".dvc/config", ".dvcignore", ".gitignore", "None", "dvc.yaml", "params.yaml"]
    for name in tracked:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, root / name)
    tiny_pipeline(root / "base")
    with modify_yaml(root / "params.yaml") as params:
        for name, values in SMALL.items():
            params[name].update(
                {key: value for key, value in values.items() if key not in ("source", "prompts")}
            )
        params["fetch_base"].update(
            {"directory": "base", "vae_directory": "base/vae", "clip_directory": "base"}
        )
        params["train"].update({"max_train_steps": 2, "lr_warmup_steps": 0})
    for command in (
        ["init", "-q"],
        ["config", "user.name", "Test"],
        ["config", "user.email", "t@example.org"],
    ):
        subprocess.run(["git", *command], cwd=root, check=True)
    subprocess.run("git add -A && git commit -qm Start", shell=True, cwd=root, check=True)
    pictures = home / "pictures"
    pictures.mkdir()
    for index in range(NUM_PICTURES):
        draw_image(index).save(pictures / f"{index:02d}.png")
        (pictures / f"{index:02d}.txt").write_text(f"a picture of {'a cat' if index % 2 else 'two dogs'}")
    for name in BROKEN:
        whole = (pictures / name).read_bytes()
        (pictures / name).write_bytes(whole[: len(whole) // 2])
    return root


def shell(root: Path, command: str) -> str:
    """A command as a user types it in the clone."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SD_")}
    environment |= {
        "HOME": str(root.parent),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "SD_WORKERS": "1",
    }
    done = subprocess.run(
        command, shell=True, cwd=root, env=environment, capture_output=True, text=True, timeout=WAITED
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def experiments_work(root: Path) -> None:
    """In the workspace, in a temporary checkout, and in a queue."""
    shell(root, "dvc exp run -n in-workspace -S train.seed=1")
    shell(root, "dvc exp run -n in-temp --temp -S train.seed=2")
    queued = re.search(r"\$ (dvc exp run --queue) \S+ \S+ && (dvc queue start)", section())
    shell(root, f"{queued[1]} -n in-queue -S train.seed=3 && {queued[2]}")
    started = time.monotonic()
    while "Success" not in (status := shell(root, "dvc queue status")):
        assert "Failed" not in status, shell(root, "dvc queue logs in-queue")
        assert time.monotonic() - started < WAITED, status
        time.sleep(1)
    shell(root, "dvc queue stop --kill")
    shown = json.loads(shell(root, "dvc exp show --json --no-pager"))
    found = {
        run["name"]: run["revs"][0]["data"]["metrics"]["data/prepare_metrics.json"]["data"]["num_samples"]
        for commit in shown
        for run in commit["experiments"] or []
    }
    assert found == dict.fromkeys(("in-workspace", "in-temp", "in-queue"), NUM_PICTURES - len(BROKEN))


@pytest.mark.slow
def test_the_steps_of_the_readme_with_a_folder_inside(clone: Path) -> None:
    for command in commands():
        printed = shell(clone, command)
    assert sorted(json.loads(line)["name"] for line in printed.splitlines()) == list(BROKEN)
    assert (
        yaml.safe_load((clone / "params.yaml").read_text())["evaluate"]["prompts"][0] == "a prompt of yours"
    )
    tracked = shell(clone, "git ls-files data").split()
    assert "data/mine.dvc" in tracked and not [
        name for name in tracked if name.endswith(("00.png", "00.txt"))
    ]
    experiments_work(clone)


@pytest.mark.slow
def test_a_folder_that_stays_outside(clone: Path) -> None:
    """After the one above, as DVC has everything but what changed."""
    outside = clone.parent / "outside"
    if not outside.exists():
        shutil.copytree(clone.parent / "pictures", outside)
        draw_image(99).save(outside / "00.png")
    for name in ("in-workspace", "in-temp", "in-queue"):
        shell(clone, f"dvc exp remove {name} || true")
    shell(clone, f"sed -i 's|^  source: data/[a-z]*|  source: {outside}|' params.yaml")
    shell(clone, "sed -i 's|max_rejected_fraction: 0.05|max_rejected_fraction: 0.2|' params.yaml")
    shell(clone, "dvc repro")
    experiments_work(clone)


def test_every_output_is_ignored_by_name_and_nothing_else_of_data_is() -> None:
    """With data/* ignored DVC would look for no data/mine.dvc; outputs that are not would be committed."""
    stages = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]
    outputs = [
        path for stage in stages.values() for kind in ("outs", "metrics") for path in stage.get(kind, [])
    ]
    lines = (REPOSITORY / ".gitignore").read_text().splitlines()
    for path in outputs:
        assert any(path == line[1:] or f"/{path}".startswith(f"{line}/") for line in lines), path
    assert not [line for line in lines if line.startswith("/data") and "*" in line]
