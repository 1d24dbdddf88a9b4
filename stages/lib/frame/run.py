"""The frame around every stage: logging, one lock, parameters read once, errors without tracebacks."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from stages.lib.frame.ends import interruptible
from stages.lib.frame.errors import StageError, printable
from stages.lib.frame.full_disk import describe_full_disk
from stages.lib.frame.inputs import break_links, check_apart, check_unmoved, inputs_of, look_at, outputs_of
from stages.lib.frame.inputs import declared as declared_in_dvc
from stages.lib.frame.launch import (
    describe_lost_process,
    disconnect,
    end_failed,
    launch,
    launch_command,
    process_index,
)
from stages.lib.frame.locks import LOCKS, exclusive
from stages.lib.frame.params import Params, read_params
from stages.lib.frame.start_up import keep_freed_memory
from stages.lib.frame.work_directory import (
    check_work_directory,
    format_bytes,
    max_work_bytes,
    trim,
    work_root,
)

PROJECT = "stages"
TRACEBACK = "SD_TRACEBACK"

logger = logging.getLogger(__name__)


def run_stage(
    name: str, declared: tuple[str, ...], main: Callable[[Params], None], distributed: bool = False
) -> None:
    """Run a stage's ``main`` with validated parameters; exit 1 with one clear error if it fails.

    DVC hashes params.yaml, the code and the inputs when a stage *ends*. What moved while the stage ran
    would be recorded as what produced its outputs, so the stage fails instead.

    Args:
        name: of the stage, as in dvc.yaml; one process at a time runs it in this checkout.
        declared: what of params.yaml dvc.yaml lists for the stage, a section or ``section.key`` each.
        main: the stage.
        distributed: several processes can share the work; ``SD_LAUNCH`` then starts them.
    """

    def run() -> None:
        max_work_bytes()
        check_work_directory()
        command = launch_command() if distributed else None
        with _turn(name):
            if command is None:
                _run_main(name, declared, main)
        if command is not None:  # its first process takes the turn
            launch(command)

    keep_freed_memory()
    run_command(name, run)


def run_command(name: str, main: Callable[[], None]) -> None:
    """Run what is behind a command line; one clear error without a traceback and status 1 if it fails."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    for library in ("httpx", "httpx2", "huggingface_hub", "accelerate"):
        logging.getLogger(library).setLevel(logging.WARNING)
    try:
        with interruptible(name):
            main()
    except Exception as error:
        if os.environ.get(TRACEBACK, "").strip() not in ("", "0"):
            raise
        process = f", process {process_index()}" if process_index() else ""
        end_failed(f"\n{name}{process}: {printable(_described(name, error))}")
    disconnect()


class _Printable(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _described(name: str, error: Exception) -> str:
    """What to tell the user of an error: what is behind it, if that is known, else where its story lies."""
    found = describe_full_disk(error) or (str(error) if isinstance(error, StageError) else None)
    found = found or describe_lost_process(error)
    if found is not None:
        return found
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return (
            f"{os.fsdecode(error.filename)}: {error.strerror}; mend that, and run again: what is done is kept"
        )
    if isinstance(error, MemoryError):
        return "out of memory; close other programs, or run on a machine with more: what is finished is kept"
    first_line = str(error).strip().split("\n")[0]
    return (
        f"unexpected {type(error).__name__}: {first_line}; this is a defect, please report it with "
        f"{_keep_traceback(name, error)}"
    )


def _keep_traceback(name: str, error: Exception) -> str:
    path = work_root() / "errors" / f"{name}.txt"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            "".join(traceback.format_exception(error)), encoding="utf-8", errors="backslashreplace"
        )
    except OSError:
        return f"what it prints with {TRACEBACK}=1"
    return str(path)


def _hashed_code() -> dict[str, str]:
    """Path -> hash of every loaded module of this project that stages depend on."""
    found = {}
    for name, module in [*sys.modules.items()]:
        if (name != "__main__" and name.split(".")[0] != PROJECT) or f"{name}.".startswith(f"{__package__}."):
            continue
        if file := getattr(module, "__file__", None):
            found[file] = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    return found


def _turn(name: str) -> contextlib.AbstractContextManager[None]:
    """The stage's turn in this checkout; the first of several processes waits for all."""
    if process_index() > 0:
        return contextlib.nullcontext()
    return exclusive(LOCKS / name, f"stage {name}")


def _run_main(name: str, declared: tuple[str, ...], main: Callable[[Params], None]) -> None:
    started = time.time_ns()
    try:
        params = read_params()
        code = _hashed_code()
        is_first = process_index() == 0
        entry = declared_in_dvc(name) if is_first else {}
        if is_first:
            check_apart(name, params, work_root())
        inputs = inputs_of(entry, params)
        seen = look_at(inputs)
        break_links(outputs_of(entry))
        main(params.only(declared))
        _check_unmoved(name, declared, params, code)
        check_unmoved(seen, inputs, name)
    finally:
        if process_index() == 0:
            _trim(started)


def _trim(started: int) -> None:
    root, bound = work_root(), max_work_bytes()
    try:
        held = trim(root, used_since=started)
    except OSError as error:  # such as a full disk, which has failed the stage already
        logger.warning("%s could not be trimmed: %s", root, error)
        return
    if bound is not None and held > bound:
        sizes = format_bytes(held), format_bytes(bound)
        logger.warning(
            "%s: what is in use needs %s, SD_WORK_MAX_BYTES is %s: nothing of it was dropped", root, *sizes
        )


def _check_unmoved(name: str, declared: tuple[str, ...], params: Params, code: dict[str, str]) -> None:
    now = read_params()
    for place in declared:
        if _value(params, place) != _value(now, place):
            raise StageError(
                f"params.yaml: {place} changed while the stage ran, so its output would be "
                f"recorded under values it was not made with; run `dvc repro {name}` again"
            )
    for file, digest in code.items():
        if hashlib.sha256(Path(file).read_bytes()).hexdigest() != digest:
            raise StageError(f"{file}: changed while the stage ran; run `dvc repro {name}` again")


def _value(params: Params, place: str) -> object:
    """Of a section, or of ``section.key``."""
    return functools.reduce(getattr, place.split("."), params)
