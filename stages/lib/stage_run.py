"""The frame around every stage: logging, one lock, parameters read once, errors without tracebacks."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from stages.lib.errors import StageError
from stages.lib.params import Params, read_params

logger = logging.getLogger(__name__)


def run_stage(name: str, sections: tuple[str, ...], main: Callable[[Params], None]) -> None:
    """Run a stage's ``main`` with validated parameters; exit 1 with one clear error if it fails.

    DVC hashes params.yaml and the code when a stage *ends*. What moved while the stage ran would
    be recorded as what produced its outputs, so the stage fails instead.

    Args:
        name: of the stage, as in dvc.yaml; one process at a time runs it on this work directory.
        sections: of params.yaml that the stage depends on.
        main: the stage.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for library in ("httpx", "httpx2", "huggingface_hub", "accelerate"):
        logging.getLogger(library).setLevel(logging.WARNING)
    keep_freed_memory()
    try:
        with exclusive(work_root() / "locks" / Path.cwd().name / name, f"stage {name}"):
            params = read_params()
            code = _loaded_code()
            main(params)
            _check_unmoved(name, sections, params, code)
    except StageError as error:
        sys.exit(f"\n{name}: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def keep_freed_memory() -> None:
    """Stop glibc from returning every activation to the kernel, which is slow on the CPU."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(-3, 2**30)  # M_MMAP_THRESHOLD
            libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def work_root() -> Path:
    """The directory of caches and checkpoints: ``SD_WORK``, or ``.work`` of the main checkout.

    `dvc exp run --temp` and queued runs work in ``.dvc/tmp/exps/<name>``; they share the main
    checkout's directory, so that what is encoded once is encoded once.
    """
    if configured := os.environ.get("SD_WORK"):
        return Path(configured).resolve()
    here = Path.cwd().resolve()
    for parent in here.parents:
        if parent.parts[-3:] == (".dvc", "tmp", "exps"):
            return parent.parents[2] / ".work"
    return here / ".work"


@contextlib.contextmanager
def exclusive(path: Path, what: str) -> Iterator[None]:
    """Hold an advisory lock on ``path``; wait, naming the holder, while another process has it.

    Killing dvc leaves its stage running: the next run must not write beside it. The kernel
    drops the lock when its holder dies, however it dies.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if os.environ.get("RANK", "0") != "0":  # the first process of `accelerate launch` holds it for all
        yield
        return
    with open(path, "a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            logger.warning(
                "waiting: %s is being run by process %s (lock %s)", what, handle.read() or "?", path
            )
            fcntl.flock(handle, fcntl.LOCK_EX)
        handle.seek(0)
        handle.truncate()
        handle.write(str(os.getpid()))
        handle.flush()
        yield


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
