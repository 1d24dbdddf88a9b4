"""Downloads from the Hugging Face Hub into its cache, which go on where an earlier process stopped.

`huggingface_hub` begins a file again that its process did not finish. Here a large file grows in the cache
under the name of its hash, and is compared with that before it counts; every program that knows the cache
finds it there.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from re import fullmatch
from typing import IO, Any, Literal

from stages.lib.core.sums import hash_file
from stages.lib.frame.progress import progress_bar

Kind = Literal["model", "dataset"]
CONTINUED_BYTES = 2**24  # what is smaller begins again
_SHOWN_BYTES = 2**20  # what is smaller is soon there
_THREADS = 8


def download(hub_id: str, revision: str, kind: Kind, sizes: Mapping[str, int]) -> None:
    """Bring files into the Hub cache, several at a time; the first error ends all of them.

    Args:
        hub_id: owner/name.
        revision: the commit.
        kind: of the repository.
        sizes: path -> bytes.
    """
    stopped = threading.Event()
    num_bytes = sum(sizes.values())
    with (
        progress_bar(f"download of {hub_id}", "B", num_bytes, enabled=num_bytes >= _SHOWN_BYTES) as progress,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        progress.unit_scale = True
        bar = silent_bar(progress.update)

        def fetch(path: str) -> None:
            from huggingface_hub import hf_hub_download

            if sizes[path] >= CONTINUED_BYTES:
                _continue(hub_id, revision, kind, path, stopped, bar)
            hf_hub_download(hub_id, path, repo_type=kind, revision=revision, tqdm_class=bar)

        downloads = [pool.submit(fetch, path) for path in sizes]
        try:
            for done in as_completed(downloads):
                done.result()
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)


def cache_folder(hub_id: str, kind: Kind) -> Path:
    """Where the Hub cache keeps a repository."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    return Path(constants.HF_HUB_CACHE).expanduser() / repo_folder_name(repo_id=hub_id, repo_type=kind)


def silent_bar(count: Callable[[float], object] | None = None) -> type:
    """A bar for `huggingface_hub` that shows nothing, and tells ``count`` how many bytes have come."""
    from tqdm import tqdm

    class Silent(tqdm):  # type: ignore[type-arg]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*arguments, **{**options, "disable": True})
            self.update(options.get("initial"))

        def update(self, n: float | None = 1) -> None:
            if count and n:
                count(n)

        def update_transfer(self, n: float | None = 1) -> None:
            """Bytes on the wire: `update` counts those of the file."""

    return Silent


def _continue(hub_id: str, revision: str, kind: Kind, path: str, stopped: threading.Event, bar: type) -> None:
    """Put a file of large file storage into the cache, from where an earlier download of it stopped."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.constants import MAX_HTTP_DOWNLOAD_SIZE
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import WeakFileLock, build_hf_headers

    url = hf_hub_url(hub_id, path, repo_type=kind, revision=revision)
    metadata = get_hf_file_metadata(url, retry_on_errors=True)
    digest, size = metadata.etag or "", metadata.size or 0
    if not fullmatch("[0-9a-f]{64}", digest) or size > MAX_HTTP_DOWNLOAD_SIZE:
        return
    folder = cache_folder(hub_id, kind)
    blob = folder / "blobs" / digest
    partial = blob.with_name(f"{digest}.incomplete")
    lock = folder.parent / ".locks" / folder.name / f"{digest}.lock"  # that of huggingface_hub
    for directory in (blob.parent, lock.parent):
        directory.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if blob.exists():
            return
        with open(partial, "ab") as file:
            if file.tell() > size:
                file.truncate(0)
                file.seek(0)
            target: Any = _Stoppable(file, stopped)
            there, headers = file.tell(), build_hf_headers()
            http_get(url, target, resume_size=there, headers=headers, expected_size=size, tqdm_class=bar)
        if hash_file(partial) != digest:
            partial.unlink()
            raise OSError(f"{path}: what came has not the hash that the Hub names, and was removed")
        partial.replace(blob)


class _Stoppable:
    """A file to write, until ``stopped`` is set."""

    def __init__(self, file: IO[bytes], stopped: threading.Event) -> None:
        self._file, self._stopped = file, stopped
        self.tell, self.seek, self.truncate = file.tell, file.seek, file.truncate

    def write(self, chunk: bytes) -> int:
        if self._stopped.is_set():
            raise InterruptedError("another download has failed")
        return self._file.write(chunk)
