"""prepare with several sources, splits, copies of images, variants of captions, worker processes."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import yaml
from PIL import Image
from skimage import data

from stages import prepare
from stages.lib.core import paths
from stages.lib.data.image_shards import image_index, iter_images
from stages.lib.data.near_duplicates import groups_alike
from stages.lib.data.pairs import SampleCaptions, read_captions
from stages.lib.data.pictures.decoding import decoded
from stages.lib.frame.errors import StageError
from stages.lib.frame.params import Params, read_params
from tests.conftest import REPOSITORY, draw_image, enter
from tests.hub import COMMIT, Hub, serving


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    enter(tmp_path, monkeypatch)
    return tmp_path


def params_for(source: str | None, **values: Any) -> Params:
    document = yaml.safe_load((REPOSITORY / "params.yaml").read_text())
    document["prepare"] |= {"source": source, **values}
    Path("params.yaml").write_text(yaml.safe_dump(document))
    return read_params()


def draw(folder: str, seeds: range, caption: str | None = "a picture") -> None:
    Path(folder).mkdir(parents=True, exist_ok=True)
    for seed in seeds:
        draw_image(seed).save(Path(folder) / f"{seed:03d}.png")
        if caption is not None:
            (Path(folder) / f"{seed:03d}.txt").write_text(f"{caption} {seed}")


def samples() -> dict[str, SampleCaptions]:
    return {sample.sample_id: sample for sample in read_captions(paths.PAIR_CAPTIONS)}


def metrics() -> dict[str, int]:
    return json.loads(paths.PREPARE_METRICS.read_text())


def test_several_sources_with_a_prefix_a_column_and_repeats() -> None:
    draw("mine/dog", range(12), None)
    draw("mine/reg", range(20, 32))
    draw("mine/table", range(40, 44), None)
    lines = [
        json.dumps({"file_name": f"{seed:03d}.png", "prompt": f"prompt {seed}"}) for seed in range(40, 44)
    ]
    Path("mine/table/metadata.jsonl").write_text("\n".join(lines))
    sources = [
        {"path": "mine/dog", "caption_prefix": "sks dog", "repeats": 5},
        {"path": "mine/reg"},
        {"path": "./mine/table/", "caption_column": "prompt", "caption_prefix": "of a table, ", "repeats": 2},
    ]
    prepare.main(params_for("mine", sources=sources))
    found = samples()
    assert Counter(name.rpartition("/")[0] for name in found) == {
        "mine/dog": 12,
        "mine/reg": 12,
        "mine/table": 4,
    }
    assert found["mine/dog/003.png"].captions == ("sks dog",)
    assert found["mine/reg/021.png"].captions == ("a picture 21",)
    assert found["mine/table/040.png"].captions == ("of a table, prompt 40",)
    assert {name.split("/")[1]: sample.repeats for name, sample in found.items()} == {
        "dog": 5,
        "reg": 1,
        "table": 2,
    }
    for name, content in iter_images(paths.PAIR_IMAGES):
        assert content == Path(name).read_bytes()


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([{"path": "mine/a"}, {"path": "mine/a/b"}], "mine/a/b lies inside mine/a"),
        ([{"path": "mine/a"}, {"path": "mine/nothing"}], r"prepare\.source mine/nothing: expected a folder"),
        ([{"path": "mine/a"}, {"path": "mine/a"}], r"prepare\.sources: expected each path once"),
    ],
)
def test_sources_that_do_not_combine(sources: list[dict[str, str]], message: str) -> None:
    draw("mine/a/b", range(3))
    with pytest.raises(StageError, match=message):
        prepare.main(params_for("mine", sources=sources))


def test_a_source_that_dvc_does_not_look_at_is_refused() -> None:
    shutil.copyfile(REPOSITORY / "dvc.yaml", "dvc.yaml")
    draw("mine", range(3))
    draw("elsewhere", range(3))
    sources = [{"path": "mine"}, {"path": "elsewhere"}]
    with pytest.raises(
        StageError, match=r"sources\[1\]\.path elsewhere: expected it below prepare\.source mine"
    ):
        prepare.main(params_for("mine", sources=sources))
    pipeline = yaml.safe_load(Path("dvc.yaml").read_text())
    pipeline["stages"]["prepare"]["deps"].append("elsewhere/")
    Path("dvc.yaml").write_text(yaml.safe_dump(pipeline))
    prepare.main(params_for("mine", sources=sources))
    assert len(samples()) == 6


def test_copies_of_an_image_stay_on_one_side_whatever_their_names() -> None:
    draw("mine", range(40))
    for seed in range(40):
        for copy in ("a", "z"):
            shutil.copyfile(f"mine/{seed:03d}.png", f"mine/{copy}{seed:03d}.png")
            Path(f"mine/{copy}{seed:03d}.txt").write_text("a copy")
    prepare.main(params_for("mine", validation_fraction=0.4))
    found, split_of = samples(), {}
    for entry in image_index(paths.PAIR_IMAGES):
        split_of.setdefault(entry.image_sha256, set()).add(found[entry.sample_id].split)
    assert [splits for splits in split_of.values() if len(splits) > 1] == []
    assert {"train", "validation"} == set.union(*split_of.values())
    assert metrics()["num_duplicate_images"] == 80


def test_a_source_that_is_split_keeps_its_splits() -> None:
    for split, seeds in (("train", range(9)), ("validation", range(20, 23)), ("test", range(30, 34))):
        draw(f"mine/{split}", seeds)
    prepare.main(params_for("mine"))
    assert Counter(sample.split for sample in samples().values()) == {"train": 9, "validation": 3}
    assert {name.split("/")[0] for name, sample in samples().items() if sample.split == "validation"} == {
        "validation"
    }
    assert metrics()["num_test_samples_left_out"] == 4
    shutil.rmtree("mine/validation")
    prepare.main(params_for("mine"))
    assert {name.split("/")[0]: sample.split for name, sample in samples().items()} == {
        "train": "train",
        "test": "validation",
    }
    shutil.rmtree("mine/test")
    prepare.main(params_for("mine", validation_fraction=0.5))  # one folder is no split
    assert {sample.split for sample in samples().values()} == {"train", "validation"}


def test_captions_of_tags_are_shuffled_for_training_alone() -> None:
    draw("mine", range(20), "1girl, solo, red hair, smile, number")
    params = params_for("mine", caption_variants=6, keep_tags=1, tag_dropout=0.2, validation_fraction=0.3)
    prepare.main(params)
    first = samples()
    for name, sample in first.items():
        written = f"1girl, solo, red hair, smile, number {int(name[:3])}"
        if sample.split == "validation":
            assert sample.captions == (written,)
            continue
        assert len(sample.captions) == 6 and len(set(sample.captions)) > 3
        for caption in sample.captions:
            assert caption.startswith("1girl")
            assert set(caption.split(", ")) <= set(written.split(", "))
    assert {"train", "validation"} == {sample.split for sample in first.values()}
    prepare.main(params)
    assert samples() == first
    prepare.main(params_for("mine", caption_variants=6, keep_tags=1, variant_seed=1, validation_fraction=0.3))
    assert samples() != first


def test_worker_processes_write_the_bytes_of_threads(workplace: Path) -> None:
    draw("mine", range(30))
    (workplace / "mine/broken.png").write_bytes(b"no image")
    (workplace / "mine/broken.txt").write_text("broken")
    prepare.main(params_for("mine"))
    threads = {path: path.read_bytes() for path in paths.PAIRS.rglob("*") if path.is_file()}
    code = "from stages import prepare; prepare._IN_THREADS = 0\n" \
        "from stages.lib.frame.params import read_params\n" \
        "if __name__ == '__main__': prepare.main(read_params())\n"  # fmt: skip
    Path("run.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "SD_WORKERS": "2"}
    subprocess.run([sys.executable, "run.py"], check=True, env=environment, capture_output=True)
    assert {path: path.read_bytes() for path in paths.PAIRS.rglob("*") if path.is_file()} == threads


def test_near_duplicates_stay_on_one_side() -> None:
    photographs = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    Path("mine").mkdir()
    for number, each in enumerate(photographs):
        whole = Image.fromarray(each)
        variants = {
            "small.png": whole.resize((200, 150)),
            "poor.jpg": whole,
            "turned.webp": whole.resize((300, 200)),
        }
        for name, image in variants.items():
            image.save(f"mine/{number}{name}", quality=30)
            Path(f"mine/{number}{name}").with_suffix(".txt").write_text("a photograph")
    splits = []
    for seed in range(6):
        prepare.main(params_for("mine", near_duplicate_bits=6, validation_fraction=0.5, split_seed=seed))
        found = samples()
        for number in range(4):
            assert len({sample.split for name, sample in found.items() if name.startswith(str(number))}) == 1
        splits.append(tuple(sample.split for sample in found.values()))
        assert metrics()["num_near_duplicate_images"] == 8
    assert len(set(splits)) > 1


def test_groups_are_those_of_a_search_by_hand() -> None:
    random = np.random.default_rng(0)
    hashes = [int(each) for each in random.integers(0, 2**63, 40)]
    hashes += [hashes[3] ^ 0b1011, hashes[3] ^ 0b1011 ^ (0b111 << 40), hashes[7] ^ (1 << 63)]
    first = groups_alike(hashes, 3)
    assert first[40] == first[41] == first[3] == 3  # 41 by way of 40
    assert first[42] == first[7] == 7
    assert [first[n] for n in range(40)] == list(range(40))
    assert groups_alike(hashes, 2)[40] == 40
    assert groups_alike([], 3) == []


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serving(tmp_path / "hub", monkeypatch) as served:
        yield served


def rows(first: int, count: int) -> datasets.Dataset:
    columns = {
        "image": [draw_image(number) for number in range(first, first + count)],
        "prompt": [f"prompt {number}" for number in range(first, first + count)],
    }
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def test_a_data_set_of_the_hub_keeps_its_splits(hub: Hub, tmp_path: Path) -> None:
    """Written by `datasets`; its one column of texts is taken, whatever it is called."""
    for name, first, count in (
        ("train-00000-of-00002", 0, 5),
        ("train-00001-of-00002", 5, 5),
        ("validation-00000-of-00001", 20, 3),
        ("test-00000-of-00001", 30, 4),
    ):
        (tmp_path / "made/data").mkdir(parents=True, exist_ok=True)
        rows(first, count).to_parquet(tmp_path / f"made/data/{name}.parquet")
    hub.add("datasets/owner/set", tmp_path / "made")
    params = params_for(None, hub_id="owner/set", revision=COMMIT)
    prepare.main(params)
    assert Counter(sample.split for sample in samples().values()) == {"train": 10, "validation": 3}
    assert metrics()["num_test_samples_left_out"] == 4
    assert samples()["data/train-00001-of-00002.parquet/00000002"].captions == ("prompt 7",)
    (held_out,) = {name.rpartition("/")[0] for name, each in samples().items() if each.split == "validation"}
    assert held_out == "data/validation-00000-of-00001.parquet"
    first, asked = {path: path.read_bytes() for path in paths.PAIRS.rglob("*.parquet")}, len(hub.asked)
    hub.refusal = (0, "")  # without a network
    prepare.main(params)
    assert {path: path.read_bytes() for path in paths.PAIRS.rglob("*.parquet")} == first
    assert len(hub.asked) == asked


def test_a_folder_of_images_of_the_hub_is_split_by_its_folders(hub: Hub, tmp_path: Path) -> None:
    for split, seeds in (("train", range(6)), ("test", range(20, 23))):
        draw(f"made/{split}", seeds, None)
        lines = [json.dumps({"file_name": f"{seed:03d}.png", "text": f"prompt {seed}"}) for seed in seeds]
        Path(f"made/{split}/metadata.jsonl").write_text("\n".join(lines))
    hub.add("datasets/owner/set", tmp_path / "made")
    prepare.main(params_for(None, hub_id="owner/set", revision=COMMIT))
    found = {name.split("/")[0]: sample.split for name, sample in samples().items()}
    assert found == {"train": "train", "test": "validation"}
    assert len(samples()) == 9


def test_a_branch_is_answered_with_its_commit(hub: Hub, tmp_path: Path) -> None:
    draw("made", range(3))
    hub.add("datasets/owner/set", tmp_path / "made")
    with pytest.raises(StageError, match=rf"main.*{COMMIT}"):
        prepare.main(params_for(None, hub_id="owner/set", revision="main"))


def test_splits_without_one_to_train_on_are_refused(hub: Hub, tmp_path: Path) -> None:
    for split in ("validation", "test"):
        draw(f"made/{split}", range(3))
    hub.add("datasets/owner/set", tmp_path / "made")
    with pytest.raises(StageError, match="expected a split 'train' to train on, found test, validation"):
        prepare.main(params_for(None, hub_id="owner/set", revision=COMMIT))


def test_mask_files_are_stored_apart_and_fit_their_images() -> None:
    draw("mine", range(6))
    mask = Image.new("L", draw_image(0).size)
    mask.paste(255, (10, 10, 40, 40))
    mask.save("mine/000.mask.png")
    mask.convert("RGB").save("mine/001-masklabel.jpg", quality=95)
    mask.resize((7, 7)).save("mine/002.mask.png")
    Path("mine/003.mask.png").write_bytes(b"no image")
    Image.new("L", (5, 5)).save("mine/lone.mask.png")
    Path("mine/lone.mask.txt").write_text("an image of its own, for there is no lone.png")
    prepare.main(params_for("mine", max_rejected_fraction=0.5))
    assert sorted(samples()) == ["000.png", "001.png", "004.png", "005.png", "lone.mask.png"]
    reasons = {
        row["name"]: row["reason"] for row in map(json.loads, paths.REJECTED_PAIRS.read_text().splitlines())
    }
    width, height = mask.size
    assert reasons["002.png"] == f"its mask is of 7 x 7 pixels, it is of {width} x {height}"
    assert reasons["003.png"].startswith("its mask: not an image")
    stored = dict(iter_images(paths.PAIR_MASKS))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(stored["000.png"]))), np.asarray(mask))
    assert np.abs(np.asarray(decoded(stored["001.png"]))[..., 0].astype(int) - np.asarray(mask)).mean() < 2
    assert metrics()["num_masks"] == 2 and metrics()["num_unlisted_files"] == 0


def test_masks_of_a_table_and_of_several_sources() -> None:
    for folder in ("mine/a", "mine/b"):
        draw(folder, range(3), None)
        lines = [json.dumps({"file_name": f"{seed:03d}.png", "text": "x"}) for seed in range(3)]
        Path(folder, "metadata.jsonl").write_text("\n".join(lines))
        Image.new("L", draw_image(0).size, 128).save(f"{folder}/001.mask.png")
    prepare.main(params_for("mine", sources=[{"path": "mine/a"}, {"path": "mine/b"}]))
    assert [name for name, _ in iter_images(paths.PAIR_MASKS)] == ["mine/a/001.png", "mine/b/001.png"]
    assert len(samples()) == 6
