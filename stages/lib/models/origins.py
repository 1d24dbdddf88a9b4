"""Where a base comes from: a directory or a file of this machine, or a repository of the Hub."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stages.lib.core.hub import Repository, open_repository
from stages.lib.frame.errors import StageError
from stages.lib.models.families.chosen import all_components
from stages.lib.models.layout import CLIP


@dataclass(frozen=True)
class DirectoryOrigin:
    """A diffusers directory on this machine."""

    root: Path
    paths: frozenset[str]
    name: str = ""  # of what it was made from, for a file

    def __str__(self) -> str:
        return self.name or str(self.root)

    def fetch(self, paths: Iterable[str]) -> Path:
        """The directory under which ``paths`` lie."""
        return self.root


@dataclass(frozen=True)
class HubOrigin:
    """A commit of a Hub repository, through the Hub cache of this machine."""

    repository: Repository

    def __str__(self) -> str:
        return str(self.repository)

    @property
    def paths(self) -> frozenset[str]:
        return frozenset(self.repository.sizes)

    @property
    def cached(self) -> Path | None:
        """The snapshot to use because the Hub itself cannot be asked."""
        return self.repository.cached

    def fetch(self, paths: Iterable[str]) -> Path:
        """Download what the cache lacks of ``paths``; an interrupted download continues where it stopped."""
        return self.repository.fetch(paths)


Origin = DirectoryOrigin | HubOrigin


def open_origin(kind: str, directory: str | None, hub_id: str | None, revision: str | None) -> Origin:
    """List what a source holds.

    Raises:
        StageError: if it does not exist, or cannot be reached and is not in the Hub cache.
    """
    if kind == "directory":
        if not directory:
            raise StageError(f"fetch_base: source directory needs a path, got {directory!r}")
        root = Path(directory).expanduser()
        if not root.is_dir():
            raise StageError(f"{root}: not found; expected a diffusers directory")
        return DirectoryOrigin(root, _listing(root))
    if hub_id is None or revision is None:
        raise StageError(
            "fetch_base: source hub needs a repository id and a revision of 40 hexadecimal digits"
        )
    return HubOrigin(open_repository(hub_id, revision, "model"))


def listed_directory(root: Path, name: str) -> DirectoryOrigin:
    """A directory that was made from something else, under the name of that."""
    return DirectoryOrigin(root, _listing(root), name)


def _listing(root: Path) -> frozenset[str]:
    """Files of ``root`` and of the component directories in it, as relative POSIX paths."""
    folders = [root, *(root / component for component in (*all_components(), CLIP))]
    files = [path for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_file()]
    return frozenset(path.relative_to(root).as_posix() for path in files)
