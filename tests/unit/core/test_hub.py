"""Commits of the Hub: what they hold, what downloads ask for, and what is said where something is missing."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants, file_download

from stages.lib.core import hub_downloads
from stages.lib.core.hub import commit_of, open_repository
from stages.lib.frame.errors import StageError
from tests.conftest import REPOSITORY
from tests.hub import COMMIT, Asked, Hub, serving

OTHER = "fedcba9876543210fedcba9876543210fedcba98"
SIZE = 100_000
LARGE = random.Random(0).randbytes(SIZE)
FILES = {"README.md": b"# A data set\n", "data/train.bin": LARGE}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """One data set; files of 1000 bytes and more are continued, and come in pieces of 1000 bytes."""
    monkeypatch.setattr(hub_downloads, "CONTINUED_BYTES", 1000)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    monkeypatch.setattr(file_download, "time", types.SimpleNamespace(sleep=lambda seconds: None))
    with serving(tmp_path / "hub", monkeypatch) as served:
        served.add("datasets/owner/set", FILES)
        yield served


def fetch(*paths: str) -> Path:
    return open_repository("owner/set", COMMIT, "dataset").fetch(paths)


def starts(hub: Hub, path: str = "data/train.bin") -> list[int]:
    """The first byte of each request for the bytes of a file."""
    return [asked.first_byte for asked in hub.asked if asked[:2] == ("GET", path)]


def partial_of(hub: Hub) -> list[Path]:
    return [*hub.cache.glob(f"*/blobs/{'?' * 64}.incomplete")]


# --- what comes


def test_only_what_is_asked_for_comes_and_once(hub: Hub) -> None:
    repository = open_repository("owner/set", COMMIT, "dataset")
    sizes = {path: size for path, size in repository.sizes.items() if path != ".gitattributes"}
    assert sizes == {path: len(content) for path, content in FILES.items()}
    folder = repository.fetch(["data/train.bin"])
    assert hub.downloaded() == {"data/train.bin"}
    assert (folder / "data/train.bin").read_bytes() == LARGE and not (folder / "README.md").exists()
    # Other programs find it where they look.
    assert huggingface_hub.try_to_load_from_cache(
        "owner/set", "data/train.bin", revision=COMMIT, repo_type="dataset"
    ) == str(folder / "data/train.bin")
    hub.asked.clear()
    assert fetch("data/train.bin") == folder
    assert hub.asked == []
    assert (fetch("README.md") / "README.md").read_bytes() == FILES["README.md"]


def test_a_token_is_not_shown_to_the_host_that_stores_large_files(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch("README.md", "data/train.bin")
    tokens = {asked[:2]: asked.token for asked in hub.asked}
    assert tokens.pop(("GET", "data/train.bin")) is None  # where its bytes come from, elsewhere
    assert set(tokens.values()) == {"Bearer hf_secret"}


# --- downloads that stop


def test_a_cut_download_asks_for_no_byte_twice(hub: Hub) -> None:
    hub.cut_after["data/train.bin"] = 30_000
    hub.only_once.add("data/train.bin")
    with pytest.raises(
        StageError, match=r"(?s)owner/set@01234567: download stopped: .*again, it continues there"
    ):
        fetch("data/train.bin")
    assert [file.stat().st_size for file in partial_of(hub)] == [30_000]
    assert set(starts(hub)) == {0, 30_000}  # tried again at once, from where it stopped
    hub.cut_after.clear()
    hub.only_once.clear()
    hub.asked.clear()
    assert (fetch("data/train.bin") / "data/train.bin").read_bytes() == LARGE
    assert starts(hub) == [30_000]
    assert partial_of(hub) == []


def test_a_killed_download_continues_in_the_next_process(hub: Hub) -> None:
    hub.pause = 0.02
    code = f"""
