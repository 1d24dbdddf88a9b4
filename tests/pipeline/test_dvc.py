"""dvc.yaml declares what the code uses, and a change reruns exactly the stages that depend on it."""

import json
import os
import re
import shutil
import subprocess
import sys
from modulefinder import ModuleFinder
from pathlib import Path

import pytest
import yaml

from tests.checkpoints import tiny_pipeline
from tests.conftest import REPOSITORY, SMALL, draw_image

PIPELINE = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())
STAGES = PIPELINE["stages"]


def imported_files(module: str) -> set[str]:
    """Files of this repository that ``python -m module`` imports, empty packages left out."""

    class OwnModules(ModuleFinder):
        def import_hook(self, name, caller=None, fromlist=None, level=-1):
            return super().import_hook(name, caller, fromlist, level) if name.startswith("stages") else None

    finder = OwnModules([str(REPOSITORY)])
    path = Path(*module.split(".")).with_suffix(".py")
    finder.run_script(str(REPOSITORY / path))
    files = {
        Path(found.__file__).relative_to(REPOSITORY) for found in finder.modules.values() if found.__file__
    }
    return {file.as_posix() for file in files if (REPOSITORY / file).read_text()}


def module_of(stage: str) -> str:
    return re.fullmatch(r"python -m (stages\.\w+)( \w+)?", STAGES[stage]["cmd"])[1]


@pytest.mark.parametrize("stage", STAGES)
def test_declared_code_is_what_the_stage_imports(stage):
    declared = {dep for dep in STAGES[stage]["deps"] if dep.endswith(".py")}
    assert declared == imported_files(module_of(stage))


@pytest.mark.parametrize("stage", STAGES)
def test_declared_params_are_the_sections_the_stage_guards(stage):
    source = (REPOSITORY / Path(*module_of(stage).split("."))).with_suffix(".py").read_text()
    sections = re.search(r"run_stage\([^(]*\(([^)]*)\)", source)[1]
    assert re.findall(r'"(\w+)"', sections) == STAGES[stage].get("params", [])


def test_libraries_import_no_stage_and_stages_no_other_stage():
    for path in (REPOSITORY / "stages").rglob("*.py"):
        for imported in re.findall(r"^\s*from (stages\S*) import", path.read_text(), re.MULTILINE):
            assert imported.startswith("stages.lib."), (path, imported)


def test_no_module_shadows_the_standard_library_or_a_dependency():
    taken = set(sys.stdlib_module_names) | {"datasets", "zarr", "torch", "diffusers", "emoji", "PIL", "dvc"}
    names = {path.stem for path in (REPOSITORY / "stages").rglob("*.py")} - {"__init__"}
    assert not names & taken


def make_repository(root: Path) -> Path:
    """A repository with this pipeline, a random base and twelve images, reproduced once."""
    for name in ("stages", ".dvc/config", ".dvcignore", ".gitignore", "dvc.yaml"):
        source, target = REPOSITORY / name, root / name
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, target)
    tiny_pipeline(root / "base")
    (root / "images").mkdir()
    for index in range(12):
        draw_image(index).save(root / "images" / f"{index:02d}.png")
        (root / "images" / f"{index:02d}.txt").write_text(f"photo of a {'cat' if index % 2 else 'dog'}")
    params = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    for section in params:
        params[section] |= SMALL.get(section, {})
    params["fetch_base"] |= {"directory": "base", "vae_directory": "base/vae", "clip_directory": "base"}
    params["train"] |= {"max_train_steps": 2, "lr_warmup_steps": 0}
    write(root, params)
    identity = ["-c", "user.name=Test", "-c", "user.email=test@example.org"]
    for command in (["init", "-q"], ["add", "dvc.yaml"], [*identity, "commit", "-qm", "Start"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    assert repro(root) == set(STAGES)
    return root


@pytest.fixture(scope="module")
def made_repository(tmp_path_factory):
    """A repository that tests change, and its dvc.lock before they do."""
    root = make_repository(tmp_path_factory.mktemp("repository"))
    return root, (root / "dvc.lock").read_text()


@pytest.fixture
def repository(made_repository):
    return made_repository[0]


def write(root: Path, params: dict) -> None:
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def repro(root: Path) -> set[str]:
    """Run `dvc repro`; the names of the stages that ran."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SD_WORKERS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("SD_WORK", None)
    command = [sys.executable, "-m", "dvc", "repro"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r"Running stage '(\w+)'", done.stdout))


def test_two_fresh_clones_give_identical_outputs(made_repository, tmp_path):
    _, locked = made_repository
    assert (make_repository(tmp_path) / "dvc.lock").read_text() == locked


def test_each_change_reruns_exactly_the_stages_that_depend_on_it(repository):
    params = yaml.safe_load((repository / "params.yaml").read_text())
    assert repro(repository) == set()

    reordered = {section: dict(reversed(values.items())) for section, values in reversed(params.items())}
    write(repository, reordered)
    with open(repository / "params.yaml", "a") as handle:
        handle.write("# a remark\n")
    assert repro(repository) == set()

    params["train"]["learning_rate"] = 2e-4
    write(repository, params)
    assert repro(repository) == {"train", "evaluate", "gallery"}

    params["evaluate"]["prompts"] = ["a dog"]
    write(repository, params)
    assert repro(repository) == {"baseline", "evaluate", "gallery"}

    params["encode_images"]["horizontal_flip"] = True
    write(repository, params)
    assert repro(repository) == {"encode_images", "train", "baseline", "evaluate", "gallery"}

    (repository / "images" / "04.txt").write_text("a red heart")
    expected = {"prepare", "tokenize", "encode_captions", "train", "baseline", "evaluate", "gallery"}
    assert repro(repository) == expected


def test_metrics_plots_and_experiments_are_of_use_at_once(repository):
    def dvc(*arguments: str) -> str:
        command = [sys.executable, "-m", "dvc", *arguments]
        return subprocess.run(command, cwd=repository, capture_output=True, text=True, check=True).stdout

    names = {
        name
        for file in json.loads(dvc("metrics", "show", "--json"))[""]["data"].values()
        for name in file["data"]
    }
    assert {
        "validation_loss",
        "tuned_validation_loss",
        "base_validation_loss",
        "reconstruction_psnr",
    } <= names
    params = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    keys = {key for section in params.values() for key in section}
    assert not names & keys

    page = Path(dvc("plots", "show").strip().removeprefix("file://"))
    html = page.read_text()
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[\"']https?:", html)
    for shown in ("train_loss", "validation_loss", "base_guidance3_steps2", "contact_sheet", "vegaEmbed="):
        assert shown in html, shown
