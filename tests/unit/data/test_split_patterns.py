"""Names and patterns mean the files that Hugging Face `datasets` takes them to mean."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from datasets.data_files import DataFilesDict, get_data_patterns, resolve_pattern

from stages.lib.data.split_patterns import matching, splits_by_names

PARTS = (
    "train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation", "data",
    "trainer", "my_train", "a-val-2", "pretrain", "Test", "images", "train_val", "0dev", "x test", ".cache",
    "__pycache__", "best", "latest.test.part",
)  # fmt: skip
FILES = (
    "0.png", "train.png", "train-00000-of-00002.parquet", "validation-00000-of-00001.parquet",
    "extra-00000-of-00001.parquet", "test_1.png", "dev.tar", "training.png", "README.md", "config.json",
    "metadata.csv", ".hidden.png", "my.valid.png", "retrain.png", "eval", "notes", "__init__.png", "a b.png",
)  # fmt: skip
PATTERNS = (
    "**", "*", "data/*", "data/**", "**/*.png", "*/*.png", "train/**", "**/train/**", "data/train-*",
    "**/*val*", "[t]*/**", "t?ain/*", "**/README.md", ".cache/**", "**/.*", "__pycache__/*", "**/__*/*",
    "./data/*.parquet", "**/*-0000[0-9]-of-*", "[!t]*/*.png", "images/**/*",
)  # fmt: skip


def repository(seed: int) -> list[str]:
    draw = random.Random(seed)
    names = {
        "/".join([*draw.choices(PARTS, k=draw.randint(0, 3)), draw.choice(FILES)])
        for _ in range(draw.randint(2, 12))
    }
    folders = {name.rsplit("/", 1)[0] for name in names if "/" in name}
    return sorted(
        name for name in names if not any(f"{folder}/".startswith(f"{name}/") for folder in folders)
    )


def lay_out(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


def relative(folder: Path, paths: list[str]) -> list[str]:
    return sorted({Path(path).relative_to(folder).as_posix() for path in paths})


@pytest.mark.parametrize("seed", range(60))
def test_names_alone_make_the_splits_that_datasets_makes(tmp_path: Path, seed: int) -> None:
    names = repository(seed)
    folder = lay_out(tmp_path / "set", names)
    try:
        found = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
    except FileNotFoundError:
        assert splits_by_names(names) == {"train": []}
        return
    expected = {str(split): relative(folder, files) for split, files in found.items()}
    assert {split: sorted(files) for split, files in splits_by_names(names).items()} == expected


@pytest.mark.parametrize("seed", range(20))
def test_a_pattern_means_what_datasets_resolves_it_to(tmp_path: Path, seed: int) -> None:
    names = [*repository(seed + 100), "data/train-00000-of-00002.parquet", "data/0.png", "images/a/b/1.png"]
    folder = lay_out(tmp_path / "set", names)
    for pattern in (*PATTERNS, *names):
        try:
            expected = relative(folder, resolve_pattern(pattern, str(folder)))
        except FileNotFoundError:
            expected = []
        assert matching(pattern, names) == expected, pattern


def test_these_were_all_kinds_of_repositories() -> None:
    kinds = {tuple(sorted(splits_by_names(repository(seed)))) for seed in range(60)}
    assert {("train",), ("test", "train", "validation")} <= kinds and any("extra" in kind for kind in kinds)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("https://elsewhere/a.png", "leads out of the repository"),
        ("/etc/passwd", "leads out of the repository"),
        ("../a.png", "leads out of the repository"),
        ("b/../../a*", "leads out of the repository"),
        ("zip://*.png::data.zip", "into an archive"),
        ("gone.png", "no such file in this commit"),
        ("a**", "only be an entire path component"),
    ],
)
def test_a_pattern_that_leads_elsewhere_or_nowhere_is_named(pattern: str, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        matching(pattern, ["a.png"])
