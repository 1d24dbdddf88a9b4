"""Data sets of the Hub: the splits that `datasets` makes, of files that it wrote; nothing else comes."""

from __future__ import annotations

import io
import logging
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet as pq
import pytest
import yaml
from datasets.utils.metadata import MetadataConfigs
from huggingface_hub import DatasetCardData, constants

from stages.lib.data.sources.files import files_of_folder
from stages.lib.data.sources.hub import CONVERTED, HubDataset, open_hub_dataset
from stages.lib.data.sources.opening import Reading, read_files
from stages.lib.frame.errors import StageError
from tests.conftest import draw_image, png
from tests.hub import COMMIT, Hub, serving

PNG = png(draw_image(0))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    with serving(tmp_path / "hub", monkeypatch) as served:
        yield served


def serve(hub: Hub, files: dict[str, bytes] | Path, card: dict[str, Any] | None = None) -> None:
    if card is not None:
        assert isinstance(files, dict)
        files = files | {"README.md": f"---\n{yaml.safe_dump(card)}---\n# A data set\n".encode()}
    hub.add("datasets/owner/set", files)


def fetch(subset: str | None = None) -> HubDataset:
    return open_hub_dataset("owner/set", COMMIT, subset)


def refusal(subset: str | None = None) -> str:
    with pytest.raises(StageError) as caught:
        fetch(subset)
    assert "owner/set" in str(caught.value)
    return str(caught.value)


def splits_of_datasets(folder: Path, cache: Path, subset: str | None = None) -> dict[str, list[str]]:
    """What `datasets` takes each split of a folder to be, without reading it."""
    builder = datasets.load_dataset_builder(str(folder), subset, cache_dir=str(cache))
    return {
        str(split): sorted(Path(file).relative_to(folder).as_posix() for file in files)
        for split, files in builder.config.data_files.items()
    }


def rows(first: int, count: int) -> datasets.Dataset:
    columns = {
        "image": [draw_image(number) for number in range(first, first + count)],
        "caption": [f"caption {number}" for number in range(first, first + count)],
        "tags": [["one", "two"]] * count,
        "score": [0.5] * count,
    }
    return datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())


