"""Damaged files of every kind that is read, made by chance and counted: what each reader does with them.

    python benchmarks/fuzz.py [--seconds 30] [--only WORD] [--seed 0]

Each reader gets a whole file with up to eight changes: bits flipped, bytes set, parts cut out, doubled or
zeroed, the end cut off. It may give back what the whole file holds, or raise the one error that it documents.
A reader of what this project has written may give nothing else (``silent``); one of a user's own files, which
carry no hash, may give anything. Whatever else is raised counts as ``uncaught``.

Writes benchmarks/results/fuzz.json with the counts. Exit status 1 if anything is silent or uncaught.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import shutil
import sys
import tarfile
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from fsspec.implementations.dirfs import DirFileSystem

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from stages.lib.core.sums import check_sums, read_sealed_json, write_sealed_json, write_sums  # noqa: E402
from stages.lib.core.tensors import read_checked, tensor_names, write_checked  # noqa: E402
from stages.lib.core.trees import read_tree, write_tree  # noqa: E402
from stages.lib.data.image_shards import StoredImage, image_index, iter_images, write_images  # noqa: E402
from stages.lib.data.pairs import SampleCaptions, read_captions, write_captions  # noqa: E402
from stages.lib.data.pictures.formats import UnusableImageError  # noqa: E402
from stages.lib.data.pictures.storing import stored_image  # noqa: E402
from stages.lib.data.sources.opening import Reading, open_source  # noqa: E402
from stages.lib.frame.errors import StageError  # noqa: E402
from stages.lib.frame.params import read_params  # noqa: E402
from stages.lib.models.checks import config_problems  # noqa: E402
from stages.lib.page.render import render_page  # noqa: E402
from stages.lib.page.run_outputs import read_run  # noqa: E402
from stages.lib.store.blocks import Block  # noqa: E402
from stages.lib.store.zarr_store import (  # noqa: E402
    ArraySpec,
    create_store,
    finish_store,
    open_store,
    read_array,
    write_rows,
)  # fmt: skip
from tests.checkpoints import tiny_pipeline  # noqa: E402
from tests.conftest import draw_image, png  # noqa: E402
from tests.evaluations import write_run  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "fuzz.json"


class Reader(NamedTuple):
    """A reader and a whole file for it.

    Attributes:
        file: that is damaged.
        read: gives what it holds, comparable.
        errors: what it may raise.
        has_hash: whether what it gives has to be what the whole file holds.
    """

    name: str
    file: Path
    read: Callable[[], Any]
    errors: tuple[type[Exception], ...]
    has_hash: bool


def damaged(content: bytes, draw: random.Random) -> bytes:
    """``content`` with up to eight changes, never itself."""
    while True:
        found = bytearray(content)
        for _ in range(draw.choice((1, 1, 1, 2, 4, 8))):
            if not found:
                break
            at, length = draw.randrange(len(found)), draw.choice((1, 2, 4, 16, 256))
            match draw.randrange(8):
                case 0 | 1 | 2:
                    found[at] ^= 1 << draw.randrange(8)
                case 3:
                    found[at] = draw.choice((0, 1, 0x7F, 0x80, 0xFF, draw.randrange(256)))
                case 4:
                    del found[at : at + length]
                case 5:
                    found[at:at] = found[at : at + length]
                case 6:
                    found[at : at + length] = bytes(len(found[at : at + length]))
                case 7:
                    del found[draw.choice((at, len(found) - 1)) :]
        if bytes(found) != content:
            return bytes(found)


def plain(value: Any) -> Any:
    """Comparable with ==."""
    if isinstance(value, torch.Tensor):
        return (
            str(value.dtype),
            tuple(value.shape),
            value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, np.ndarray):
        return (str(value.dtype), value.shape, value.tobytes())
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def archive(kind: str) -> bytes:
    """A small data set as an archive."""
    files = {f"set/{name}.{end}": content for name in "ab" for end, content in
             (("png", png(draw_image(3, (12, 9)))), ("txt", b"a caption"))}  # fmt: skip
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
            for name, content in files.items():
                bundle.writestr(name, content)
            bundle.writestr(zipfile.ZipInfo("set/c.txt"), b"x" * 90, zipfile.ZIP_LZMA)
            bundle.writestr(zipfile.ZipInfo("set/d.txt"), b"y" * 90, zipfile.ZIP_BZIP2)
    else:
        with tarfile.open(
            fileobj=buffer, mode="w:gz" if kind == "tar.gz" else "w", format=tarfile.PAX_FORMAT
        ) as tar:
            for name, content in files.items():
                member = tarfile.TarInfo(name.replace("set", "sét"))
                member.size, member.mtime = len(content), 1.5
                tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def of_a_user(root: Path) -> list[Reader]:
    """Readers of what comes from outside."""

    def image(name: str, **options: Any) -> Reader:
        buffer = io.BytesIO()
        picture = draw_image(1, (23, 17))
        (picture if name != "gif" else picture.quantize(16)).save(buffer, name, **options)
        file = root / f"image.{name}"
        file.write_bytes(buffer.getvalue())
        return Reader(
            f"image, {name}",
            file,
            lambda: stored_image(file.read_bytes(), 10**8),
            (UnusableImageError,),
            False,
        )

    def source(name: str, content: bytes, whole: Path | None = None) -> Reader:
        folder = root / name.replace(" ", "_").replace(".", "_")
        folder.mkdir()
        file = folder / name.split(" ")[-1]
        file.write_bytes(content)
        if whole is None:
            (folder / "a.png").write_bytes(png(draw_image(1, (9, 9))))

        def read() -> Any:
            with open_source(whole or folder, Reading("text", 16)) as found:
                return found.rows, found.rejected

        return Reader(name, file, read, (StageError,), False)

    table = pa.table({"file_name": ["a.png"], "text": ["a"], "when": pa.array([2**50], pa.timestamp("ms"))})
    parquet = io.BytesIO()
    pq.write_table(table, parquet)
    readers = [image("png"), image("jpeg"), image("webp"), image("gif"), image("tiff"), image("bmp"),
               image("tga"), image("ppm"), image("jpeg2000")]  # fmt: skip
    readers += [
        source("table metadata.csv", b'file_name,text\na.png,one\na.png,"two, 2"\n'),
        source("table metadata.jsonl", b'{"file_name": "a.png", "text": ["x", "y"]}\n' * 2),
        source("table metadata.parquet", parquet.getvalue()),
        source("sidecar a.txt", "one captión".encode()),
    ]
    for kind in ("tar", "tar.gz", "zip"):
        file = root / f"set.{kind}"
        readers.append(
            source(
                f"archive set.{kind}",
                archive(kind),
                root / f"archive_set_{kind.replace('.', '_')}" / file.name,
            )
        )
    base = tiny_pipeline(root / "base")
    params = root / "params.yaml"
    shutil.copyfile(ROOT / "params.yaml", params)
    weights = base / "vae" / "diffusion_pytorch_model.safetensors"
    small = root / "weights.safetensors"
    write_checked(small, {"a": torch.ones(3), "b": torch.ones(2, 2)}, {})
    readers += [
        Reader("params.yaml", params, lambda: read_params(params), (StageError,), False),
        Reader("weights of a base", small, lambda: tensor_names(small), (StageError,), False),
    ]
    for config in (
        "unet/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/vocab.json",
    ):
        readers.append(
            Reader(f"config {config}", base / config, lambda: config_problems(base), (StageError,), False)
        )
    assert weights.exists()
    return readers


def of_a_stage(root: Path) -> list[Reader]:
    """Readers of what a stage has written, in data and in the work directory."""
    images = root / "images"
    images.mkdir()
    entries = write_images(images, ["a.png", "b.png", "c.png"], lambda names: (
        StoredImage(name.encode() * 40, 3, 2) for name in names))  # fmt: skip
    shard = next(images.glob("*.parquet"))
    captions = root / "captions.parquet"
    write_captions(
        captions, [SampleCaptions(f"{n}.png", (f"c{n}", "d"), "train") for n in range(9)], "f" * 64
    )
    store = root / "store.zarr"
    group = create_store(
        store, {"mean": ArraySpec((5, 2), np.float16, ("row", "x"))}, {"scaling_factor": 0.2}
    )
    write_rows(group, ({"mean": np.full(2, row, np.float16)} for row in range(5)))
    finish_store(store, group)
    chunk = next(path for path in (store / "mean" / "c").rglob("*") if path.is_file())
    tree = root / "step-00000001.safetensors"
    groups = [{"betas": (0.9, 0.99), "lr": 1e-4, "none": None}]
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "groups": groups}
    write_tree(tree, {"weights": [torch.arange(6.0)], "optimizer": optimizer, "points": [(1, {"loss": 0.5})]})
    tensors = root / "measurements.safetensors"
    write_checked(tensors, {"a": torch.arange(7), "b": torch.ones(2, 3).half()}, {"captions": '["x"]'})
    block = make_block(root)
    sealed = root / "report.json"
    write_sealed_json(sealed, {"metrics": [{"value": 0.5}], "prompts": ["a"]})
    component = root / "vae"
    component.mkdir()
    (component / "config.json").write_text('{"scaling_factor": 0.18215}')
    (component / "model.safetensors").write_bytes(bytes(range(200)))
    write_sums(component)

    def store_content() -> Any:
        opened = open_store(store, "encode_images")
        return read_array(store, opened, "mean", "encode_images"), opened.attrs["scaling_factor"]

    def block_rows() -> Any:
        with Block(block) as opened:
            return {key: opened.row(key) for key in opened.keys}

    def shard_content() -> Any:
        return image_index(images), list(iter_images(images))

    def component_content() -> Any:
        check_sums(component, "fetch_base")
        return (component / "config.json").read_text(), (component / "model.safetensors").read_bytes()

    assert entries
    found = [
        Reader("image shard", shard, shard_content, (StageError,), True),
        Reader("image index", images / "__index.json", shard_content, (StageError,), True),
        Reader("captions", captions, lambda: read_captions(captions), (StageError,), True),
        Reader("store, chunk", chunk, store_content, (StageError,), True),
        Reader("store, attributes", store / "zarr.json", store_content, (StageError,), True),
        Reader("store, array", store / "mean" / "zarr.json", store_content, (StageError,), True),
        Reader("checkpoint", tree, lambda: read_tree(tree), (ValueError,), True),
        Reader("measurements", tensors, lambda: read_checked(tensors), (ValueError,), True),
        Reader("row of the work store", block, block_rows, (ValueError,), True),
        Reader("sealed JSON", sealed, lambda: read_sealed_json(sealed, "report"), (StageError,), True),
        Reader("component, config", component / "config.json", component_content, (StageError,), True),
        Reader("component, weights", component / "model.safetensors", component_content, (StageError,), True),
        Reader("component, hashes", component / "SHA256SUMS", component_content, (StageError,), True),
    ]
    return found + of_the_gallery(root / "run")


def of_the_gallery(root: Path) -> list[Reader]:
    """The page from a run of which one file is damaged."""
    root.mkdir()
    write_run(root, prompts=("red heart",), seeds=(0,))
    files = DirFileSystem(root.as_posix(), target_protocol="file")

    def page() -> str:
        return render_page([read_run(files, "this run")])

    places = (
        "evaluation/report.json", "training/plots/metrics/lr.tsv", "training/plots/SHA256SUMS",
        "training/plots/run.json", "pairs/rejected.jsonl", "pairs/rejected.jsonl.sha256",
        "encode_images_report/left_out.jsonl", "evaluation/sweep.png",
        "unet/diffusion_pytorch_model.safetensors", "unet/SHA256SUMS",
    )  # fmt: skip
    found = [
        Reader(f"gallery, {place}", root / "data" / place, page, (StageError,), True) for place in places
    ]
    return [*found, Reader("gallery, params.yaml", root / "params.yaml", page, (StageError,), False)]


def make_block(root: Path) -> Path:
    """A block of the work store with two rows."""
    from stages.lib.store.work_store import WorkStore

    store = WorkStore(root / "work", "encode", {"recipe": "x"})
    store.put(["k1", "k2"], [{"mean": np.full(4, value, np.float16)} for value in (1, 2)])
    return next(store.directory.glob("*.safetensors"))


def fuzz(reader: Reader, seconds: float, seed: int) -> dict[str, Any]:
    """Damage a reader's file again and again; what became of it."""
    whole, draw = reader.file.read_bytes(), random.Random(f"{reader.name} {seed}")
    expected = plain(reader.read())
    counts = {"inputs": 0, "refused": 0, "same": 0, "other": 0, "silent": 0, "uncaught": 0}
    examples: list[str] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        content = damaged(whole, draw)
        reader.file.write_bytes(content)
        counts["inputs"] += 1
        try:
            found = plain(reader.read())
        except reader.errors:
            counts["refused"] += 1
            continue
        except Exception as error:
            counts["uncaught"] += 1
            examples.append(f"{type(error).__name__}: {error}"[:200])
            continue
        kind = "same" if found == expected else "silent" if reader.has_hash else "other"
        counts[kind] += 1
        if kind == "silent":
            examples.append(f"silent: {content[:80]!r}")
    reader.file.write_bytes(whole)
    return counts | ({"examples": examples[:5]} if examples else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="for each reader")
    parser.add_argument("--only", default="", help="readers whose name holds this")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    root = Path(tempfile.mkdtemp())
    (root / "outside").mkdir()
    (root / "inside").mkdir()
    results = {}
    for reader in (*of_a_user(root / "outside"), *of_a_stage(root / "inside")):
        if arguments.only in reader.name:
            results[reader.name] = fuzz(reader, arguments.seconds, arguments.seed)
            print(reader.name, results[reader.name], flush=True)
    total = {key: sum(row[key] for row in results.values()) for key in ("inputs", "silent", "uncaught")}
    print(total)
    if not arguments.only:
        summary = {
            "seconds_each": arguments.seconds,
            "seed": arguments.seed,
            "total": total,
            "readers": results,
        }
        RESULT.write_text(json.dumps(summary, indent=1) + "\n")
    shutil.rmtree(root)
    sys.exit(bool(total["silent"] or total["uncaught"]))


if __name__ == "__main__":
    main()
