"""Inputs that move while a stage runs fail it; outputs that share a file with DVC's cache are taken apart."""

import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from stages.lib.core.files import write_json
from stages.lib.frame.errors import StageError
from stages.lib.frame.inputs import break_links, check_apart, declared, inputs_of, look_at, outputs_of
from stages.lib.frame.params import read_params
from stages.lib.frame.run import run_stage
from tests.conftest import REPOSITORY


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A directory with the repository's dvc.yaml, and a folder of three files as prepare.source."""
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copyfile(REPOSITORY / name, tmp_path / name)
    document = yaml.safe_load((tmp_path / "params.yaml").read_text())
    document["prepare"]["source"] = "mine"
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(document))
    (tmp_path / "mine/inner").mkdir(parents=True)
    for name in ("a.png", "a.txt", "inner/b.txt"):
        (tmp_path / "mine" / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    for name in ("SD_WORK", "SD_WORK_MAX_BYTES", "SD_LAUNCH", "RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def edit() -> None:
    Path("mine/inner/b.txt").write_text("x" * 7)  # of the length it had


def add() -> None:
    Path("mine/new.png").write_text("new")


def remove() -> None:
    Path("mine/a.txt").unlink()


def replace() -> None:
    before = Path("mine/a.png").stat()
    Path("other").write_text("b.png")
    os.utime("other", ns=(before.st_atime_ns, before.st_mtime_ns))
    Path("other").replace("mine/a.png")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (edit, r"changed mine/inner/b\.txt"),
        (add, r"new mine/new\.png"),
        (remove, r"gone mine/a\.txt"),
        (replace, r"changed mine/a\.png"),
    ],
)
def test_an_input_that_moves_while_the_stage_runs_fails_it(checkout, change, named):
    with pytest.raises(
        SystemExit, match=rf"inputs changed while it ran \({named}\).*`dvc repro prepare` again"
    ):
        run_stage("prepare", ("prepare",), lambda params: change())
    run_stage("prepare", ("prepare",), lambda params: None)


def test_the_inputs_are_those_of_dvc_yaml_without_code(checkout):
    params = read_params()
    assert inputs_of(declared("prepare"), params) == [Path("mine")]
    assert sorted(look_at(inputs_of(declared("prepare"), params))) == [
        "mine/a.png",
        "mine/a.txt",
        "mine/inner/b.txt",
    ]
    assert Path("data/pairs/captions.parquet") in inputs_of(declared("train"), params)
    assert not any(path.parts[0] == "stages" for path in inputs_of(declared("train"), params))
    assert Path("data/training/metrics.json") in outputs_of(declared("train"))


@pytest.mark.parametrize("nothing", [None, ""])
def test_a_parameter_that_names_no_path_is_no_input(checkout, nothing):
    document = yaml.safe_load(Path("params.yaml").read_text())
    document["fetch_base"]["vae_directory"] = nothing
    Path("params.yaml").write_text(yaml.safe_dump(document))
    params = read_params()
    assert inputs_of(declared("fetch_base"), params) == [Path("data/tiny"), Path("data/tiny/clip")]


@pytest.mark.parametrize("link", [os.link, os.symlink])
def test_a_stage_by_hand_writes_nothing_into_the_cache(checkout, link):
    """With cache.type hardlink or symlink, the output is a name of the cache's own file."""
    cached = checkout / "cache"
    cached.mkdir()
    (cached / "metrics").write_text("kept")
    Path("data/pairs/images").mkdir(parents=True)
    link(cached / "metrics", "data/prepare_metrics.json")
    link(cached / "metrics", "data/pairs/images/shard.parquet")
    Path("data/pairs/rejected.jsonl").write_text("own")

    def main(params):
        assert not Path("data/pairs/images").exists()
        assert Path("data/pairs/rejected.jsonl").read_text() == "own"
        Path("data/prepare_metrics.json").write_text("new")

    run_stage("prepare", ("prepare",), main)
    assert (cached / "metrics").read_text() == "kept"
    assert Path("data/prepare_metrics.json").read_text() == "new"


def test_a_file_that_is_written_again_is_another_file(tmp_path):
    """Whatever calls `write_json` without a stage around it: the other name keeps what it holds."""
    write_json(tmp_path / "metrics.json", {"a": 1})
    os.link(tmp_path / "metrics.json", tmp_path / "cached")
    write_json(tmp_path / "metrics.json", {"a": 2})
    assert '"a": 1' in (tmp_path / "cached").read_text()
    break_links([tmp_path / "absent"])


