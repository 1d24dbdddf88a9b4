"""dvc.yaml declares what the code uses, and a change reruns exactly the stages that depend on it."""

import ast
import json
import math
import os
import re
import shutil
import subprocess
import sys
from modulefinder import ModuleFinder
from pathlib import Path

import pytest
import yaml
import zarr

from stages.lib.data.pairs import read_captions
from tests.checkpoints import tiny_pipeline
from tests.conftest import REPOSITORY, SMALL, content_fingerprint, draw_image

PIPELINE = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())
STAGES = PIPELINE["stages"]


FRAME = "stages/lib/frame/"


def imported_files(module: str, root: Path = REPOSITORY) -> set[str]:
    """Files of this repository that ``python -m module`` imports and that can change a byte of its outputs.

    The frame changes none, and neither do packages that hold nothing but their docstring.
    """

    class OwnModules(ModuleFinder):
        def import_hook(self, name, caller=None, fromlist=None, level=-1):
            return super().import_hook(name, caller, fromlist, level) if name.startswith("stages") else None

    finder = OwnModules([str(root)])
    path = Path(*module.split(".")).with_suffix(".py")
    finder.run_script(str(root / path))
    found = [Path(each.__file__).relative_to(root) for each in finder.modules.values() if each.__file__]
    return {file.as_posix() for file in found if file.name != "__init__.py"} - {
        file.as_posix() for file in found if file.as_posix().startswith(FRAME)
    }


def code_of(stage: str) -> list[str]:
    return [dep for dep in STAGES[stage]["deps"] if dep.startswith("stages/")]


def module_of(stage: str) -> str:
    return re.fullmatch(r"python -m (stages\.\w+)", STAGES[stage]["cmd"])[1]


def covers(declared: str, file: str) -> bool:
    return file == declared or file.startswith(f"{declared}/")


@pytest.mark.parametrize("stage", STAGES)
def test_declared_code_covers_what_the_stage_imports_and_is_no_wider_than_its_rooms(stage):
    declared, imported = code_of(stage), imported_files(module_of(stage))
    assert [file for file in sorted(imported) if not any(covers(each, file) for each in declared)] == []
    assert [each for each in declared if not any(covers(each, file) for file in imported)] == []
    assert len(declared) <= 18
    for each in declared:
        assert (REPOSITORY / each).exists()
        assert not f"{each}/".startswith(FRAME)
        assert each.count("/") >= 2 or each.endswith(".py"), f"{each} is wider than a room"


def test_packages_hold_nothing_but_their_docstring():
    for path in (REPOSITORY / "stages/lib").rglob("__init__.py"):
        (document,) = ast.parse(path.read_text()).body
        assert isinstance(document, ast.Expr), path


@pytest.mark.parametrize("stage", STAGES)
def test_declared_params_are_those_that_the_stage_reads_and_guards(stage):
    source = (REPOSITORY / Path(*module_of(stage).split("."))).with_suffix(".py").read_text()
    declared = re.search(r"run_stage\([^(]*\(([^)]*)\)", source)[1]
    assert re.findall(r'"([\w.]+)"', declared) == STAGES[stage].get("params", [])


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
    for name in ("stages", ".dvc/config", ".dvcignore", ".gitignore", "None", "dvc.yaml"):
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


def append(path: Path, text: str) -> None:
    path.write_text(path.read_text() + text)


def write(root: Path, params: dict) -> None:
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def dvc(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "SD_WORKERS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("SD_WORK", None)
    command = [sys.executable, "-m", "dvc", *arguments]
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)


def repro(root: Path) -> set[str]:
    """Run `dvc repro`; the names of the stages that ran."""
    done = dvc(root, "repro")
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r"Running stage '(\w+)'", done.stdout))


