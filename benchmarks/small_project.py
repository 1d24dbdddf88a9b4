"""A small project for the scripts that break things: real stages, a tiny base, a few drawn pictures."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.checkpoints import tiny_pipeline  # noqa: E402
from tests.clips import bundled_clip  # noqa: E402
from tests.conftest import CAPTIONS, SMALL, draw_image  # noqa: E402

STAGES = ("fetch_base", "prepare", "tokenize", "encode_captions", "encode_images", "train", "invert",
          "baseline", "evaluate", "report", "gallery")  # fmt: skip
MODULE_OF = {stage: f"stages.{stage}" for stage in STAGES} | {"tokenize": "stages.tokenize_captions"}


def environment(**changes: str) -> dict[str, str]:
    """Of what is started: one thread, one encoder process, this Python's programs on PATH."""
    found = {name: value for name, value in os.environ.items() if not name.startswith(("SD_", "DVC_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**found, "PATH": path, "OMP_NUM_THREADS": "1", "SD_WORKERS": "1", **changes}


def run(root: Path, *command: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """A command in the project, waited for."""
    return subprocess.run(
        command, cwd=root, env=environment(**changes), capture_output=True, text=True, errors="replace"
    )


def run_stage(root: Path, stage: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """A stage by hand."""
    return run(root, sys.executable, "-m", MODULE_OF[stage], **changes)


def dvc(root: Path, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """A command of DVC."""
    return run(root, sys.executable, "-m", "dvc", *arguments, **changes)


def must(done: subprocess.CompletedProcess[str]) -> None:
    """Stop if a command that has to work has failed."""
    if done.returncode:
        raise SystemExit(f"{' '.join(done.args)}: {done.stdout}{done.stderr}")


def make(root: Path, seeds: tuple[int, ...] = tuple(range(12)), **sections: dict[str, object]) -> Path:
    """The files of this checkout, a tiny base and drawn pictures; nothing has run.

    Args:
        root: a new directory.
        seeds: a picture each.
        sections: changes of params.yaml.
    """
    root.mkdir(parents=True)
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split("\0")  # fmt: skip
    for name in filter(None, tracked):
        if (ROOT / name).is_file() and not name.startswith(("data/tiny/", "docs/", "tests/", "benchmarks/")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    (root / "dvc.lock").unlink(missing_ok=True)
    for command in ("init -q", "add -A", "-c user.name=x -c user.email=x@y commit -qm start"):
        must(run(root, "git", *command.split()))
    bundled_clip(tiny_pipeline(root / "base") / "clip")
    draw(root, seeds)
    write_params(root, **sections)
    return root


def draw(root: Path, seeds: tuple[int, ...]) -> None:
    """Pictures with captions in ``images``."""
    shutil.rmtree(root / "images", ignore_errors=True)
    (root / "images").mkdir()
    for index, seed in enumerate(seeds):
        draw_image(seed).save(root / "images" / f"{index:02d}.png")
        (root / "images" / f"{index:02d}.txt").write_text(CAPTIONS[seed % len(CAPTIONS)])
    (root / "images" / "broken.png").write_bytes(b"no picture")
    (root / "images" / "broken.txt").write_text("broken")


def write_params(root: Path, **sections: dict[str, object]) -> None:
    """params.yaml of the repository with small values, and ``sections`` over them."""
    document = yaml.safe_load((ROOT / "params.yaml").read_text())
    own = {
        "fetch_base": {"directory": "base", "vae_directory": "base/vae", "clip_directory": "base/clip"},
        "prepare": {"max_rejected_fraction": 0.5},
    }
    for section in document:
        for changes in (SMALL.get(section, {}), own.get(section, {}), sections.get(section, {})):
            document[section] |= changes
    (root / "params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


def outputs(root: Path) -> dict[str, bytes]:
    """Path -> content of everything that stages have made, but for what tells of the machine."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted((root / "data").rglob("*"))
        if path.is_file() and ".locks" not in path.parts and path.name != "training_speed.json"
    }
