"""Runs prepare on a case in a small project, and judges how that ended by what is written alone."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
import logging
import os
import signal
import stat
import sys
import time
import traceback
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import pyarrow.parquet as pq
import yaml

from stages import prepare
from stages.lib.data.pictures.decoding import decoded
from stages.lib.frame.errors import printable
from stages.lib.frame.run import run_stage
from tests.bad_inputs.cases import REFUSED, REJECTED, TAKEN, Case, Row

REPOSITORY = Path(__file__).parent.parent.parent

INPUT = "input"
_LONGEST = 6000  # characters of an error
_OURS = ("params.yaml", "dvc.yaml", INPUT, "data", ".work")


class Ended(NamedTuple):
    """How a run of prepare ended.

    Attributes:
        status: that it exits with; None if it was still running at its limit.
        text: what it has written to the terminal.
    """

    status: int | None
    text: str


class Judged(NamedTuple):
    """Outcome, the line that the user sees, and what is wrong with it; "" if nothing is.

    Outcomes: refused, rejected, taken, traceback, hang, silent change.
    """

    outcome: str
    line: str
    problem: str


def make_project(root: Path, case: Case) -> Path:
    """A directory with params.yaml, dvc.yaml and the case's input; gives the path of the source in it."""
    root.mkdir(parents=True, exist_ok=True)
    (root / INPUT).mkdir()
    source = case.make(root / INPUT)
    document = copy.deepcopy(_params())
    shown = str(source.relative_to(root)) if source.is_relative_to(root) else str(source)
    document["prepare"] |= {
        "source": shown,
        "max_rejected_fraction": 0.9,
        "validation_fraction": 0,
        **case.params,
    }
    (root / "params.yaml").write_text(yaml.safe_dump(document, sort_keys=False))
    (root / "dvc.yaml").write_bytes((REPOSITORY / "dvc.yaml").read_bytes())
    return source


@functools.cache
def _params() -> dict[str, dict[str, object]]:
    return yaml.safe_load((REPOSITORY / "params.yaml").read_text())


def tree_of(root: Path) -> dict[str, str]:
    """Path -> kind and hash of everything below a directory; what is no file is not opened."""
    found = {}
    for directory, folders, files in os.walk(os.fsencode(root)):
        for name in (*folders, *files):
            path = os.path.join(directory, name)
            mode = os.lstat(path).st_mode
            content = b""
            if stat.S_ISREG(mode):
                content = Path(os.fsdecode(path)).read_bytes()
            elif stat.S_ISLNK(mode):
                content = os.readlink(path)
            found[repr(path)] = f"{mode:o} {hashlib.sha256(content).hexdigest()}"
    return found


def judge(case: Case, root: Path, ended: Ended, before: Mapping[str, str]) -> Judged:
    """What became of a case in the project at ``root``, whose input was ``before``."""
    line = _line(ended.text)
    if ended.status is None:
        return Judged("hang", line, "still running at its limit")
    if (
        "Traceback (most recent call last)" in ended.text
        or "this is a defect" in ended.text
        or ended.status not in (0, 1)
    ):
        return Judged("traceback", line, f"status {ended.status}: {ended.text[-300:]}")
    if tree_of(root / INPUT) != before:
        return Judged("silent change", line, "the source has changed")
    if strange := {path.name for path in root.iterdir()} - {*_OURS}:
        return Judged("silent change", line, f"something else was written: {sorted(strange)}")
    if ended.status == 1:
        outcome, problem = REFUSED, _refused(case, root, ended.text)
    else:
        outcome, line, problem = _accepted(case, root, line)
    problem = problem or _steering(ended.text)
    if outcome in (REFUSED, REJECTED, TAKEN) and outcome not in case.may:
        problem = f"expected {' or '.join(case.may)}, got {outcome}{f'; {problem}' if problem else ''}"
    return Judged(outcome, line, problem)


