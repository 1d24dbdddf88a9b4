"""Repositories of the Hugging Face Hub at a commit: what they hold, and their files, through the Hub cache.

A commit never changes, so what was listed or downloaded once serves without the Hub.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.lib.core.hub_downloads import Kind, cache_folder, download, silent_bar
from stages.lib.frame.errors import StageError, some

_COMMIT = re.compile(r"[0-9a-f]{40}")
_START_OF_COMMIT = re.compile(r"[0-9a-f]{4,40}")
_ANY_FILE = ".gitattributes"  # small, and in nearly every repository
_FILL = "fill the Hub cache on a machine that has one (HF_HOME)"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repository:
    """A commit of a repository.

    Attributes:
        hub_id: owner/name.
        revision: the commit, 40 hexadecimal digits.
        kind: of the repository.
        sizes: path -> bytes of its files; of those in the cache alone where ``cached`` is set.
        cached: the snapshot to use, because the Hub cannot be asked and nobody has listed the commit before.
    """

    hub_id: str
    revision: str
    kind: Kind
    sizes: dict[str, int]
    cached: Path | None = None

    def __str__(self) -> str:
        return f"{self.hub_id}@{self.revision[:8]}" + (" in the Hub cache" if self.cached else "")

    def fetch(self, paths: Iterable[str]) -> Path:
        """The folder that holds ``paths``; what the cache lacks is downloaded, or its download continued.

        Raises:
            StageError: if the Hub refuses, or a download stops.
        """
        from huggingface_hub.errors import HTTPError, XetDownloadError

        missing = {path: self.sizes[path] for path in sorted(set(paths)) if not self._lies_in_cache(path)}
        try:
            if missing:
                download(self.hub_id, self.revision, self.kind, missing)
            return Path(_snapshot(self.hub_id, self.revision, self.kind, local_files_only=True))
        except (HTTPError, OSError, XetDownloadError) as error:
            if refusal := _refusal(error):
                reason, remedy = refusal
                raise StageError(
                    f"{self}: {reason}, and the Hub cache lacks {some([*missing])}; {remedy}"
                ) from error
            raise StageError(
                f"{self}: download stopped: {error}; run the same command again, it continues there"
            ) from error

    def _lies_in_cache(self, path: str) -> bool:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(self.hub_id, path, revision=self.revision, repo_type=self.kind)
        return isinstance(found, str)


def open_repository(hub_id: str, revision: str, kind: Kind) -> Repository:
    """List what a commit holds.

    Args:
        hub_id: owner/name.
        revision: 40 hexadecimal digits. A branch, a tag or the start of a commit is answered by the error.
        kind: of the repository.

    Raises:
        StageError: if it is no commit; if there is none of that name, or the user may not see it; if the Hub
            cannot be reached and the cache holds nothing of the commit.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        CachedRepoTreeNotFoundError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
    )

    if not _COMMIT.fullmatch(revision):
        commit, when = commit_of(hub_id, revision, kind)
        raise StageError(
            f"{hub_id}: revision {revision} points to {commit} {when}; write that, so that the run can be "
            "repeated"
        )
    try:
        if not (sizes := _listed(hub_id, revision, kind)):
            HfApi().repo_info(hub_id, revision=revision, repo_type=kind, expand="sha")  # fails clearly
            _snapshot(
                hub_id, revision, kind, allow_patterns=[_ANY_FILE]
            )  # lists the commit, and keeps the list
            sizes = _listed(hub_id, revision, kind)
        if not sizes:
            raise CachedRepoTreeNotFoundError("the list of its files cannot be kept in its cache")
        return Repository(hub_id, revision, kind, sizes)
    except HFValidationError as error:
        raise _no_id(hub_id) from error
    except (HTTPError, OSError, CachedRepoTreeNotFoundError) as error:
        reason, remedy = _refusal(error) or _unreachable(error)
        try:
            cached = Path(_snapshot(hub_id, revision, kind, local_files_only=True))
        except LocalEntryNotFoundError:
            raise StageError(
                f"{hub_id} at {revision}: {reason}, and the Hub cache does not hold it; {remedy}"
            ) from error
    logger.warning("%s: %s; using the Hub cache", hub_id, reason)
    found = [path for path in cached.rglob("*") if path.is_file()]
    sizes = {path.relative_to(cached).as_posix(): path.stat().st_size for path in found}
    return Repository(hub_id, revision, kind, sizes, cached)


