"""The prepare stage from a source to data/pairs."""

from __future__ import annotations

import csv
import io
import json
import logging
import shutil
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from stages import prepare
from stages.lib.core import paths
from stages.lib.data.image_shards import image_index, iter_images
from stages.lib.data.pairs import read_captions
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import Params, read_params
from tests.conftest import REPOSITORY, changed


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SD_WORK", raising=False)
    return tmp_path


def params_for(source: str, **values: Any) -> Params:
    params = read_params(REPOSITORY / "params.yaml")
    return changed(params, prepare=changed(params.prepare, source=source, **values))


def make_image(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), np.uint8)
    Image.fromarray(noise).save(path)


def image_set(num_images: int, captions: dict[str, str] | None = None, start: int = 0) -> str:
    """A folder `set` of noise images with metadata.csv."""
    folder = Path("set")
    rows = {f"{number:03d}.png": f"number {number}" for number in range(start, num_images)}
    for name in rows:
        make_image(folder / name, int(name[:3]))
    with open(folder / "metadata.csv", "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["file_name", "text"])
        writer.writerows((rows | (captions or {})).items())
    return "set"


def outputs() -> dict[str, bytes]:
    files = [path for path in Path("data").rglob("*") if path.is_file()]
    return {path.relative_to("data").as_posix(): path.read_bytes() for path in sorted(files)}


def images(files: dict[str, bytes]) -> dict[str, bytes]:
    return {
        name: content for name, content in files.items() if name.endswith(".parquet") and "/images/" in name
    }


def metrics() -> dict[str, int]:
    return json.loads(paths.PREPARE_METRICS.read_text())


def rejected() -> list[dict[str, str]]:
    return [json.loads(line) for line in paths.REJECTED_PAIRS.read_text().splitlines()]


def test_a_folder_becomes_pairs() -> None:
    source = image_set(100)
    (Path(source) / "spare.png").write_bytes(b"")
    prepare.main(params_for(source))
    samples = read_captions(paths.PAIR_CAPTIONS)
    names = [f"{number:03d}.png" for number in range(100)]
    assert [sample.sample_id for sample in samples] == names
    assert [entry.sample_id for entry in image_index(paths.PAIR_IMAGES)] == names
    assert samples[7].captions == ("number 7",)
    assert all(image == (Path(source) / name).read_bytes() for name, image in iter_images(paths.PAIR_IMAGES))
    held_out = sum(sample.split == "validation" for sample in samples)
    assert 0 < held_out < 30
    assert metrics() == {
        "num_captions": 100,
        "num_converted_to_srgb": 0,
        "num_duplicate_images": 0,
        "num_masks": 0,
        "num_near_duplicate_images": 0,
        "num_rejected": 0,
        "num_samples": 100,
        "num_test_samples_left_out": 0,
        "num_train_samples": 100 - held_out,
        "num_unlisted_files": 1,
        "num_validation_samples": held_out,
    }
    assert rejected() == []


def test_the_same_source_gives_the_same_bytes() -> None:
    source = params_for(image_set(30))
    prepare.main(source)
    first = outputs()
    (paths.PAIR_IMAGES / "left over").write_text("by an earlier run")
    (paths.PAIRS / "mine").write_text("the user's")
    prepare.main(source)
    assert outputs() == first | {"pairs/mine": b"the user's"}


def test_an_archive_gives_the_bytes_of_its_folder(workplace: Path) -> None:
    source = image_set(10)
    prepare.main(params_for(source))
    by_folder = outputs()
    with tarfile.open("set.tar.gz", "w:gz") as archive:
        archive.add(source, "pokemon_dataset")
    prepare.main(params_for("set.tar.gz"))
    assert outputs() == by_folder
    assert not list((workplace / ".work").rglob("*.png"))


def test_an_edited_caption_leaves_the_images() -> None:
    prepare.main(params_for(image_set(80)))
    before = outputs()
    prepare.main(params_for(image_set(80, captions={"003.png": "another"})))
    after = outputs()
    assert images(after) == images(before)
    assert after["pairs/captions.parquet"] != before["pairs/captions.parquet"]


def test_new_images_move_nobody_and_touch_few_shards() -> None:
    prepare.main(params_for(image_set(100)))
    before, splits = outputs(), {row.sample_id: row.split for row in read_captions(paths.PAIR_CAPTIONS)}
    prepare.main(params_for(image_set(101)))
    after = {row.sample_id: row.split for row in read_captions(paths.PAIR_CAPTIONS)}
    assert after.items() >= splits.items()
    assert len(after) == 101
    old, new = images(before), images(outputs())
    assert len(old) == len(new) == 2
    assert sum(old[name] != new[name] for name in old) == 1


def test_rejected_rows_are_listed_and_counted() -> None:
    source = image_set(30, captions={"004.png": " ", "gone.png": "x", "../out.png": "x"})
    data = (Path(source) / "007.png").read_bytes()
    (Path(source) / "007.png").write_bytes(data[: len(data) // 2])
    prepare.main(params_for(source, max_rejected_fraction=0.2))
    assert [(row["name"], row["reason"].split(":")[0]) for row in rejected()] == [
        ("../out.png", "points outside the folder"),
        ("004.png", "empty caption"),
        ("007.png", "broken image"),
        ("gone.png", "no such file"),
    ]
    assert metrics()["num_rejected"] == 4
    assert metrics()["num_samples"] == 28
    assert "007.png" not in [sample.sample_id for sample in read_captions(paths.PAIR_CAPTIONS)]


def test_too_many_rejected_fail_and_stay_readable() -> None:
    gone = {f"gone{number}.png": "x" for number in range(7)}
    source = image_set(14, captions=gone)
    with pytest.raises(StageError) as caught:
        prepare.main(params_for(source, max_rejected_fraction=0.33))
    message = str(caught.value)
    assert "7 of 21 rows cannot be used (33.3%)" in message
    assert "at most 33.0%" in message
    assert "gone0.png: no such file" in message
    assert "gone4.png" in message
    assert "gone5.png" not in message
    assert "and 2 more" in message
    assert "data/pairs/rejected.jsonl" in message
    assert [row["name"] for row in rejected()] == sorted(gone)
    prepare.main(params_for(source, max_rejected_fraction=0.34))
    assert metrics()["num_rejected"] == 7


def test_broken_images_count_towards_the_limit() -> None:
    source = image_set(4)
    (Path(source) / "001.png").write_bytes(b"no image")
    with pytest.raises(StageError, match=r"1 of 4 rows.*\n.*001.png: not an image"):
        prepare.main(params_for(source))
    assert [row["name"] for row in rejected()] == ["001.png"]


@pytest.mark.parametrize("captions", [{}, {"000.png": ""}])
def test_an_empty_result_fails(captions: dict[str, str]) -> None:
    source = image_set(len(captions), captions=captions) if captions else "set"
    if not captions:
        Path("set").mkdir()
        Path("set/metadata.csv").write_text("file_name,text\n")
    with pytest.raises(StageError, match=f"{len(captions)} of {len(captions)} rows cannot be used"):
        prepare.main(params_for(source, max_rejected_fraction=1.0))


def test_several_captions_make_one_sample() -> None:
    source = image_set(12)
    with open("set/metadata.csv", "a") as handle:
        handle.write("000.png,a second\n000.png,number 0\n")
    prepare.main(params_for(source))
    assert read_captions(paths.PAIR_CAPTIONS)[0].captions == ("number 0", "a second")
    assert (metrics()["num_samples"], metrics()["num_captions"]) == (12, 13)


def test_max_samples_takes_the_first_and_judges_them_alone() -> None:
    source = image_set(20, captions={"zzz.png": "gone", "000.png": ""})
    prepare.main(params_for(source, max_samples=9, max_rejected_fraction=0.1))
    assert [row.sample_id for row in read_captions(paths.PAIR_CAPTIONS)] == [
        f"00{n}.png" for n in range(1, 10)
    ]
    assert [row["name"] for row in rejected()] == ["000.png"]


def test_no_training_sample_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "split_of", lambda *_: "validation")
    with pytest.raises(StageError, match="all 3 samples fall to validation"):
        prepare.main(params_for(image_set(3)))


@pytest.mark.parametrize(("fraction", "warns"), [(1e-9, True), (0.0, False), (0.5, False)])
def test_no_validation_sample_warns(fraction: float, warns: bool, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        prepare.main(params_for(image_set(12), validation_fraction=fraction))
    assert ("none of 12 samples falls to validation" in caplog.text) is warns


def test_failure_removes_what_was_extracted(workplace: Path) -> None:
    source = image_set(3, captions={f"gone{number}.png": "x" for number in range(9)})
    shutil.make_archive("set", "zip", source)
    with pytest.raises(StageError, match="9 of 12 rows"):
        prepare.main(params_for("set.zip"))
    assert not list((workplace / ".work").rglob("*.png"))


def test_openmoji_is_rendered_and_captioned() -> None:
    source = str(REPOSITORY / "data" / "openmoji")
    prepare.main(params_for(source, render_resolution=24, max_samples=40))
    _, image = next(iter_images(paths.PAIR_IMAGES))
    with Image.open(io.BytesIO(image)) as opened:
        assert (opened.format, opened.mode, opened.size) == ("PNG", "RGB", (24, 24))
        assert opened.getpixel((0, 0)) == (255, 255, 255)
    assert read_captions(paths.PAIR_CAPTIONS)[0].captions == ("keycap #",)
    assert metrics()["num_samples"] == 40


def test_hugging_face_datasets_decodes_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    source = image_set(70)
    prepare.main(params_for(source))
    files = sorted(map(str, paths.PAIR_IMAGES.glob("*.parquet")))
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir="cache")
    assert isinstance(rows.features["image"], datasets.Image)
    assert len(rows) == 70
    row = rows[0]
    with Image.open(Path(source) / row["sample_id"]) as expected:
        np.testing.assert_array_equal(np.asarray(row["image"]), np.asarray(expected))
