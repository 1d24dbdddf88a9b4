"""The README's steps with one's own images, some of them broken: dvc repro, exp run, --temp and the queue."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from dvc.utils.serialize import modify_yaml
from scmrepo.git import Git

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


def take_images_from(root: Path, source: str) -> None:
    with modify_yaml(root / "params.yaml") as params:
        params["prepare"].update({"source": source, "max_rejected_fraction": 0.2})


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


@pytest.mark.slow
def test_pictures_that_dvc_was_not_told_of_enter_no_commit(clone: Path) -> None:
    """Of experiments neither, into which DVC takes what git neither knows nor ignores."""
    shutil.copytree(clone.parent / "pictures", clone / "data/raw")
    take_images_from(clone, "data/raw")
    shell(clone, "git commit -qam Raw")
    shell(clone, "dvc exp run -n untold -S prepare.max_samples=12 prepare")
    (ref,) = re.findall(r"\S+/untold", shell(clone, "git for-each-ref"))
    assert "data/raw" not in shell(clone, f"git ls-tree -r --name-only {ref}")
    assert "data/raw" not in shell(clone, "git add -A && git ls-files data && git clean -nd")


@contextlib.contextmanager
def served(directory: Path) -> Iterator[str]:
    """Address of a web server of this machine that shows a directory."""
    handler = functools.partial(_Quiet, directory=str(directory))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def end_headers(self) -> None:
        path = Path(self.translate_path(self.path))
        if path.is_file():
            self.send_header("ETag", hashlib.md5(path.read_bytes()).hexdigest())
        super().end_headers()

    def log_message(self, *_: object) -> None:
        pass


def num_samples(root: Path) -> int:
    return json.loads((root / "data/prepare_metrics.json").read_text())["num_samples"]


@pytest.mark.slow
def test_an_archive_of_the_web_that_dvc_links_to_its_cache(clone: Path) -> None:
    """In the workspace and in a temporary checkout, and when it has changed on the server."""
    web = clone.parent / "web"
    shutil.copytree(clone.parent / "pictures", web / "pictures")
    shutil.make_archive(str(web / "set"), "zip", web / "pictures")
    with served(web) as address:
        shell(clone, "dvc config --local cache.type symlink")
        shell(clone, f"dvc import-url {address}/set.zip data/set.zip")
        assert ".dvc/cache" in os.readlink(clone / "data/set.zip")
        take_images_from(clone, "data/set.zip")
        with modify_yaml(clone / "params.yaml") as params:
            params["prepare"]["max_samples"] = None  # an earlier test's experiment may have left a number
        shell(clone, "dvc repro prepare && git commit -qam Archive")
        assert num_samples(clone) == NUM_PICTURES - len(BROKEN)
        shell(clone, "dvc exp run -n linked --temp -S prepare.max_samples=12 prepare")
        for name in BROKEN:
            draw_image(int(name[:2])).save(web / "pictures" / name)
        shutil.make_archive(str(web / "set"), "zip", web / "pictures")
        shell(clone, "dvc update data/set.zip.dvc && dvc repro prepare")
    assert num_samples(clone) == NUM_PICTURES
    shell(clone, "dvc config --local --unset cache.type")


@pytest.mark.slow
@pytest.mark.parametrize(
    "placed",
    ["data/pairs/mine", "data/pairs/images/mine", "data/pairs", "data/evaluation/mine", "data", "link"],
)
def test_nothing_of_a_folder_where_stages_write_is_removed(clone: Path, placed: str) -> None:
    """Either DVC refuses it, or the stage does; what the stage has made before is in the cache."""
    target = clone / placed
    if placed == "link" and not target.exists():
        (clone / "data/training/mine").mkdir(parents=True)
        target.symlink_to("data/training/mine")
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(clone.parent / "pictures/00.png", target / "of the user.png")
    take_images_from(clone, placed)
    printed = shell(clone, "dvc repro prepare 2>&1; test $? -ne 0")
    assert re.search("expected a path apart|defined as both a dependency and an output", printed), printed
    assert (target / "of the user.png").exists()
    (target / "of the user.png").unlink()


def test_git_ignores_outputs_and_images_and_dvc_finds_its_files_beside_them(tmp_path: Path) -> None:
    """DVC asks dulwich, to which /data/* ignores data/ itself; git is asked here as well."""
    stages = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"]
    ignored = {
        path for stage in stages.values() for kind in ("outs", "metrics") for path in stage.get(kind, [])
    }
    ignored |= {"data/mine/00.png", "data/mine/train/00.png", "data/mine.zip", "data/mine.tar.gz"}
    ignored |= {"data/base.partial", "data/.locks", "data/mine.parquet"}
    found = {"data/.gitignore", "data/mine.dvc", "data/mine.zip.dvc"}
    found |= {"data/pets/.gitignore", "data/pets/cats.dvc"}
    found |= {"data/tiny/vae/config.json", "data/tiny/README.md", "data/openmoji/openmoji.json"}
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    shutil.copyfile(REPOSITORY / ".gitignore", tmp_path / ".gitignore")
    asked = "\n".join(sorted(ignored | found))
    printed = subprocess.run(
        ["git", "check-ignore", "--stdin"], cwd=tmp_path, input=asked, capture_output=True, text=True
    ).stdout
    assert set(printed.split()) == ignored
    scm = Git(str(tmp_path))
    for path in (*found, "data/", "data/pets/"):
        assert not scm.is_ignored(f"{tmp_path}/{path}"), path