def commit_of(hub_id: str, revision: str, kind: Kind) -> tuple[str, str]:
    """The commit that a branch, a tag or the start of a commit stands for, and what says so.

    Raises:
        StageError: if neither the Hub nor its cache knows.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, RevisionNotFoundError

    start = revision.lower() if _START_OF_COMMIT.fullmatch(revision.lower()) else None
    try:
        try:
            info = HfApi().repo_info(hub_id, revision=revision, repo_type=kind, expand="sha")
            return str(info.sha), "at this moment"
        except RevisionNotFoundError:  # the Hub knows no starts of commits
            commits = [commit.commit_id for commit in HfApi().list_repo_commits(hub_id, repo_type=kind)]
            found = [commit for commit in commits if start and commit.startswith(start)]
            if len(found) != 1:
                raise
            return found[0], "in its history"
    except HFValidationError as error:
        raise _no_id(hub_id) from error
    except (HTTPError, OSError) as error:
        if commit := _cached_commit(hub_id, revision, start, kind):
            return commit, "in the Hub cache"
        reason, remedy = _refusal(error) or _unreachable(error)
        raise StageError(
            f"{hub_id}: expected a commit of 40 hexadecimal digits as revision, got {revision!r}, and "
            f"{reason}; {remedy}"
        ) from error


def _cached_commit(hub_id: str, revision: str, start: str | None, kind: Kind) -> str | None:
    folder = cache_folder(hub_id, kind)
    reference = folder / "refs" / revision
    if ".." not in reference.parts and reference.is_relative_to(folder) and reference.is_file():
        return reference.read_text().strip()
    found = [path.name for path in folder.glob(f"snapshots/{start}*")] if start else []
    return found[0] if len(found) == 1 else None


def _refusal(error: BaseException) -> tuple[str, str] | None:
    """Why the Hub could not be asked, and the remedy; None where something else went wrong."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    match error:
        case LocalEntryNotFoundError() if error.__cause__:
            return _refusal(error.__cause__)
        case RevisionNotFoundError():
            return "the repository has no such revision", "take a commit from its history"
        case GatedRepoError():
            return "the repository is gated", "accept its conditions on its page, then run `hf auth login`"
        case RepositoryNotFoundError():
            return (
                "the repository does not exist or is private",
                "check the id; for a private one run `hf auth login`",
            )
        case OfflineModeIsEnabled():
            return "HF_HUB_OFFLINE is set", f"unset it where there is a network, or {_FILL}"
    return None


def _unreachable(error: Exception) -> tuple[str, str]:
    return f"the Hub cannot be reached ({error})", f"check the network, or {_FILL}"


def _no_id(hub_id: str) -> StageError:
    return StageError(
        f"{hub_id}: expected the id of a repository, owner/name, with letters, digits, - _ and ."
    )


def _listed(hub_id: str, revision: str, kind: Kind) -> dict[str, int]:
    """path -> bytes of a commit that was listed before; empty if it was not."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = get_cached_repo_tree(hub_id, revision=revision, repo_type=kind)
    except CachedRepoTreeNotFoundError:
        return {}
    return {file.path: file.size for file in tree}


def _snapshot(hub_id: str, revision: str, kind: Kind, **options: Any) -> str:
    """The folder of a commit in the cache, with none but the files that ``options`` name brought there."""
    from huggingface_hub import snapshot_download

    options = {"allow_patterns": [], "tqdm_class": silent_bar(), **options}
    return snapshot_download(hub_id, revision=revision, repo_type=kind, **options)