import huggingface_hub.constants
from stages.lib.core import hub_downloads
from stages.lib.core.hub import open_repository
hub_downloads.CONTINUED_BYTES = huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 1000
open_repository("owner/set", {COMMIT!r}, "dataset").fetch(["data/train.bin"])
"""
    home = str(hub.cache.with_name("home"))
    environment = os.environ | {"HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(hub.cache), "HF_HOME": home}
    killed = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, env=environment)
    try:
        while not any(file.stat().st_size >= 5000 for file in partial_of(hub)):
            assert killed.poll() is None
    finally:
        killed.kill()
        killed.wait()
    (there,) = [file.stat().st_size for file in partial_of(hub)]
    assert 5000 <= there < SIZE
    hub.pause = 0
    hub.asked.clear()
    assert (fetch("data/train.bin") / "data/train.bin").read_bytes() == LARGE
    assert starts(hub) == [there]


def test_an_error_ends_the_other_downloads(hub: Hub) -> None:
    hub.pause = 0.05  # five seconds for the whole of it
    hub.add("datasets/owner/set", {**FILES, "gone": b"?"})
    repository = open_repository("owner/set", COMMIT, "dataset")
    hub.add("datasets/owner/set", FILES)
    before = time.monotonic()
    with pytest.raises(StageError, match="download stopped"):
        repository.fetch(["gone", "data/train.bin"])
    assert all(file.stat().st_size < SIZE for file in partial_of(hub))
    assert not [*hub.cache.glob("*/snapshots/*/data/train.bin")]
    assert time.monotonic() - before < 60


def test_bytes_that_are_not_those_of_the_commit_are_not_used(hub: Hub) -> None:
    hub.honest = False
    with pytest.raises(StageError, match=r"data/train\.bin: what came has not the hash that the Hub names"):
        fetch("data/train.bin")
    assert partial_of(hub) == [] and not [*hub.cache.glob("*/snapshots/*/data/train.bin")]
    hub.honest = True
    assert (fetch("data/train.bin") / "data/train.bin").read_bytes() == LARGE


@pytest.mark.parametrize("left", [b"x" * 10, b"x" * (SIZE + 1)], ids=["damaged", "too long"])
def test_what_another_program_left_does_no_harm(hub: Hub, left: bytes) -> None:
    fetch("README.md")
    digest = hub_downloads.hash_file(write(hub.cache / "whole", LARGE))
    (folder,) = hub.cache.glob("*/blobs")
    write(folder / f"{digest}.incomplete", left)
    if len(left) < SIZE:
        with pytest.raises(StageError, match="was removed; run the same command again"):
            fetch("data/train.bin")
    assert (fetch("data/train.bin") / "data/train.bin").read_bytes() == LARGE


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# --- revisions that are no commit


def test_a_branch_a_tag_and_a_part_of_a_commit_are_answered_with_the_commit(hub: Hub) -> None:
    hub.add("datasets/owner/set", FILES, OTHER, "v1.0")
    for revision, commit, when in (
        ("main", COMMIT, "at this moment"),
        ("v1.0", OTHER, "at this moment"),
        (OTHER[:8], OTHER, "in its history"),
        (COMMIT.upper(), COMMIT, "in its history"),
    ):
        with pytest.raises(StageError) as caught:
            open_repository("owner/set", revision, "dataset")
        assert str(caught.value) == (
            f"owner/set: revision {revision} points to {commit} {when}; "
            "write that, so that the run can be repeated"
        )
        assert commit_of("owner/set", revision, "dataset") == (commit, when)
    assert hub.downloaded() == set()


@pytest.mark.parametrize("revision", ["nowhere", "abc123", "../../../owner"])
def test_a_revision_that_does_not_exist(hub: Hub, revision: str) -> None:
    with pytest.raises(StageError, match=r"expected a commit of 40 hex.*the repository has no such revision"):
        open_repository("owner/set", revision, "dataset")


def test_a_start_that_two_commits_have_is_not_guessed(hub: Hub) -> None:
    hub.add("datasets/owner/set", FILES, COMMIT[:8] + OTHER[8:])
    with pytest.raises(StageError, match="no such revision"):
        open_repository("owner/set", COMMIT[:8], "dataset")


def test_without_a_network_the_cache_says_what_a_branch_pointed_to(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    huggingface_hub.snapshot_download("owner/set", repo_type="dataset", revision="main")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in ("main", COMMIT[:7]):
        with pytest.raises(StageError, match=rf"{revision} points to {COMMIT} in the Hub cache; write that"):
            open_repository("owner/set", revision, "dataset")
    write(hub.cache / "secret", b"of somebody")
    for revision in ("v2", OTHER[:7], "../../secret"):
        with pytest.raises(StageError, match="HF_HUB_OFFLINE is set; unset it") as caught:
            open_repository("owner/set", revision, "dataset")
        assert "somebody" not in str(caught.value)


# --- a Hub that cannot be asked


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        ((404, "RevisionNotFound"), "no such revision"),
        ((403, "GatedRepo"), "hf auth login"),
        ((401, "RepoNotFound"), "does not exist or is private"),
        ((0, "closed"), "the Hub cannot be reached ("),
        (None, "HF_HUB_OFFLINE is set"),
    ],
)
def test_a_refusal_is_told_and_the_cache_is_enough(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, refusal: tuple[int, str] | None, expected: str
) -> None:
    hub.refusal = refusal
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", refusal is None)
    for revision in (COMMIT, "main"):
        with pytest.raises(StageError) as caught:
            open_repository("owner/set", revision, "dataset")
        assert expected in str(caught.value) and "owner/set" in str(caught.value)
    hub.refusal = None
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = fetch("README.md")

    hub.refusal = refusal
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", refusal is None)
    hub.asked.clear()
    assert fetch("README.md") == folder
    assert hub.asked == []
    if refusal is None:
        with pytest.raises(
            StageError, match=r"HF_HUB_OFFLINE is set, and the Hub cache lacks data/train\.bin"
        ):
            fetch("README.md", "data/train.bin")


def test_a_cache_without_a_list_is_used_only_where_the_hub_cannot_be_asked(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    huggingface_hub.hf_hub_download("owner/set", "README.md", repo_type="dataset", revision=COMMIT)
    assert open_repository("owner/set", COMMIT, "dataset").cached is None
    (lists,) = hub.cache.glob("*/trees")
    copied = shutil.copytree(
        hub.cache, hub.cache.with_name("copied"), ignore=lambda *_: ["trees"], symlinks=True
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(copied))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = open_repository("owner/set", COMMIT, "dataset")
    assert repository.cached and lists.is_dir()
    assert (
        repository.sizes["README.md"] == len(FILES["README.md"]) and "data/train.bin" not in repository.sizes
    )
    assert str(repository) == "owner/set@01234567 in the Hub cache"
    assert "HF_HUB_OFFLINE is set; using the Hub cache" in caplog.text


def test_an_id_that_can_be_none_is_named(hub: Hub) -> None:
    for revision in (COMMIT, "main"):
        with pytest.raises(StageError, match=r"owner/set/more: expected the id of a repository, owner/name"):
            open_repository("owner/set/more", revision, "dataset")
    assert Asked("GET", "/api/", 0, None) not in hub.asked
