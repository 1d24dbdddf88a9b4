"""The order of rooms: a module imports its own room and those below it; frame changes no byte."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import REPOSITORY

ROOMS = (
    "frame", "core", "store", "models", "data", "drawing",
    "encoding", "diffusion", "training", "inversion", "evaluation", "export", "page", "trial",
)  # fmt: skip
FREE_OF_LIBRARIES = ("torch", "numpy", "PIL", "zarr", "accelerate", "diffusers", "transformers")


class Imported(NamedTuple):
    """One import: the module, where it is written, and whether it is done when the file is imported."""

    module: str
    line: int
    text: str
    is_at_start: bool


def imports_of(path: Path) -> Iterator[Imported]:
    source = path.read_text()
    lines, tree = source.splitlines(), ast.parse(source)
    inside = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.If)
        for child in ast.walk(node)
        if child is not node
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield Imported(name, node.lineno, lines[node.lineno - 1].strip(), id(node) not in inside)


def rank(module: str) -> int:
    """Height of a module of this project: of its room, or above all rooms for a stage."""
    parts = module.split(".")
    return ROOMS.index(parts[2]) if parts[1:2] == ["lib"] and len(parts) > 2 else len(ROOMS)


def broken_rules(root: Path) -> list[str]:
    """A line for each import that goes upward, naming the line and the one that it reaches."""
    found = []
    for path in sorted((root / "stages").rglob("*.py")):
        own = ".".join(path.relative_to(root).with_suffix("").parts)
        for imported in imports_of(path):
            if not imported.module.startswith("stages."):
                continue
            if rank(imported.module) > rank(own) or (
                rank(own) == len(ROOMS) and not _is_lib(imported.module)
            ):
                target = root.joinpath(*imported.module.split(".")[:4]).with_suffix(".py")
                where = path.relative_to(root).as_posix()
                reached = target.relative_to(root).as_posix()
                found.append(
                    f"{where}:{imported.line}: `{imported.text}` goes up, from room "
                    f"{_room(own)} to {_room(imported.module)}: {reached}:{_line_of(target, imported.module)}"
                )
    return found


def _is_lib(module: str) -> bool:
    return module.split(".")[1] == "lib"


def _room(module: str) -> str:
    return ROOMS[rank(module)] if rank(module) < len(ROOMS) else "stages"


def _line_of(path: Path, module: str) -> int:
    name = module.rsplit(".", 1)[-1]
    for node in ast.parse(path.read_text()).body if path.exists() else []:
        if getattr(node, "name", None) == name:
            return node.lineno
    return 1


def test_every_import_stays_in_its_room_or_goes_down():
    assert broken_rules(REPOSITORY) == []


def test_an_import_upward_is_named_with_both_its_lines(tmp_path):
    for room, text in (
        ("core", "from stages.lib.store.rows import read\n"),
        ("store", "X = 1\n\n\ndef read():\n    pass\n"),
    ):
        folder = tmp_path / "stages" / "lib" / room
        folder.mkdir(parents=True)
        (folder / ("draws.py" if room == "core" else "rows.py")).write_text(text)
    (problem,) = broken_rules(tmp_path)
    assert problem == (
        "stages/lib/core/draws.py:1: `from stages.lib.store.rows import read` goes up, from room core "
        "to store: stages/lib/store/rows.py:4"
    )


def test_every_folder_is_a_room_with_a_docstring_and_3_to_12_modules():
    folders = {path.name for path in (REPOSITORY / "stages/lib").iterdir() if path.is_dir()} - {"__pycache__"}
    assert folders == set(ROOMS)
    for room in ROOMS:
        modules = [
            path for path in (REPOSITORY / "stages/lib" / room).glob("*.py") if path.stem != "__init__"
        ]
        assert 3 <= len(modules) <= 12, (room, len(modules))
        document = ast.get_docstring(
            ast.parse((REPOSITORY / "stages/lib" / room / "__init__.py").read_text())
        )
        assert document and "mports" in document, room


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "stages/lib/frame").rglob("*.py")), ids=lambda path: path.stem
)
def test_frame_imports_no_other_room_and_no_library_of_arrays_at_its_start(path):
    for imported in imports_of(path):
        if imported.module.startswith("stages."):
            assert imported.module.startswith("stages.lib.frame."), imported
        if imported.is_at_start:
            assert imported.module.split(".")[0] not in FREE_OF_LIBRARIES, imported


def test_no_function_of_the_stages_has_more_than_60_lines():
    for path in (REPOSITORY / "stages").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, (
                    path,
                    node.name,
                    node.end_lineno - node.lineno + 1,
                )
