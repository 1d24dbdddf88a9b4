"""The identity of code counts what computes a result, and nothing that people only read."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stages.lib.core import fingerprints
from stages.lib.core.fingerprints import code_identity
from tests.conftest import REPOSITORY

FILES = {
    "top.py": '''"""A module."""

from stages.lib.core.helper import helped, other
from stages.lib.frame.talk import say

SCALE = 2


def root(x):
    """Doubles."""
    if x < 0:
        raise ValueError("expected 0 or more")
    say(x)
    from stages.lib.core.late import later

    return later(helped(x)) * SCALE + other(x) - Kept().value


class Kept(object):
    value = 0


def unreached(x):
    return x
''',
    "helper.py": """from stages.lib.core.deep import deeper


def helped(x):
    return deeper(x)


def other(x):
    return x


def unused(x):
    return x
""",
    "deep.py": "STEP = 3\n\n\ndef deeper(x):\n    return x + STEP\n",
    "late.py": "def later(x):\n    return x\n",
    "../frame/talk.py": "def say(x):\n    print(x)\n",
}


class Project:
    """A project of a few modules, `small`, whose code is identified anew at each call."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.core = root / "small/lib/core"
        for folder in (self.core, root / "small/lib/frame"):
            folder.mkdir(parents=True)
        for name, text in FILES.items():
            (self.core / name).resolve().write_text(text.replace("stages.", "small."))
        monkeypatch.syspath_prepend(root)
        monkeypatch.setattr(fingerprints, "_ROOT", root)
        monkeypatch.setattr(fingerprints, "PROJECT", "small")
        monkeypatch.setattr(fingerprints, "CHANGES_NO_BYTE", "small.lib.frame")

    def edit(self, name: str, old: str, new: str) -> None:
        path = (self.core / name).resolve()
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))

    def function(self, module: str, name: str) -> Callable[..., object]:
        forget()
        importlib.invalidate_caches()
        return getattr(importlib.import_module(f"small.lib.core.{module}"), name)

    def identity(self, *without: tuple[str, str]) -> str:
        left_out = [self.function(*each) for each in without]
        return code_identity(self.function("top", "root"), without=left_out)


def forget() -> None:
    """What was read and imported of the small project."""
    for name in [name for name in sys.modules if name.split(".")[0] == "small"]:
        del sys.modules[name]
    for cached in (fingerprints._module, fingerprints._own_hash, fingerprints._bindings):
        cached.cache_clear()


@pytest.fixture
def project(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # edits come faster than file times tell apart
    yield Project(tmp_path, monkeypatch)
    forget()


@pytest.mark.parametrize(
    "edits",
    [
        [("top.py", "SCALE = 2\n", "# a remark\n\nSCALE = 2  # another\n")],
        [("top.py", "Doubles.", "Gives twice as much.")],
        [("top.py", '"""A module."""', '"""Another module."""')],
        [("top.py", "expected 0 or more", "expected no less than 0")],
        [("top.py", "def unreached(x):\n    return x", "def unreached(x):\n    return -x")],
        [("helper.py", "def unused(x):\n    return x", "def unused(x):\n    return -x")],
        [("../frame/talk.py", "print(x)", "print(x, x)")],
        [("deep.py", "STEP = 3\n", ""), ("deep.py", "x + STEP\n", "x + STEP\n\n\nSTEP = 3\n")],
        [("helper.py", "return deeper(x)", "return (\n        deeper(x)\n    )")],
    ],
    ids=[
        "remarks", "docstring", "module docstring", "error text", "unreached", "unused", "frame", "order",
        "layout",
    ],
)  # fmt: skip
def test_what_computes_nothing_leaves_the_identity(project, edits):
    before = project.identity()
    for edit in edits:
        project.edit(*edit)
    assert project.identity() == before


def test_a_renamed_file_leaves_the_identity(project):
    before = project.identity()
    (project.core / "deep.py").rename(project.core / "renamed.py")
    project.edit("helper.py", "core.deep", "core.renamed")
    assert project.identity() == before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("top.py", "SCALE = 2", "SCALE = 3"),
        ("top.py", "x < 0", "x < 1"),
        ("top.py", "value = 0", "value = 1"),
        ("helper.py", "return deeper(x)", "return deeper(x) + 1"),
        ("deep.py", "STEP = 3", "STEP = 4"),
        ("late.py", "return x", "return -x"),
        ("late.py", "def later", "import os\n\nos.environ.setdefault('A', '1')\n\n\ndef later"),
        ("late.py", "def later", "@staticmethod\ndef later"),
        ("top.py", "class Kept(object)", "class Kept(dict)"),
        ("top.py", "import helped, other", "import helped as other, other as helped"),
        ("helper.py", "import deeper", "import STEP as deeper"),
    ],
)
def test_what_computes_changes_the_identity(project, name, old, new):
    before = project.identity()
    project.edit(name, old, new)
    assert project.identity() != before


