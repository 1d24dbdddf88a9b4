"""Runs of a repository side by side: workspace, branch, commit and experiment, read from DVC's cache."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from stages import compare
from stages.lib.frame.errors import StageError
from tests.browser import headless_browser
from tests.evaluations import PROMPTS, write_run
from tests.pipeline.test_gallery import Parsed, check_self_contained, parse, pixels

OUTPUTS = [
    "data/baseline",
    "data/evaluation",
    "data/training/plots",
    "data/unet",
    "data/pairs",
    "data/encode_images_report",
]
COPY = """import shutil, sys, yaml
from pathlib import Path
seed = yaml.safe_load(Path("params.yaml").read_text())["train"]["seed"]
for path in sys.argv[1:]:
    shutil.copytree(Path("../variants", str(seed), path), path, dirs_exist_ok=True)
"""


WRAPPED_VALUES = """[...document.querySelectorAll("td.value")].filter((cell) => {
  const range = document.createRange();
  range.selectNodeContents(cell);
  return new Set([...range.getClientRects()].map((line) => line.top)).size > 1;
}).length"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A commit `first`, another on main, and an experiment `low-lr`; the workspace is as main."""
    folder = tmp_path_factory.mktemp("compare")
    root = folder / "repository"
    for seed in (1, 2, 3):
        variant = folder / "variants" / str(seed)
        variant.mkdir(parents=True)
        write_run(variant, tuned=seed, loss=0.1 - 0.01 * seed, size=16)
    params = yaml.safe_load((variant / "params.yaml").read_text())
    root.mkdir()
    (root / ".gitignore").write_text("/data\n")
    (root / "copy.py").write_text(COPY)
    stage = {
        "cmd": f"{sys.executable} copy.py {' '.join(OUTPUTS)}",
        "params": ["train", "evaluate"],
        "outs": OUTPUTS,
    }
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"evaluate": stage}}))
    git(root, "init", "-q", "-b", "main")
    for key, value in (("user.name", "Test"), ("user.email", "test@example.org")):
        git(root, "config", key, value)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        with Repo.init(str(root)) as repo:
            for seed, message in ((1, "first"), (2, "second")):
                params["train"]["seed"] = seed
                (root / "params.yaml").write_text(yaml.safe_dump(params, allow_unicode=True))
                repo.reproduce()
                git(root, "add", "-A")
                git(root, "commit", "-qm", message)
                git(root, "tag", message)
            repo.experiments.run(
                name="low-lr", params=["train.seed=3", "train.learning_rate=0.00001"], tmp_dir=False
            )
            git(root, "checkout", "-q", "--", ".")
            repo.checkout(force=True)
    return root


def git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout


@pytest.fixture
def inside(repository, monkeypatch):
    monkeypatch.chdir(repository)
    return repository


def compared(*revisions: str) -> Parsed:
    compare.main(list(revisions), Path("data/comparison.html"))
    return parse(Path("data/comparison.html"))


def test_runs_of_all_kinds_are_aligned_by_prompt_and_seed(inside):
    before = git(inside, "status", "--porcelain"), git(inside, "rev-parse", "HEAD")
    page = compared("workspace", "first", "low-lr")
    check_self_contained(page)
    assert (git(inside, "status", "--porcelain"), git(inside, "rev-parse", "HEAD")) == before
    assert [source["label"] for source in page.data["sources"]] == ["base", "workspace", "first", "low-lr"]
    for source, seed in zip(page.data["sources"][1:], (2, 1, 3), strict=True):
        for cell, name in source["cells"].items():
            setting, prompt, place = map(int, cell.split("/"))
            folder = inside.parent / "variants" / str(seed) / "data/evaluation/samples"
            setting_folder = sorted(path.name for path in folder.iterdir())[setting]
            file = folder / setting_folder / f"prompt{prompt:02d}_seed{(0, 7)[place]}.png"
            assert page.pictures[name] == pixels(file.read_bytes())
    assert [len(chart["lines"]) for chart in page.data["charts"]] == [3] * 4


def test_the_shared_base_is_inside_once(inside):
    page = compared("first", "main", "low-lr")
    num_cells = 2 * len(PROMPTS) * 2
    assert len(page.pictures) == num_cells * 4  # one base and three tuned
    contact_sheet = pixels((inside / "data/baseline/contact_sheet.png").read_bytes())
    assert page.drawings.count(contact_sheet) == 1


def test_metrics_and_parameters_that_differ_are_told_apart(inside):
    page = compared("first", "low-lr")
    differing = page.text[page.text.index("Those that differ") : page.text.index("All ")]
    assert "train.seed 1 3" in differing
    assert "train.learning_rate 0.0001 1e-05" in differing
    assert "train.mixed_precision" not in differing  # no, and false after `dvc exp run -S`
    metrics = page.text[page.text.index("Held-out loss ↓") : page.text.index("CLIP score")]
    assert "base 0.1000" in metrics and "first 0.09000" in metrics and "low-lr 0.07000" in metrics
    assert metrics.count("base 0.1000") == 1