def _line(text: str) -> str:
    """The first line of the error, or the last of what was written."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("prepare: ")]
    return (errors or lines or [""])[-1]


def _steering(text: str) -> str:
    """What of a text steers a terminal, but for the line feeds of its own."""
    found = {character for character in text if unicodedata.category(character) == "Cc"} - {*"\n\t"}
    return f"control characters in what is written: {sorted(found)}" if found else ""


def _refused(case: Case, root: Path, text: str) -> str:
    errors = [line for line in text.splitlines() if line.startswith("prepare: ")]
    if len(errors) != 1:
        return f"expected one error, got {len(errors)}"
    if len(text) > _LONGEST:
        return f"an error of {len(text)} characters"
    source = yaml.safe_load((root / "params.yaml").read_text())["prepare"]["source"]
    if "prepare." not in text and printable(str(source)) not in text:
        return "the error names neither the source nor a parameter"
    if case.says and not any(word in text.lower() for word in case.says):
        return f"expected one of the words {', '.join(case.says)} in the error"
    if (root / "data" / "pairs" / "captions.parquet").exists():
        return "captions are written though it was refused"
    return ""


def _accepted(case: Case, root: Path, line: str) -> tuple[str, str, str]:
    rejected = _rejected(root)
    stored = _stored(root)
    outcome = REJECTED if rejected else TAKEN
    shown = "; ".join(f"{row['name']}: {row['reason']}" for row in rejected[:5]) if rejected else line
    needed = {**case.good, **(case.bad if outcome == TAKEN else {})}
    allowed = {**case.good, **case.bad}
    names = {also: name for name, row in allowed.items() for also in (name, *row.also)}
    found = {names.get(sample_id, sample_id) for sample_id in stored}
    if missing := sorted(needed.keys() - found):
        return "silent change", shown, f"not stored: {missing[:5]}"
    if added := sorted(found - allowed.keys()):
        return "silent change", shown, f"stored, and not expected: {added[:5]}"
    for sample_id, (captions, image) in stored.items():
        if problem := _difference(allowed[names[sample_id]], captions, image):
            return "silent change", shown, f"{sample_id}: {problem}"
    return outcome, shown, _reasons(case, rejected)


def _reasons(case: Case, rejected: list[dict[str, str]]) -> str:
    """What is wrong with the list of rejected rows."""
    if not rejected:
        return ""
    if case.odd:
        left = [row["name"] for row in rejected]
        for part in case.odd:
            match = next((name for name in left if part in name), None)
            if match is None:
                return f"expected a rejected row {part!r}, got {[row['name'] for row in rejected][:5]}"
            left.remove(match)
        if left:
            return f"rejected, and not expected: {left[:5]}"
    reasons = " ".join(row["reason"] for row in rejected).lower()
    if case.says and not any(word in reasons for word in case.says):
        return f"expected one of the words {', '.join(case.says)} in the reason"
    if any(not row["reason"].strip() or len(row["reason"]) > 1000 for row in rejected):
        return "a reason that is empty, or longer than 1000 characters"
    return ""


def _rejected(root: Path) -> list[dict[str, str]]:
    text = (root / "data" / "pairs" / "rejected.jsonl").read_text()
    return [json.loads(line) for line in text.split("\n") if line]


def _stored(root: Path) -> dict[str, tuple[list[str], bytes]]:
    """sample_id -> (captions, image file) as they are in data/pairs."""
    pairs = root / "data" / "pairs"
    captions = {
        row["sample_id"]: row["captions"] for row in pq.read_table(pairs / "captions.parquet").to_pylist()
    }
    images = {}
    for shard in sorted((pairs / "images").glob("*.parquet")):
        for row in pq.ParquetFile(shard).read(["sample_id", "image"]).to_pylist():
            images[row["sample_id"]] = row["image"]["bytes"]
    assert captions.keys() == images.keys(), "captions and images are of different rows"
    return {sample_id: (captions[sample_id], images[sample_id]) for sample_id in captions}


def _difference(row: Row, captions: list[str], image: bytes) -> str:
    if row.captions and tuple(captions) != row.captions:
        return f"captions {captions!r}, expected {list(row.captions)!r}"[:300]
    if row.picture is None:
        return ""
    found = np.asarray(decoded(image)).astype(int)
    wanted = np.asarray(row.picture.convert("RGB")).astype(int)
    if found.shape != wanted.shape:
        return f"{found.shape} pixels, expected {wanted.shape}"
    distance = float(abs(found - wanted).mean())
    return (
        f"pixels differ by {distance:.2f}, expected {row.tolerance} at most"
        if distance > row.tolerance
        else ""
    )


def run_forked(case: Case, root: Path, limit: float) -> Judged:
    """Run the stage on a case in a process of its own, a copy of this one, for ``limit`` seconds at most."""
    make_project(root, case)
    before = tree_of(root / INPUT)
    log = root.with_suffix(".log")
    pid = os.fork()
    if pid == 0:
        _run_and_exit(root, log)
    started = time.monotonic()
    status = None
    while status is None and time.monotonic() - started < limit:
        ended, waited = os.waitpid(pid, os.WNOHANG)
        status = os.waitstatus_to_exitcode(waited) if ended else None
        time.sleep(0.003)
    if status is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return judge(case, root, Ended(status, log.read_text(errors="replace")), before)


def _run_and_exit(root: Path, log: Path) -> NoReturn:
    written = os.open(log, os.O_CREAT | os.O_WRONLY)
    os.dup2(written, 1)
    os.dup2(written, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # in place of a test runner's
    logging.getLogger().handlers.clear()
    os.chdir(root)
    os.environ["SD_WORK"] = str(root / ".work")
    # Half of a case is reading YAML, which libyaml does in a tenth of the time.
    yaml.SafeLoader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    status = 1
    try:
        run_stage("prepare", ("prepare",), prepare.main)
        status = 0
    except SystemExit as error:  # with the one error that the user sees
        sys.stderr.write(f"{error.code}\n")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