@pytest.mark.parametrize(
    ("placed", "relation"),
    [
        ("data/pairs", "the same as data/pairs"),
        ("data/pairs/mine", "inside of data/pairs"),
        ("data/pairs/images/sub", "inside of data/pairs"),
        ("data/../data/pairs/mine/", "inside of data/pairs"),
        ("linked", "inside of data/latents.zarr"),
        ("data", "around data"),
        (".", "around"),
        ("..", "around"),
        ("data/base.partial/x", r"inside of data/base\.partial"),
        ("data/pairs/set.zip", "inside of data/pairs"),
        ("data/evaluation", "the same as data/evaluation"),
        (".work/train", r"inside of .*\.work"),
        (".dvc/cache", r"inside of \.dvc"),
        ("data/.locks", r"the same as data/\.locks"),
    ],
)
def test_a_source_where_something_is_written_is_refused_before_anything_is_removed(
    checkout: Path, placed: str, relation: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("data/latents.zarr/mine").mkdir(parents=True)
    Path("linked").symlink_to("data/latents.zarr/mine")
    if placed.endswith(".zip"):
        Path(placed).parent.mkdir(parents=True)
        Path(placed).write_bytes(b"PK")
    else:
        Path(placed).mkdir(parents=True, exist_ok=True)
        Path(placed, "a.png").write_bytes(b"the user's")
    document = yaml.safe_load(Path("params.yaml").read_text())
    document["prepare"]["source"] = placed
    Path("params.yaml").write_text(yaml.safe_dump(document))

    def never(params: object) -> None:
        raise AssertionError("the stage must not begin")

    before = {
        path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and ".locks" not in str(path)
    }
    with pytest.raises(SystemExit, match=rf"prepare\.source: expected a path apart.*{relation}.*move it"):
        run_stage("prepare", ("prepare",), never)
    after = {path: path.read_bytes() for path in before}
    assert after == before


def test_what_lies_beside_the_outputs_is_fine(checkout: Path) -> None:
    for placed in ("data/mine", "data/openmoji", "data/pairs2", "mine", "/tmp"):
        document = yaml.safe_load(Path("params.yaml").read_text())
        document["prepare"]["source"] = placed
        Path("params.yaml").write_text(yaml.safe_dump(document))
        if placed != "/tmp" or not str(checkout).startswith("/tmp"):
            check_apart("prepare", read_params(), checkout / ".work")


@pytest.mark.parametrize("stage", ["fetch_base", "prepare", "report"])
@pytest.mark.parametrize(
    ("section", "key", "placed"),
    [
        ("fetch_base", "directory", "data/base"),
        ("fetch_base", "vae_directory", "data/base/vae"),
        ("fetch_base", "clip_directory", "data/pairs/clip/"),
        ("evaluate", "inception_weights", "data/evaluation/weights-inception.pth"),
    ],
)
def test_whatever_stage_runs_every_path_is_looked_at(
    checkout: Path, stage: str, section: str, key: str, placed: str
) -> None:
    document = yaml.safe_load(Path("params.yaml").read_text())
    document[section][key] = placed
    Path("params.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(StageError, match=rf"{section}\.{key}: .* got {placed.rstrip('/')}, which is"):
        check_apart(stage, read_params(), checkout / ".work")


def test_a_stage_that_a_user_has_added_may_make_the_images(checkout: Path) -> None:
    document = yaml.safe_load(Path("dvc.yaml").read_text())
    document["stages"]["download"] = {"cmd": "python download.py", "outs": [{"mine": {"persist": True}}]}
    document["stages"]["prepare"]["outs"] += [{"mine2": {"cache": False}}]
    Path("dvc.yaml").write_text(yaml.safe_dump(document))
    check_apart("prepare", read_params(), checkout / ".work")
    assert outputs_of(declared("prepare"))[-2] == Path("mine2")
    parameters = yaml.safe_load(Path("params.yaml").read_text())
    parameters["prepare"]["source"] = "mine2"
    Path("params.yaml").write_text(yaml.safe_dump(parameters))
    with pytest.raises(StageError, match="the same as mine2"):
        check_apart("prepare", read_params(), checkout / ".work")


def test_a_file_that_dvc_links_to_its_cache_lies_where_the_link_does(checkout: Path) -> None:
    Path(".dvc/cache").mkdir(parents=True)
    Path(".dvc/cache/6b73").write_bytes(b"PK")
    Path("mine/set.zip").symlink_to(checkout / ".dvc/cache/6b73")
    parameters = yaml.safe_load(Path("params.yaml").read_text())
    for placed, refused in (("mine/set.zip", False), (".dvc/cache/6b73", True), ("mine/cache/6b73", True)):
        parameters["prepare"]["source"] = placed
        Path("params.yaml").write_text(yaml.safe_dump(parameters))
        Path("mine/cache").unlink(missing_ok=True)
        Path("mine/cache").symlink_to(checkout / ".dvc/cache")
        with pytest.raises(StageError, match=r"inside of \.dvc") if refused else nullcontext():
            check_apart("prepare", read_params(), checkout / ".work")