def test_what_is_left_out_and_what_it_alone_reaches_does_not_count(project):
    helped = ("helper", "helped")
    before = project.identity(helped)
    assert before != project.identity()
    project.edit("deep.py", "STEP = 3", "STEP = 4")
    assert project.identity(helped) == before


def test_a_function_of_another_place_counts_with_its_whole_file(tmp_path):
    def local(x):
        return x

    assert code_identity(local) == code_identity(test_what_computes_changes_the_identity)


# --- the real code


IDENTITIES = """
from stages import encode_captions, encode_images
from stages.lib.core.fingerprints import code_identity
from stages.lib.encoding.autoencoder import build_image_encoder
from stages.lib.encoding.batches import InProcess, compute_with_one_thread
from stages.lib.encoding.autoencoder import build_reconstructor
from stages.lib.encoding.text_encoder import build_caption_encoder
common = InProcess, compute_with_one_thread
print(code_identity(build_image_encoder, encode_images.load_view, *common))
print(code_identity(build_caption_encoder, *common))
print(code_identity(build_reconstructor, encode_images.load_view_and_mean, *common))
"""


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    root = tmp_path_factory.mktemp("code")
    shutil.copytree(REPOSITORY / "stages", root / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    return root, identities(root)


def identities(root: Path) -> list[str]:
    """Of the encoders of images and of captions, and of the reconstructor."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", IDENTITIES], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("models/loaders.py", "(AutoencoderKL, ", "(AutoencoderKL or 1, ", (True, False, True)),
        ("models/loaders.py", "return model.eval()", "return model.train()", (True, True, True)),
        ("encoding/batches.py", "[inputs[-1]] *", "[inputs[0]] *", (True, True, True)),
        ("encoding/batches.py", "set_num_threads(1)", "set_num_threads(2)", (True, True, True)),
        ("core/devices.py", "benchmark = True, False", "benchmark = False, True", (True, False, True)),
        ("encoding/pixels.py", "/ 127.5 - 1.0", "/ 128 - 1.0", (True, False, True)),
        ("encoding/pixels.py", "[:, ::-1]", "[::-1]", (True, False, True)),
        ("encoding/text_encoder.py", "(clip_skip or 0) + 1)]", "1)]", (False, True, False)),
        ("encoding/autoencoder.py", "sigma=1.5", "sigma=2.5", (False, False, True)),
        ("encoding/engine.py", "MAX_LOADERS = 16", "MAX_LOADERS = 8", (False, False, False)),
        ("frame/progress.py", "LINE_SECONDS = 10.0", "LINE_SECONDS = 20.0", (False, False, False)),
        ("models/layout.py", "CLIP =", "UNUSED = 1\nCLIP =", (False, False, False)),
    ],
)  # fmt: skip
def test_an_edit_counts_for_the_rows_that_it_computes(copied, file, old, new, expected):
    root, before = copied
    path = root / "stages/lib" / file
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    try:
        assert tuple(one != other for one, other in zip(identities(root), before, strict=True)) == expected
    finally:
        path.write_text(text)