def test_runs_are_judged_against_the_first_sample_by_sample(inside):
    page = compared("first", "low-lr")
    assert "Change from base Change from first" in page.text
    metrics = page.text[page.text.index("Held-out loss ↓") : page.text.index("KID ↓")]
    loss, score = metrics.split("CLIP score ↑")
    assert loss.count("from first") == score.count("from first") == 1  # on the line of the other run
    assert "from first −0.02000 better" in loss
    assert "from first +0 unsettled" in score
    assert "Change from first" not in compared("first").text


def test_a_page_is_a_function_of_its_revisions(inside):
    files = []
    for place in ("one", "two"):
        compare.main(["first", "low-lr"], Path(place) / "page.html")
        files.append({path.relative_to(place): path.read_bytes() for path in Path(place).rglob("*.*")})
    assert files[0] == files[1]
    assert {len(path.parts) for path in files[0]} == {1, 2}


def test_commit_names_read_the_same_run(inside):
    commit = git(inside, "rev-parse", "first").strip()
    assert compared(commit).pictures == compared("first").pictures == compared(commit[:8]).pictures


def test_an_unknown_revision_lists_the_known_ones(inside):
    with pytest.raises(StageError, match=r"nowhere: no such revision; experiments: low-lr; branches: main"):
        compared("main", "nowhere")


def test_outputs_that_the_cache_has_lost_name_the_remedy(repository, tmp_path, monkeypatch):
    shutil.copytree(repository.parent, tmp_path / "copy", symlinks=True)
    root = tmp_path / "copy" / "repository"
    monkeypatch.chdir(root)
    shutil.rmtree(root / ".dvc/cache/files")
    with pytest.raises(
        StageError, match=r"low-lr: .*'data', 'evaluation'.*neither the cache.*dvc fetch"
    ) as caught:
        compared("low-lr")
    assert "dvc exp run" in str(caught.value)


def test_a_single_lost_picture_is_named(repository, tmp_path, monkeypatch):
    shutil.copytree(repository.parent, tmp_path / "copy", symlinks=True)
    root = tmp_path / "copy" / "repository"
    monkeypatch.chdir(root)
    lost = "samples/ddim_guidance2_steps10/prompt01_seed7.png"
    digest = hashlib.md5((root.parent / "variants/3/data/evaluation" / lost).read_bytes()).hexdigest()
    (root / ".dvc/cache/files/md5" / digest[:2] / digest[2:]).unlink()
    with pytest.raises(StageError, match=rf"low-lr: data/evaluation/{lost}: .*neither the cache"):
        compared("low-lr")


def test_a_revision_without_an_evaluation_says_which_stage_to_run(inside):
    git(inside, "checkout", "-q", "--orphan", "bare")
    git(inside, "rm", "-rqf", "--cached", ".")
    git(inside, "add", "params.yaml", ".dvc/config")
    git(inside, "commit", "-qm", "bare")
    git(inside, "checkout", "-qf", "main")
    with pytest.raises(StageError, match=r"bare: data/evaluation/report.json: .*run `dvc repro report`"):
        compared("bare")
    git(inside, "branch", "-D", "bare")


def test_outside_of_a_repository_the_command_says_so(tmp_path):
    command = [sys.executable, "-m", "stages.compare", "main"]
    environment = {"PYTHONPATH": str(Path(compare.__file__).parent.parent), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "compare: " in done.stderr and "not in a DVC repository" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_comparison_fits_the_window(inside):
    compare.main(["first", "low-lr"], Path("data/comparison.html"))
    with headless_browser() as browser:
        for width in (1280, 800, 390):
            browser.open(inside / "data/comparison.html", width=width)
            assert browser.run("document.documentElement.scrollWidth") <= width
            assert browser.run(WRAPPED_VALUES) == 0


def test_any_two_runs_can_be_laid_over_each_other(inside):
    compare.main(["first", "low-lr"], Path("data/comparison.html"))
    sources = {source["label"]: source for source in parse(Path("data/comparison.html")).data["sources"]}
    with headless_browser() as browser:
        browser.open(inside / "data/comparison.html")
        for side, label in (("left", "low-lr"), ("right", "first")):
            browser.run(
                f"(() => {{ const select = document.getElementById('{side}-source');"
                f"select.selectedIndex = [...select.options].findIndex((each) => each.text === '{label}');"
                "select.dispatchEvent(new Event('change')); })()"
            )
            shown = browser.run(f"document.getElementById('{side}').src === page.pictures["
                                f"{json.dumps(sources[label]['cells']['0/0/0'])}].uri")  # fmt: skip
            assert shown, label
        assert browser.run("document.querySelectorAll('#strip button').length") == 3
        for number, label in enumerate(("base", "first", "low-lr")):
            browser.run(f"document.querySelectorAll('#strip button')[{number}].click()")
            for side, expected in (("left", "low-lr"), ("right", label)):
                uri = f"page.pictures[{json.dumps(sources[expected]['cells']['0/0/0'])}].uri"
                assert browser.run(f"document.getElementById('{side}').src === {uri}"), (side, label)
        assert browser.complaints() == []
        assert [address for address in browser.requests() if not address.startswith("file:")] == []
