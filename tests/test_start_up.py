"""What a stage loads before it works: after a small change the libraries cost more than the work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stages import prepare
from stages.lib.params import read_params
from tests.conftest import REPOSITORY, draw_image

WATCHED = ("torch", "torch._dynamo", "diffusers", "transformers", "peft", "skimage", "scipy", "scipy.stats")


def libraries_of(stage: str) -> set[str]:
    """Those of `WATCHED` that a run of the stage in a process of its own has loaded at its end."""
    code = (
        "import runpy, sys\n"
        f"runpy.run_module('stages.{stage}', run_name='__main__', alter_sys=True)\n"
        f"print(*(name for name in {WATCHED} if sys.modules.get(name)))"
    )
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
