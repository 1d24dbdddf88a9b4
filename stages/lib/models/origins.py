"""Where a base comes from: a directory of this machine, or a repository of the Hub."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stages.lib.core.paths import BASE
from stages.lib.frame.errors import StageError
from stages.lib.models.layout import (
    CLIP,
    COMPONENTS,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DirectoryOrigin:
    """A diffusers directory on this machine."""

    root: Path
    paths: frozenset[str]

    def __str__(self) -> str:
        return str(self.root)

    def fetch(self, paths: Iterable[str]) -> Path:
        """The directory under which ``paths`` lie."""
        return self.root


@dataclass(frozen=True)
class HubOrigin:
    """A commit of a Hub repository, through the Hub cache of this machine."""

    hub_id: str
    revision: str
    paths: frozenset[str]
    cached: Path | None  # the snapshot to use because the Hub itself cannot be asked

    def __str__(self) -> str:
        return f"{self.hub_id}@{self.revision[:8]}" + (" in the Hub cache" if self.cached else "")

    def fetch(self, paths: Iterable[str]) -> Path:
        """Download what the cache lacks of ``paths``; an interrupted download continues where it stopped."""
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HTTPError, XetDownloadError

        if self.cached:
            return self.cached
        try:
            return Path(snapshot_download(self.hub_id, revision=self.revision, allow_patterns=sorted(paths)))
        except (HTTPError, OSError, XetDownloadError) as error:
            raise StageError(
                f"{self}: download stopped: {error}; run `dvc repro fetch_base` again, it continues there"
            ) from error


Origin = DirectoryOrigin | HubOrigin


def open_origin(kind: str, directory: str | None, hub_id: str | None, revision: str | None) -> Origin:
    """List what a source holds.

    Raises:
        StageError: if it does not exist, or cannot be reached and is not in the Hub cache.
    """
    if kind == "directory":
        if not directory:
            raise StageError(f"fetch_base: source directory needs a path, got {directory!r}")
        root = Path(directory)
        if not root.is_dir():
            raise StageError(f"{root}: not found; expected a diffusers directory")
        if root.resolve().is_relative_to(BASE.resolve()):
            raise StageError(f"{root}: is what this stage writes, and DVC removes it first; name another")
        return DirectoryOrigin(root, _listing(root))
    if hub_id is None or revision is None:
        raise StageError(
            "fetch_base: source hub needs a repository id and a revision of 40 hexadecimal digits"
        )
    return _open_hub(hub_id, revision)


def _open_hub(hub_id: str, revision: str) -> HubOrigin:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    try:
        paths = HfApi().list_repo_files(hub_id, revision=revision)
        return HubOrigin(hub_id, revision, frozenset(paths), cached=None)
    except (HTTPError, OSError) as error:
        reason, remedy = _hub_refusal(error)
        # A commit never changes: what an earlier run has downloaded serves as well.
        try:
            cached = Path(
                snapshot_download(hub_id, revision=revision, local_files_only=True, allow_patterns=[])
            )
        except LocalEntryNotFoundError:
            raise StageError(
                f"{hub_id} at {revision}: {reason}, and the Hub cache does not hold it; {remedy}"
            ) from error
    logger.warning("%s: %s; using the Hub cache", hub_id, reason)
    return HubOrigin(hub_id, revision, _listing(cached), cached)


def _hub_refusal(error: Exception) -> tuple[str, str]:
    """Why the Hub could not be asked, and the remedy."""
    from huggingface_hub.errors import (
        GatedRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    fill = "fill the Hub cache on a machine that has one (HF_HOME)"
    match error:
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
            return "HF_HUB_OFFLINE is set", f"unset it where there is a network, or {fill}"
    return f"the Hub cannot be reached ({error})", f"check the network, or {fill}"


def _listing(root: Path) -> frozenset[str]:
    """Files of ``root`` and of the component directories in it, as relative POSIX paths."""
    folders = [root, *(root / component for component in (*COMPONENTS, CLIP))]
    files = [path for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_file()]
    return frozenset(path.relative_to(root).as_posix() for path in files)