def parquet_set(folder: Path) -> Path:
    """Two subsets as `push_to_hub` lays them out, with the card that it writes."""
    data = DatasetCardData()
    for subset in ("emoji", "photos"):
        parts = {"train-00000-of-00002": rows(0, 3), "train-00001-of-00002": rows(3, 2)}
        for name, part in (parts | {"test-00000-of-00001": rows(5, 2)}).items():
            (folder / subset).mkdir(parents=True, exist_ok=True)
            part.to_parquet(folder / subset / f"{name}.parquet")
        paths = [{"split": split, "path": f"{subset}/{split}-*"} for split in ("train", "test")]
        config = {"data_files": paths} | ({"default": True} if subset == "emoji" else {})
        MetadataConfigs({subset: config}).to_dataset_card_data(data)
        info = datasets.DatasetInfo(features=rows(0, 1).features, config_name=subset)
        datasets.info.DatasetInfosDict({subset: info}).to_dataset_card_data(data)
    (folder / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n")
    return folder


# --- forms


def test_parquet_of_one_subset(hub: Hub, tmp_path: Path) -> None:
    folder = parquet_set(tmp_path / "set")
    serve(hub, folder)
    found = fetch("photos")
    assert found.splits == splits_of_datasets(folder, tmp_path / "cache", "photos")
    assert hub.downloaded() == {"README.md", *found.splits["train"], *found.splits["test"]}
    assert (found.caption_columns, found.image_columns) == (["caption", "tags"], ["image"])
    assert fetch().splits == splits_of_datasets(folder, tmp_path / "cache")
    assert set(fetch().splits["train"]) == {f"emoji/train-0000{number}-of-00002.parquet" for number in (0, 1)}

    hub.asked.clear()
    assert fetch("photos") == found and hub.asked == []


def test_its_rows_are_those_that_datasets_reads(hub: Hub, tmp_path: Path) -> None:
    folder = parquet_set(tmp_path / "set")
    serve(hub, folder)
    found = fetch()
    files = files_of_folder(found.folder, bound=found.folder.parents[1], only=found.splits["train"])
    source = read_files(files, Reading("caption", 64))
    table = pq.read_table([folder / name for name in found.splits["train"]]).to_pylist()
    assert [row.captions for row in source.rows] == [(row["caption"],) for row in table]
    assert [source.read(row.sample_id) for row in source.rows] == [row["image"]["bytes"] for row in table]


@pytest.mark.parametrize(
    "names",
    [
        ["train/0.png", "train/metadata.csv", "test/1.png", "test/metadata.csv"],
        ["0.png", "metadata.jsonl", "a/1.jpg"],
        [
            "data/train/0.png",
            "data/validation/1.png",
            "data/train/metadata.csv",
            "data/validation/metadata.csv",
        ],
        ["train_0.png", "test_1.png"],
    ],
)
def test_images_with_metadata_are_split_as_datasets_does(hub: Hub, tmp_path: Path, names: list[str]) -> None:
    lines = {".csv": b"file_name,text\n", ".jsonl": b'{"file_name": "0.png", "text": "a"}\n'}
    content = {name: lines.get(Path(name).suffix, PNG) + name.encode() for name in names}
    for name, each in content.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(each)
    serve(hub, content | {"docs/notes.pdf": b"no part of it"})
    found = fetch()
    assert found.splits == splits_of_datasets(tmp_path / "set", tmp_path / "cache")
    assert hub.downloaded() == set(names)


def test_a_metadata_file_above_the_splits_comes_along(hub: Hub) -> None:
    serve(
        hub,
        {
            "metadata.csv": b"file_name,text\n",
            "train/0.png": PNG,
            "test/1.png": PNG,
            "other/metadata.csv": b"",
        },
    )
    assert fetch().splits == {
        "train": ["metadata.csv", "train/0.png"],
        "test": ["metadata.csv", "test/1.png"],
    }


def test_captions_beside_images_come_along(hub: Hub) -> None:
    serve(hub, {"a/0.png": PNG, "a/0.txt": b"red", "a/1.png": PNG, "a/1.json": b"{}", "b.txt": b"alone"})
    assert fetch().splits == {"train": ["a/0.png", "a/0.txt", "a/1.json", "a/1.png"]}


def test_tars_of_a_webdataset(hub: Hub, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in (("0.png", PNG), ("0.txt", b"red cat")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    names = ["data/train-000.tar", "data/train-001.tar", "data/val-000.tar"]
    serve(hub, dict.fromkeys(names, buffer.getvalue()))
    found = fetch()
    for name in names:
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(buffer.getvalue())
    assert found.splits == splits_of_datasets(tmp_path / "set", tmp_path / "cache")
    assert [*found.splits] == ["train", "validation"] and found.caption_columns == []
    files = files_of_folder(found.folder, bound=found.folder.parents[1], only=found.splits["validation"])
    assert [row.captions for row in read_files(files, Reading("text", 64)).rows] == [("red cat",)]


# --- what the card says


@pytest.mark.parametrize(
    "config",
    [
        {"data_files": "a/*.png"},
        {"data_files": ["a/0.png", "b/**"]},
        {
            "data_files": [
                {"split": "test", "path": "a/*"},
                {"split": "train", "path": ["b/2.png", "b/3.png"]},
            ]
        },
        {"data_dir": "b"},
        {"data_dir": "b", "data_files": [{"split": "dev", "path": "**/2.png"}]},
        {"data_files": [{"split": "train", "path": ["a/*", "nothing/*"]}]},
    ],
)
def test_a_card_means_what_it_means_to_datasets(hub: Hub, tmp_path: Path, config: dict[str, Any]) -> None:
    card = {"license": "mit", "configs": [{"config_name": "one", **config}]}
    names = ("a/0.png", "a/1.png", "b/2.png", "b/3.png")
    serve(hub, {name: PNG + name.encode() for name in names}, card)
    folder = tmp_path / "set"
    for name, content in hub.files["datasets/owner/set"][COMMIT].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    found = fetch()
    assert found.splits == splits_of_datasets(folder, tmp_path / "cache")
    assert hub.downloaded() == {"README.md", *(name for files in found.splits.values() for name in files)}
    assert fetch("one") == found


def test_a_subset_is_chosen_or_asked_for(hub: Hub) -> None:
    files = {"a/0.png": PNG, "b/0.png": PNG}
    configs = [{"config_name": name, "data_dir": name} for name in ("a", "b")]
    serve(hub, files, {"configs": configs})
    assert "2 subsets and no default, expected prepare.subset to be one of a, b" in refusal()
    assert "no subset 'c', expected prepare.subset to be one of a, b" in refusal("c")
    assert fetch("b").splits == {"train": ["b/0.png"]}
    hub.files.clear()
    hub.add("datasets/owner/plain", files)
    assert open_hub_dataset("owner/plain", COMMIT, None).splits == {"train": ["a/0.png", "b/0.png"]}


@pytest.mark.parametrize(
    ("card", "expected"),
    [
        ({"configs": [{"data_files": "*"}]}, "expected a config_name in each, got {'data_files': '*'}"),
        ({"configs": "all"}, "expected a config_name in each, got 'all'"),
        (
            {"configs": [{"config_name": "a", "data_files": 3}]},
            "expected paths, or a split and its path each, got 3",
        ),
        ({"configs": [{"config_name": "a", "data_files": [{"split": "train"}]}]}, "got [{'split': 'train'}]"),
        (
            {"configs": [{"config_name": "a", "data_files": "gone.png"}]},
            "gone.png: no such file in this commit",
        ),
        (
            {"configs": [{"config_name": "a", "data_files": "x*"}]},
            "split train: no such files in this commit",
        ),
        ({"configs": [{"config_name": "a", "data_files": "https://x/0.png"}]}, "leads out of the repository"),
        ({"configs": [{"config_name": "a", "data_files": "../../*"}]}, "leads out of the repository"),
    ],
)
def test_a_card_that_cannot_be_followed_is_named(hub: Hub, card: dict[str, Any], expected: str) -> None:
    serve(hub, {"0.png": PNG}, card)
    assert expected in refusal() and "README.md" in refusal()
    assert hub.downloaded() == {"README.md"}


@pytest.mark.parametrize("text", [b"---\n- a list\n---\n", b"---\na: [\n---\n", b"---\na: \xff\n---\n"])
def test_a_card_that_cannot_be_read_is_named(hub: Hub, text: bytes) -> None:
    serve(hub, {"0.png": PNG, "README.md": text})
    assert "README.md: its metadata cannot be read" in refusal()


def test_the_file_of_the_first_split_is_not_in_the_next(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    paths = [{"split": "test", "path": "*"}, {"split": "train", "path": ["0.png", "1.png"]}]
    serve(
        hub,
        {f"{number}.png": PNG for number in range(3)},
        {"configs": [{"config_name": "a", "data_files": paths}]},
    )
    assert fetch().splits == {"train": ["0.png", "1.png"], "test": ["2.png"]}
    assert "split test also names 0.png, 1.png; left out of it" in caplog.text


def test_columns_of_the_card_count_where_there_is_no_parquet(hub: Hub) -> None:
    features = [
        {"name": "image", "dtype": "image"},
        {"name": "title", "dtype": "string"},
        {"name": "others", "list": "string"},
        {"name": "older", "sequence": "string"},
        {"name": "label", "dtype": {"class_label": {"names": {"0": "cat"}}}},
        {"name": "score", "dtype": "float32"},
    ]
    serve(hub, {"0.png": PNG}, {"dataset_info": {"features": features}})
    assert (fetch().caption_columns, fetch().image_columns) == (["title", "others", "older"], ["image"])


# --- refusals


def test_a_script_is_named_and_never_fetched(hub: Hub) -> None:
    serve(hub, {"set.py": b"raise SystemExit", "data/train.png": PNG})
    assert "needs its script set.py, and scripts are never run; look for its branch refs/convert" in refusal()
    other = "f" * 40
    hub.add("datasets/owner/set", {"default/train/0000.parquet": b""}, other, CONVERTED)
    assert refusal().endswith(
        f"the commit of its branch {CONVERTED}, where the Hub keeps it as Parquet: {other}"
    )
    assert hub.downloaded() == set()


def test_the_branch_that_the_hub_converts_has_a_folder_a_subset(
    hub: Hub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows(0, 2).to_parquet(tmp_path / "0.parquet")
    content = (tmp_path / "0.parquet").read_bytes()
    names = [
        "a/train/0000.parquet",
        "a/train/0001.parquet",
        "a/test/0000.parquet",
        "b/partial-train/0000.parquet",
    ]
    serve(hub, dict.fromkeys(names, content))
    assert fetch("a").splits == {"train": names[:2], "test": names[2:3]}
    assert fetch("a").caption_columns == ["caption", "tags"] and caplog.text.count("a part") == 2
    assert fetch("b").splits == {"train": names[3:]}
    assert "prepare.subset to be one of a, b" in refusal()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"train.csv": b"url,text\n"}, "found 1 .csv; what is packed or of another form: fetch it"),
        ({"images.zip": b"PK"}, "found 1 .zip"),
        ({"README.md": b"# Nothing yet\n"}, "found nothing"),
        ({"train/0.png": PNG, "test/rows.csv": b""}, "in split test, found 1 .png, 1 .csv"),
    ],
)
def test_other_forms_are_named(hub: Hub, files: dict[str, bytes], expected: str) -> None:
    serve(hub, files)
    assert expected in refusal()
    assert hub.downloaded() <= {"README.md"}


def test_parquet_without_images_names_its_columns(hub: Hub, tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"url": ["https://x"], "text": ["a"]}).to_parquet(tmp_path / "0.parquet")
    serve(hub, {"train.parquet": (tmp_path / "0.parquet").read_bytes()})
    assert (
        "expected a column of images in its Parquet files, found url, text; images at addresses" in refusal()
    )
    hub.files.clear()
    hub.add("datasets/owner/odd", {"train.parquet": b"no Parquet"})
    with pytest.raises(StageError, match=r"train\.parquet is no Parquet file"):
        open_hub_dataset("owner/odd", COMMIT, None)


# --- without the Hub


def test_without_a_network_what_came_before_is_enough(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    serve(hub, parquet_set(tmp_path / "set"))
    found = fetch()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch() == found
    assert "the Hub cache lacks photos/test-00000-of-00001.parquet, " in refusal("photos")


def test_a_part_of_the_files_is_not_taken_for_all(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (folder := hub.cache / "datasets--owner--set/snapshots" / COMMIT).mkdir(parents=True)
    (folder / "train-00000-of-00002.parquet").write_bytes(b"")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with caplog.at_level(logging.WARNING):
        assert "no list of all, so that nobody knows whether they are complete" in refusal()


def test_a_branch_is_answered_with_its_commit(hub: Hub) -> None:
    serve(hub, {"0.png": PNG})
    with pytest.raises(StageError, match=f"revision main points to {COMMIT} at this moment"):
        open_hub_dataset("owner/set", "main", None)
