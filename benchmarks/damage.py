"""What damaged files lead to: every kind of file, every kind of damage, through DVC and by hand.

    python benchmarks/damage.py [--only WORD] [--work DIRECTORY] [--processes 2]

A small project is made twice, the second time with another picture, caption, base and learning rate. In a
copy of the second one file is damaged, keeping its time where it stays, so that DVC does not see it. Then the
stage that reads it runs: by hand, `python -m stages.X`, and through DVC, `dvc repro -f -s X`, followed by the
command that the error names and by a plain `dvc repro`. Each cell ends as one of

    error      one clear error that names the file or its directory, and a command that brings the bytes back
    rebuilt    no error; made again, or from what was kept, to the bytes of the undisturbed run
    equal      no error, and the bytes of the undisturbed run: nothing that is read had changed
    TRACEBACK, SILENT (other bytes without an error), UNCLEAR (an error that names neither file nor command)

Writes benchmarks/results/damage.json. Any of the last three makes the exit status 1.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import small_project as small

RESULT = small.ROOT / "benchmarks" / "results" / "damage.json"
WAYS = ("by hand", "through dvc")
BAD = ("TRACEBACK", "SILENT", "UNCLEAR")


class Kind(NamedTuple):
    """A kind of file: a pattern below the project, of which the largest match is damaged; who reads it."""

    name: str
    pattern: str
    reader: str


KINDS = (
    Kind("tokenizer vocabulary", "data/base/tokenizer/vocab.json", "tokenize"),
    Kind("tokenizer config", "data/base/tokenizer/tokenizer_config.json", "tokenize"),
    Kind("text encoder weights", "data/base/text_encoder/*.safetensors", "encode_captions"),
    Kind("text encoder config", "data/base/text_encoder/config.json", "encode_captions"),
    Kind("VAE weights", "data/base/vae/*.safetensors", "encode_images"),
    Kind("VAE config", "data/base/vae/config.json", "encode_images"),
    Kind("UNet weights", "data/base/unet/*.safetensors", "train"),
    Kind("UNet config", "data/base/unet/config.json", "train"),
    Kind("scheduler config", "data/base/scheduler/scheduler_config.json", "train"),
    Kind("CLIP weights", "data/base/clip/*.safetensors", "baseline"),
    Kind("CLIP tokenizer", "data/base/clip/tokenizer.json", "baseline"),
    Kind("pipeline index", "data/base/model_index.json", "baseline"),
    Kind("hashes of a component", "data/base/vae/SHA256SUMS", "encode_images"),
    Kind("image shard", "data/pairs/images/*.parquet", "encode_images"),
    Kind("image index", "data/pairs/images/__index.json", "encode_images"),
    Kind("captions", "data/pairs/captions.parquet", "train"),
    Kind("rejected rows", "data/pairs/rejected.jsonl", "gallery"),
    Kind("token chunk", "data/tokens.zarr/input_ids/c/*/*", "encode_captions"),
    Kind("token attributes", "data/tokens.zarr/zarr.json", "encode_captions"),
    Kind("caption states", "data/captions.zarr/encoder_hidden_states/c/*/*/*", "train"),
    Kind("latent chunk", "data/latents.zarr/mean/c/*/*/*/*/*", "train"),
    Kind("latent attributes", "data/latents.zarr/zarr.json", "train"),
    Kind("row of the work store", ".work/encode_images/*/*.safetensors", "encode_images"),
    Kind("recipe of the work store", ".work/encode_images/*/recipe.json", "encode_images"),
    Kind("checkpoint", ".work/train/*/step-00000006.safetensors", "train"),
    Kind("best weights", ".work/train/*/best-*.safetensors", "train"),
    Kind("trained weights", "data/unet/*.safetensors", "evaluate"),
    Kind("trained config", "data/unet/scheduler_config.json", "evaluate"),
    Kind("preview", "data/training/previews/step-*.safetensors", "evaluate"),
    Kind("curve", "data/training/plots/metrics/train_loss.tsv", "gallery"),
    Kind("baseline measurements", "data/baseline/measurements.safetensors", "evaluate"),
    Kind("evaluation measurements", "data/evaluation/measurements.safetensors", "report"),
    Kind("picture list", "data/evaluation/pictures.json", "report"),
    Kind("report", "data/evaluation/report.json", "gallery"),
    Kind("sample of the base", "data/baseline/samples/*/*.png", "evaluate"),
    Kind("sample of the UNet", "data/evaluation/samples/*/*.png", "gallery"),
    Kind("grid", "data/evaluation/grids/*.png", "gallery"),
    Kind("encoding report", "data/encode_images_report/worst_reconstructions.png", "gallery"),
)  # fmt: skip


def flip(content: bytes, position: int) -> bytes:
    damaged = bytearray(content)
    damaged[position] ^= 1 << position % 7
    return bytes(damaged)


# Name -> new content from the old one and from that of the earlier run; None deletes the file.
DAMAGES: dict[str, Callable[[bytes, bytes | None], bytes | None]] = {
    "bit in data": lambda content, _: flip(content, len(content) * 2 // 3) if content else b"x",
    "bit in header": lambda content, _: flip(content, min(11, len(content) - 1)) if content else b"x",
    "truncated": lambda content, _: content[: len(content) // 2],
    "emptied": lambda content, _: b"",
    "deleted": lambda content, _: None,
    "older version": lambda content, earlier: earlier if earlier is not None else content[: len(content) - 1],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--only", default="", help="of the kinds those whose name holds this; the result keeps the others"
    )
    parser.add_argument("--work", type=Path, help="an empty directory to work in")
    parser.add_argument("--processes", type=int, default=2, help="cells at a time")
    arguments = parser.parse_args()
    work = arguments.work or Path(tempfile.mkdtemp())
    good, earlier = prepare(work)
    expected = small.outputs(good)
    places = [(kind, damage, way) for kind in KINDS for damage in DAMAGES for way in WAYS]
    places = [place for place in places if arguments.only in place[0].name]

    def run(place: tuple[Kind, str, str]) -> str:
        outcome = cell(*place, work, good, earlier, expected)
        print(f"{place[0].name}, {place[1]}, {place[2]}: {outcome}", flush=True)
        return outcome

    with ThreadPoolExecutor(arguments.processes) as pool:
        outcomes = list(pool.map(run, places))
    cells: dict[str, dict[str, dict[str, str]]] = collections.defaultdict(
        lambda: collections.defaultdict(dict)
    )
    for (kind, damage, way), outcome in zip(places, outcomes, strict=True):
        cells[kind.name][damage][way] = outcome
    table = json.loads(RESULT.read_text())["table"] if arguments.only and RESULT.exists() else {}
    table = {kind.name: (table | cells)[kind.name] for kind in KINDS if kind.name in table | cells}
    counts = collections.Counter(
        outcome.split(":")[0] for row in table.values() for ways in row.values() for outcome in ways.values()
    )
    print(dict(counts))
    result = {"cells": sum(counts.values()), "counts": dict(sorted(counts.items())), "table": table}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(any(counts[outcome] for outcome in BAD))


def prepare(work: Path) -> tuple[Path, dict[str, bytes]]:
    """The project after its second run, and the files that the first one made."""
    root = small.make(work / "good", train={"export": "best", "learning_rate": 1e-3})
    small.must(small.dvc(root, "repro"))
    earlier = {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.glob("data/**/*")
        if path.is_file()
    }
    blocks = [path.read_bytes() for path in sorted(root.glob(".work/encode_images/*/*.safetensors"))]
    steps = {path.name: path.read_bytes() for path in root.glob(".work/train/*/*.safetensors")}
    shutil.rmtree(root / ".work")
    for name, key, value in (
        ("scheduler/scheduler_config.json", "beta_end", 0.013),
        ("vae/config.json", "scaling_factor", 0.19),
        ("tokenizer/tokenizer_config.json", "do_lower_case", True),
    ):
        path = root / "base" / name
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}, indent=2))
    for path in (root / "base").glob("*/*.safetensors"):
        path.write_bytes(flip(path.read_bytes(), path.stat().st_size - 2))
    small.draw(root, (*range(11), 40))
    (root / "images/03.txt").write_text("another caption")
    small.write_params(root, train={"export": "best", "learning_rate": 3e-4})
    small.must(small.dvc(root, "repro"))
    for path in root.glob(".work/encode_images/*/*.safetensors"):
        earlier[path.relative_to(root).as_posix()] = blocks[0]
    for path in root.glob(".work/train/*/*.safetensors"):
        if path.name in steps:
            earlier[path.relative_to(root).as_posix()] = steps[path.name]
    return root, earlier


def cell(
    kind: Kind,
    damage: str,
    way: str,
    work: Path,
    good: Path,
    earlier: dict[str, bytes],
    expected: dict[str, bytes],
) -> str:
    """How one damage of one file ends."""
    root = work / f"cell-{threading.get_ident()}"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(good, root, symlinks=True, copy_function=shutil.copy2)
    if way == "through dvc":
        small.must(small.dvc(root, "status"))  # DVC takes the copies for what it knows
    path = max(root.glob(kind.pattern), key=lambda each: (each.stat().st_size, each.name))
    name = path.relative_to(root).as_posix()
    new = DAMAGES[damage](path.read_bytes(), earlier.get(name))
    if new == path.read_bytes():
        new = flip(new, 0) if new else b"x"
    damage_file(path, new)
    if way == "by hand":
        done = small.run_stage(root, kind.reader)
        return judged(done, name, expected, root)
    done = small.dvc(root, "repro", "-f", "-s", kind.reader)
    outcome = judged(done, name, expected, root)
    if outcome.split(":")[0] in BAD:
        return outcome
    for command in re.findall(r"`dvc (repro[^`]*)`", done.stderr)[:1] if done.returncode else []:
        small.dvc(root, *command.split())
    last = small.dvc(root, "repro")
    if last.returncode or small.outputs(root) != expected:
        return f"UNCLEAR: after the command of the error: {last.stdout[-300:]}{last.stderr[-300:]}"
    return outcome


def damage_file(path: Path, content: bytes | None) -> None:
    """Change a file in place, keeping its time, or remove it."""
    if content is None:
        path.unlink()
        return
    before = path.stat()
    with open(path, "r+b") as file:
        file.write(content)
        file.truncate()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def judged(done, name: str, expected: dict[str, bytes], root: Path) -> str:
    """The outcome of a command."""
    text = done.stdout + done.stderr
    if "Traceback (most recent call last)" in text or ("unexpected " in text and "defect" in text):
        return f"TRACEBACK: {text[-400:]}"
    if done.returncode == 0:
        made = small.outputs(root)
        differing = [each for each in expected if made.get(each) != expected[each] and each != name]
        differing += sorted(made.keys() - expected.keys())
        if differing:
            return f"SILENT: {differing[:4]}"
        warned = re.findall(r"damaged|gone|\b[1-9]\d* \w+ encoded|resuming at step", text)
        return "rebuilt" if warned else "equal"
    lines = [
        line
        for line in done.stderr.splitlines()
        if line.strip() and not line.startswith("ERROR: failed to repro")
    ]
    last = lines[-1] if lines else ""
    directories = [str(parent) for parent in Path(name).parents if len(parent.parts) > 1]
    named = any(place in done.stderr for place in (name, *directories))
    if not named or "run `dvc" not in done.stderr:
        if (
            "missing data" in text or "does not exist" in text
        ):  # DVC's own words for a dependency that is gone
            return "error: DVC names the missing file"
        return f"UNCLEAR: {last[-300:]}"
    return f"error: {last[:160]}"


if __name__ == "__main__":
    main()
