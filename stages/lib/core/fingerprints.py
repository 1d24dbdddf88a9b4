"""Hashes of what determines a result: values, the code that computes it, and the environment it runs in.

Identity is what determines a result in exact arithmetic; the environment moves its last bits. `code_identity`
belongs to the first, `environment` to the second.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import platform
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

PROJECT = "stages"
CHANGES_NO_BYTE = f"{PROJECT}.lib.frame"
_ROOT = Path(__file__).parents[3]


def fingerprint(value: object) -> str:
    """Hash of a JSON-serialisable value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def environment(*packages: str) -> dict[str, str]:
    """What of this environment can change a row's bits: package versions, processor, GPU."""
    import torch

    found = {
        **{package: version(package) for package in ("torch", *packages)},
        "machine": platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        found["cuda"] = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def code_identity(*roots: Callable[..., object], without: Iterable[Callable[..., object]] = ()) -> str:
    """Hash of the code that computes what ``roots`` compute, all that they reach by name in this project.

    Of a module only what is reached counts, and what runs when it is imported. It is counted by its syntax
    tree: comments, docstrings, texts of errors, log messages, layout and the names of files do not matter.
    What lies in ``lib/frame`` changes no byte and is left out. Names that are only made up at run time
    (``getattr(module, name)``) are not followed: code that counts is called by its name.

    Args:
        roots: functions and classes.
        without: functions and classes that are reached and change nothing that is asked for.
    """
    left_out = {_symbol_of(each) for each in without}
    found: dict[_Symbol, str] = {}
    waiting = [_symbol_of(root) for root in roots]
    while waiting:
        symbol = waiting.pop()
        if symbol not in found and symbol not in left_out:
            found[symbol] = _own_hash(symbol)
            waiting += _reached(symbol)
    bindings = sorted(
        f"{found[symbol]} {name} {found.get(target, 'left out')}"
        for symbol in found
        for name, target in _bindings(symbol)
    )
    return fingerprint([sorted(found.values()), bindings])


class _Symbol(NamedTuple):
    """A top-level name of a module; "" stands for what the module does when it is imported."""

    module: str
    name: str


class _Module:
    """What a source file defines, imports from this project, and does when it is imported."""

    def __init__(self, tree: ast.Module) -> None:
        self.definitions: dict[str, list[ast.stmt]] = {}
        self.imports: dict[str, _Symbol] = {}
        self.effects: list[ast.stmt] = []
        self._take(tree.body)

    def _take(self, statements: list[ast.stmt]) -> None:
        for statement in statements:
            match statement:
                case ast.Import() | ast.ImportFrom():
                    self.imports |= dict(_imported(statement))
                case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                    self.definitions.setdefault(name, []).append(statement)
                case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                    self._take(statement.body)
                case ast.If(test=ast.Compare(left=ast.Name(id="__name__"))):
                    pass  # the command line of a stage, which is not run by what is imported from it
                case ast.Assign() | ast.AnnAssign():
                    targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                    names = [name for target in targets for name in _stored(target)]
                    for name in names:
                        self.definitions.setdefault(name, []).append(statement)
                    if not names:
                        self.effects.append(statement)
                case _:
                    self.effects.append(statement)

    def statements(self, name: str) -> list[ast.stmt]:
        """What defines ``name``; with "" what is done at import."""
        return self.definitions.get(name, []) if name else self.effects


def _stored(target: ast.expr) -> Iterator[str]:
    """Names that an assignment binds."""
    for node in ast.walk(target):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


@functools.cache
def _module(name: str) -> _Module | None:
    """The module's source, None where it is none of this project's or changes no byte."""
    if not f"{name}.".startswith(f"{PROJECT}.") or f"{name}.".startswith(f"{CHANGES_NO_BYTE}."):
        return None
    path = _ROOT.joinpath(*name.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return _Module(_ComputingCode().visit(ast.parse(path.read_bytes())))


class _ComputingCode(ast.NodeTransformer):
    """Leaves out what people read and nothing computes with: docstrings, texts of errors, log messages."""

    def visit_Module(self, node: ast.Module) -> ast.AST:
        return self._without_docstring(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._without_docstring(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._without_docstring(node)

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.Raise()

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        match node.value:
            case ast.Call(func=ast.Attribute(value=ast.Name(id="logger"))):
                return ast.Pass()
        return self.generic_visit(node)

    def _without_docstring(self, node: Any) -> ast.AST:
        match node.body:
            case [ast.Expr(value=ast.Constant(value=str())), *rest]:
                node.body = rest or [ast.Pass()]
        return self.generic_visit(node)


def _imported(statement: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, _Symbol]]:
    """Local name -> what it stands for; of a module that is imported as such, all of it ("*")."""
    if isinstance(statement, ast.Import):
        for alias in statement.names:
            yield alias.asname or alias.name.split(".")[0], _Symbol(alias.name, "*")
        return
    module = statement.module or ""
    for alias in statement.names:
        inside = _ROOT.joinpath(*module.split("."), alias.name)
        is_module = inside.is_dir() or inside.with_suffix(".py").is_file()
        symbol = _Symbol(f"{module}.{alias.name}", "*") if is_module else _Symbol(module, alias.name)
        yield alias.asname or alias.name, symbol


def _symbol_of(root: Callable[..., object]) -> _Symbol:
    """Where a function or class is defined. One outside of the project counts with its whole file."""
    root = inspect.unwrap(root)  # what a decorator made of it lies elsewhere
    file = Path(inspect.getfile(root))
    if file.is_relative_to(_ROOT) and "<locals>" not in root.__qualname__:
        module = ".".join(file.relative_to(_ROOT).with_suffix("").parts)
        if _module(module) is not None:
            return _Symbol(module, root.__qualname__.split(".")[0])
    return _Symbol(str(file), "")


@functools.cache
def _own_hash(symbol: _Symbol) -> str:
    """Of the symbol's own statements, whatever they reach."""
    module = _module(symbol.module)
    if module is None:
        return hashlib.sha256(Path(symbol.module).read_bytes()).hexdigest()
    dumped = [ast.dump(statement) for statement in module.statements(symbol.name)]
    return hashlib.sha256(repr([symbol.name, dumped]).encode()).hexdigest()


@functools.cache
def _bindings(symbol: _Symbol) -> list[tuple[str, _Symbol]]:
    """Names in the symbol's statements, and what they stand for in this project."""
    module = _module(symbol.module)
    if module is None:
        return []
    bound = {**{name: _Symbol(symbol.module, name) for name in module.definitions}, **module.imports}
    nodes = [node for statement in module.statements(symbol.name) for node in ast.walk(statement)]
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):  # imported within a function
            bound |= dict(_imported(node))
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    used |= {name for node in nodes if isinstance(node, ast.ImportFrom) for name, _ in _imported(node)}
    found = [(name, bound[name]) for name in sorted(used & bound.keys())]
    return [(name, target) for name, target in found if _module(target.module) and target != symbol]


def _reached(symbol: _Symbol) -> Iterator[_Symbol]:
    module = _module(symbol.module)
    if module is None:
        return
    yield _Symbol(symbol.module, "")
    if symbol.name == "*":
        yield from (_Symbol(symbol.module, name) for name in module.definitions)
    yield from (target for _, target in _bindings(symbol))
    if symbol.name not in module.definitions and symbol.name in module.imports:  # from elsewhere
        yield module.imports[symbol.name]
