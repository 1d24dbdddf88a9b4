"""What a stage loads before it works: after a small change the libraries cost more than the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages import baseline, evaluate, prepare, report
from stages.lib.frame.params import read_params
from tests.checkpoints import edit_json
from tests.conftest import REPOSITORY, draw_image, run_train, write_params

WATCHED = ("torch", "torch._dynamo", "diffusers", "transformers", "peft", "skimage", "scipy", "scipy.stats")


def libraries_of(stage: str) -> set[str]:
    """Those of `WATCHED` that a run of the stage in a process of its own has loaded at its end."""
    return libraries_after(
        f"import runpy; runpy.run_module('stages.{stage}', run_name='__main__', alter_sys=True)"
    )


def libraries_after(code: str) -> set[str]:
    """Those of `WATCHED` that a process has loaded after ``code``, which prints nothing."""
    code = f"import sys\n{code}\nprint(*(name for name in {WATCHED} if sys.modules.get(name)))"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("tokenize_captions", {"transformers"}),
        ("encode_captions", {"torch"}),
        ("encode_images", {"torch"}),
        ("invert", set()),
    ],
)
def test_a_stage_with_nothing_to_encode_loads_no_model_library(encoded, stage, expected):
    before = {path: path.read_bytes() for path in Path("data").rglob("*.zarr/zarr.json")}
    assert libraries_of(stage) == expected
    assert {path: path.read_bytes() for path in before} == before


def test_one_new_image_loads_diffusers_without_what_it_finds_beside_it(encoded):
    draw_image(99).save(encoded / "images" / "99.png")
    (encoded / "images" / "99.txt").write_text("red cat")
    prepare.main(read_params())
    loaded = libraries_of("encode_images")
    assert "diffusers" in loaded
    assert loaded.isdisjoint({"transformers", "peft", "scipy.stats"})


def test_a_report_needs_no_model_library_and_takes_another_level(encoded):
    """And baseline and evaluate need nothing of the room but what measures, so that it renders nothing."""
    halved = {"source": "images", "validation_fraction": 0.5}
    prepare.main(write_params(prepare=halved))
    run_train()
    for stage in (baseline, evaluate, report):
        stage.main(read_params())
    first = json.loads(Path("data/evaluation/metrics.json").read_text())
    pictures = {path: path.stat().st_mtime_ns for path in Path("data/evaluation").rglob("*.png")}
    write_params(prepare=halved, evaluate={"bootstrap_level": 0.5})
    assert libraries_of("report") == {"torch"}
    assert libraries_of("export") == set()  # which writes the card alone
    second = json.loads(Path("data/evaluation/metrics.json").read_text())
    name = "tuned_validation_loss"
    assert second[name] == first[name]
    assert second[f"{name}_low"] > first[f"{name}_low"]
    assert {path: path.stat().st_mtime_ns for path in pictures} == pictures


@pytest.mark.parametrize("verb", ["show_store", "show_work", "compare", "push"])
def test_a_command_says_what_it_is_for_and_has_one_error(project, verb):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "SD_WORK_MAX_BYTES": "much"}
    command = [sys.executable, "-W", "ignore", "-m", f"stages.{verb}"]

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True)

    done = run("--help")
    assert done.returncode == 0 and f"usage: python -m stages.{verb}" in done.stdout
    arguments, message = {
        "show_store": (["nothing.zarr"], "nothing.zarr: expected a Zarr store, found none"),
        "show_work": ([], "SD_WORK_MAX_BYTES: expected a whole number"),
        "compare": (["nothing"], "not in a DVC repository"),
        "push": (["--to", "nobody"], "expected the id of a repository, owner/name, got 'nobody'"),
    }[verb]
    done = run(*arguments)
    assert done.returncode == 1
    assert f"{verb}: " in done.stderr and message in done.stderr and "Traceback" not in done.stderr


RENDER = """
from pathlib import Path
from stages.lib.frame.params import read_params
from stages.lib.evaluation.measuring.rendering import Request, Setting, load_renderer, render
options = read_params().evaluate.model_copy(update={"batch_size": 1})
base = Path("data/base")
renderer = load_renderer(base, base / "unet", options, ["red cat"], 64, None, 1)
list(render(renderer, Setting("base", 3.0, 3), [Request("red cat", 0)], "pictures"))
"""


@pytest.mark.parametrize(
    ("scheduler", "uses_scipy"),
    [
        ({"_class_name": "DDIMScheduler"}, False),
        ({"_class_name": "LMSDiscreteScheduler"}, True),
        ({"_class_name": "EulerDiscreteScheduler", "use_beta_sigmas": True}, True),
    ],
)
def test_rendering_loads_scipy_for_the_samplers_that_compute_with_it(project, scheduler, uses_scipy):
    edit_json(Path("data/base/scheduler/scheduler_config.json"), **scheduler)
    loaded = libraries_after(RENDER)
    assert {"diffusers", "transformers"} <= loaded and "peft" not in loaded
    assert ("scipy" in loaded) == uses_scipy


def test_a_clip_is_loaded_without_scipy():
    loaded = libraries_after(
        "from pathlib import Path; from stages.lib.evaluation.measuring.clip_features import load_clip\n"
        f"load_clip(Path({str(REPOSITORY / 'data/tiny/clip')!r}))"
    )
    assert "transformers" in loaded and "scipy" not in loaded