def changed(root: Path) -> set[str]:
    """The stages that `dvc status` lists."""
    done = dvc(root, "status", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    return set(json.loads(done.stdout))


@pytest.mark.slow
def test_two_fresh_clones_give_identical_outputs(made_repository, tmp_path):
    _, locked = made_repository
    assert (make_repository(tmp_path) / "dvc.lock").read_text() == locked


@pytest.mark.slow
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
    assert repro(repository) == {"train", "evaluate", "report", "gallery", "export"}

    params["evaluate"]["prompts"] = ["a dog"]
    write(repository, params)
    assert repro(repository) == {"baseline", "evaluate", "report", "gallery", "export"}

    params["encode_images"]["horizontal_flip"] = True
    write(repository, params)
    assert repro(repository) == {
        "encode_images", "train", "invert", "baseline", "evaluate", "report", "gallery", "export",
    }  # fmt: skip

    samples = read_captions(repository / "data/pairs/captions.parquet")
    held_out = next(sample.sample_id for sample in samples if sample.split == "validation")
    (repository / "images" / held_out).with_suffix(".txt").write_text("a red heart")
    assert repro(repository) == {
        "prepare", "tokenize", "encode_captions", "train", "invert", "baseline", "evaluate", "report",
        "gallery", "export",
    }  # fmt: skip


@pytest.mark.slow
def test_each_edit_of_code_or_of_a_statistic_concerns_only_what_uses_it(repository):
    repro(repository)
    params = yaml.safe_load((repository / "params.yaml").read_text())
    lib = repository / "stages/lib"

    for path in (lib / "frame").rglob("*.py"):
        append(path, "# a remark\n")
    assert changed(repository) == set()

    section = lib / "frame/sections/evaluate.py"
    shipped = section.read_text()
    section.write_text(shipped.replace("    negative_prompt:", "    another: int\n    negative_prompt:", 1))
    params["evaluate"]["another"] = 1
    write(repository, params)
    assert changed(repository) == {"gallery"}  # the page prints every parameter
    assert repro(repository) == {"gallery"}

    params["evaluate"]["bootstrap_level"] = 0.9
    write(repository, params)
    assert repro(repository) == {"report", "gallery"}  # so few rows have no interval for the card to state

    append(lib / "page/templates/page.css", "/* a remark */\n")
    assert repro(repository) == {"gallery"}

    append(lib / "evaluation/intervals.py", "# a remark\n")
    assert changed(repository) == {"report"}
    append(lib / "models/origins.py", "# a remark\n")
    assert changed(repository) == {
        "report", "fetch_base", "tokenize", "encode_captions", "encode_images", "invert",
    }  # fmt: skip


@pytest.mark.slow
def test_a_loader_that_computes_otherwise_encodes_anew_and_a_remark_does_not(repository):
    repro(repository)
    loaders = repository / "stages/lib/models/loaders.py"

    def encoded() -> tuple[str, str]:
        done = dvc(repository, "repro", "--no-run-cache", "-s", "encode_images")
        assert done.returncode == 0, done.stdout + done.stderr
        found = re.search(r"encode images: (\d+) (?:images|views) encoded, (\d+) reused", done.stderr)
        return found[1], found[2]

    total = int(encoded_rows(repository))
    before = content_fingerprint(repository / "data/latents.zarr")
    append(loaders, "# a remark\n")
    assert encoded() == ("0", str(total))
    assert content_fingerprint(repository / "data/latents.zarr") == before

    shipped = loaders.read_text()
    line = (
        '    return _load_model(AutoencoderKL, component_directory(base, "vae"), torch_dtype=torch.float32)\n'
    )
    assert line in shipped
    louder = line.replace("return ", "vae = ") + (
        "    with torch.no_grad():\n"
        "        for parameter in vae.parameters():\n"
        "            parameter.mul_(1.05)\n"
        "    return vae\n"
    )
    loaders.write_text(shipped.replace(line, louder))
    assert encoded() == (str(total), "0")
    assert content_fingerprint(repository / "data/latents.zarr") != before
    loaders.write_text(shipped)
    assert encoded() == ("0", str(total))  # rows of before are still there


def encoded_rows(root: Path) -> int:
    """Views of all images in data/latents.zarr."""
    return math.prod(zarr.open_group(root / "data/latents.zarr", mode="r")["mean"].shape[:2])


@pytest.mark.parametrize(
    ("section", "key", "stage", "message"),
    [
        ("fetch_base", "directory", "fetch_base", "fetch_base.directory: expected a path"),
        ("fetch_base", "vae_directory", "fetch_base", None),
        ("fetch_base", "clip_directory", "fetch_base", "fetch_base.clip_directory: expected a path"),
        ("prepare", "source", "prepare", "prepare.source: expected"),
    ],
)
@pytest.mark.parametrize("nothing", [None, ""])
@pytest.mark.slow
def test_a_path_that_is_nothing_is_refused_by_the_stage_where_it_is_needed(
    made_repository, tmp_path, section, key, stage, message, nothing
):
    root = shutil.copytree(made_repository[0], tmp_path, dirs_exist_ok=True)
    params = yaml.safe_load((root / "params.yaml").read_text())
    params[section][key] = nothing
    if key == "clip_directory":
        params[section]["clip_source"] = "directory"
    write(root, params)
    assert stage in changed(root)
    done = dvc(root, "repro", "-s", stage)
    said = done.stdout + done.stderr
    assert "unexpected error" not in said
    assert (done.returncode == 0) == (message is None), said
    assert message is None or message in said


@pytest.mark.slow
def test_metrics_plots_and_experiments_are_of_use_at_once(repository):
    def show(*arguments: str) -> str:
        done = dvc(repository, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    names = {
        name
        for file in json.loads(show("metrics", "show", "--json"))[""]["data"].values()
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

    page = Path(show("plots", "show").strip().removeprefix("file://"))
    html = page.read_text()
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[\"']https?:", html)
    for shown in ("train_loss", "validation_loss", "base_guidance3_steps2", "contact_sheet", "vegaEmbed="):
        assert shown in html, shown
