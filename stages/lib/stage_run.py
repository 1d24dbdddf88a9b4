"""The frame around every stage: logging, one lock, parameters read once, errors without tracebacks."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import gc
import hashlib
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from stages.lib.errors import StageError
from stages.lib.full_disk import describe_full_disk
from stages.lib.launch import launch, launch_command, process_index
from stages.lib.params import Params, read_params
from stages.lib.work_directory import exclusive, format_bytes, max_work_bytes, trim, work_root

logger = logging.getLogger(__name__)


def run_stage(
    name: str, sections: tuple[str, ...], main: Callable[[Params], None], distributed: bool = False
) -> None:
    """Run a stage's ``main`` with validated parameters; exit 1 with one clear error if it fails.

    DVC hashes params.yaml and the code when a stage *ends*. What moved while the stage ran would
    be recorded as what produced its outputs, so the stage fails instead.

    Args:
        name: of the stage, as in dvc.yaml; one process at a time runs it on this work directory.
        sections: of params.yaml that the stage depends on.
        main: the stage.
        distributed: several processes can share the work; ``SD_LAUNCH`` then starts them.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for library in ("httpx", "httpx2", "huggingface_hub", "accelerate"):
        logging.getLogger(library).setLevel(logging.WARNING)
    keep_freed_memory()
    atexit.register(gc.freeze)  # or the end would look for cycles among all that libraries made: a second
    try:
        max_work_bytes()
        command = launch_command() if distributed else None
        with _turn(name):
            if command is None:
                _run_main(name, sections, main)
        if command is not None:  # its first process takes the turn
            launch(command)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = describe_full_disk(error) or (str(error) if isinstance(error, StageError) else None)
        if message is None:
            raise
        process = f", process {process_index()}" if process_index() else ""
        sys.exit(f"\n{name}{process}: {message}")


def keep_freed_memory() -> None:
    """Stop glibc from returning every activation to the kernel, which is slow on the CPU."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
            libc.mallopt(-8, 1)  # M_ARENA_MAX: a thread's own arena holds no block above 64 MiB


def leave_out(*libraries: str) -> None:
    """Make libraries that are not imported yet look as if they were not installed.

    diffusers and transformers import whatever optional library they find, which takes seconds at
    each start. For the processes of one stage only: what is left out stays so until they end.
    """
    for name in libraries:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # importing it raises ImportError


@contextlib.contextmanager
def left_out(*libraries: str) -> Iterator[None]:
    """As `leave_out`, until the end of the block."""
    absent = [name for name in libraries if name not in sys.modules]
    leave_out(*absent)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


def fresh_directory(path: Path) -> Path:
    """Empty ``path`` for a stage's output; nothing of an earlier or killed run stays in it."""
    if path.is_dir():
        shutil.rmtree(path)
    path.mkdir(parents=True)
    return path


def write_json(path: Path, values: dict) -> None:
    """Write a metrics file: sorted keys, one value a line, the same bytes for the same values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """A metrics file that `write_json` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))


def code_fingerprint() -> str:
    """Hash of the source of every loaded module of this project, whatever the checkout's path."""
    return hashlib.sha256(repr(sorted(_loaded_code().values())).encode()).hexdigest()


def _loaded_code() -> dict[str, str]:
    """Path -> hash of every module of this project that is loaded."""
    modules = [*sys.modules.items()]
    files = [
        getattr(module, "__file__", None)
        for name, module in modules
        if name == "__main__" or name.split(".")[0] == "stages"
    ]
    return {file: hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files if file}


def _turn(name: str) -> contextlib.AbstractContextManager[None]:
    """The stage's turn on this work directory; the first of several processes waits for all."""
    if process_index() > 0:
        return contextlib.nullcontext()
    return exclusive(work_root() / "locks" / Path.cwd().name / name, f"stage {name}")


def _run_main(name: str, sections: tuple[str, ...], main: Callable[[Params], None]) -> None:
    started = time.time_ns()
    try:
        params = read_params()
        code = _loaded_code()
        main(params)
        _check_unmoved(name, sections, params, code)
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


def _check_unmoved(name: str, sections: tuple[str, ...], params: Params, code: dict[str, str]) -> None:
    now = read_params()
    for section in sections:
        if dataclasses.asdict(getattr(params, section)) != dataclasses.asdict(getattr(now, section)):
            raise StageError(
                f"params.yaml: section {section} changed while the stage ran, so its output would be "
                f"recorded under values it was not made with; run `dvc repro {name}` again"
            )
    for file, digest in code.items():
        if hashlib.sha256(Path(file).read_bytes()).hexdigest() != digest:
            raise StageError(f"{file}: changed while the stage ran; run `dvc repro {name}` again")
