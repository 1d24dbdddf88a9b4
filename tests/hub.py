"""A Hub on the loopback interface: repositories at commits, downloads that can be cut, refusals.

It answers what `huggingface_hub` asks: the commit of a revision, the tree of a commit, HEAD and GET of a
file, with Range. Files of `LARGE` bytes and more are in large file storage, behind a redirect to another
host, as on the Hub.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub
import pytest
from huggingface_hub import constants

LARGE = 1000  # bytes
COMMIT = "0123456789abcdef0123456789abcdef01234567"
_ATTRIBUTES = ".gitattributes"  # in every repository of the Hub
_URL_TEMPLATE = "/{repo_id}/resolve/{revision}/{filename}"


class Asked(NamedTuple):
    """One request: of a file it is the file's path."""

    method: str
    path: str
    first_byte: int
    token: str | None


@dataclass
class Hub:
    """What is served, what was asked, and what goes wrong.

    Attributes:
        files: "models/owner/name" or "datasets/owner/name" -> commit -> path -> content.
        refs: (repository, branch or tag) -> commit.
        asked: every request, in order.
        cut_after: path -> bytes of each answer after which the connection ends.
        only_once: paths of which no byte comes a second time.
        refusal: (status, X-Error-Code) for every question about a repository; (0, "") ends the connection.
        honest: False sends other bytes than those of the hash.
        pause: seconds after each 1000 bytes of a large file.
    """

    endpoint: str
    cache: Path
    files: dict[str, dict[str, Mapping[str, bytes]]] = field(default_factory=dict)
    refs: dict[tuple[str, str], str] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    cut_after: dict[str, int] = field(default_factory=dict)
    only_once: set[str] = field(default_factory=set)
    refusal: tuple[int, str] | None = None
    honest: bool = True
    pause: float = 0

    def add(
        self, repository: str, files: Mapping[str, bytes] | Path, commit: str = COMMIT, branch: str = "main"
    ) -> None:
        """Serve files, or those of a folder, as a commit and what a branch points to."""
        if isinstance(files, Path):
            files = {
                path.relative_to(files).as_posix(): path.read_bytes()
                for path in sorted(files.rglob("*"))
                if path.is_file()
            }
        self.files.setdefault(repository, {})[commit] = {_ATTRIBUTES: b"* -text\n", **files}
        self.refs[repository, branch] = commit

    def downloaded(self) -> set[str]:
        """Paths of the files whose bytes were asked for."""
        found = {asked.path for asked in self.asked if asked.method == "GET"}
        return {path for path in found if not path.startswith("/api/")} - {_ATTRIBUTES}


@contextlib.contextmanager
def serving(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub to which `huggingface_hub` of this process talks, with a cache of its own."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = Hub(f"http://127.0.0.1:{server.server_port}", cache)
    server.hub = hub  # type: ignore[attr-defined]
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + _URL_TEMPLATE)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    with answering(server, hub.endpoint, cache, monkeypatch):
        yield hub


@contextlib.contextmanager
def answering(
    server: http.server.ThreadingHTTPServer, endpoint: str, home: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Within the block a server answers, and it is the Hub for `huggingface_hub` of this process."""
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(home / "agent_harnesses.json"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        huggingface_hub.close_session()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = [urllib.parse.unquote(part) for part in self.path.split("?")[0].strip("/").split("/")]
        if parts[0] == "cdn":
            return self._send_content("/".join(parts[5:]), "/".join(parts[1:4]), parts[4])
        if parts == ["api", "agent-harnesses"]:  # asked once a process, about no repository
            return self._refuse(404, "")
        is_api = parts[0] == "api"
        if is_api:
            parts = parts[1:]
        elif parts[0] != "datasets":
            parts = ["models", *parts]
        repository, path = "/".join(parts[:3]), "/".join(parts[5:])
        verb, revision = parts[3:5] or ("", "main")
        if is_api:
            self._note(f"/api/{verb}")
        if self.hub.refusal:
            return self._refuse(*self.hub.refusal)
        if repository not in self.hub.files:
            return self._refuse(401, "RepoNotFound")
        commits = self.hub.files[repository]
        if verb == "commits":
            return self._send_json(
                [
                    {
                        "id": each,
                        "title": "",
                        "message": "",
                        "date": "2026-01-01T00:00:00.000Z",
                        "authors": [],
                    }
                    for each in commits
                ]
            )
        commit = self.hub.refs.get((repository, revision), revision)
        if commit not in commits:
            return self._refuse(404, "RevisionNotFound")
        if is_api and verb in ("", "revision"):
            return self._send_json({"id": repository.split("/", 1)[1], "_id": "0", "sha": commit})
        if is_api and verb == "tree":
            return self._send_json([_entry(path, content) for path, content in commits[commit].items()])
        if path not in commits[commit]:
            return self._refuse(404, "EntryNotFound")
        return self._send_file(repository, commit, path)

    def _note(self, path: str, first_byte: int = 0) -> None:
        self.hub.asked.append(Asked(self.command, path, first_byte, self.headers.get("authorization")))

    def _refuse(self, status: int, code: str) -> None:
        if not status:
            self.close_connection = True
            return
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_json(self, value: Any) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _send_file(self, repository: str, commit: str, path: str) -> None:
        content = self.hub.files[repository][commit][path]
        if len(content) < LARGE:
            return self._send_content(path, repository, commit)
        if self.command == "HEAD":
            self._note(path)
        self.send_response(302)
        elsewhere = self.hub.endpoint.replace("127.0.0.1", "localhost")
        self.send_header("Location", f"{elsewhere}/cdn/{repository}/{commit}/{urllib.parse.quote(path)}")
        self.send_header("X-Repo-Commit", commit)
        self.send_header("X-Linked-Etag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _send_content(self, path: str, repository: str, commit: str) -> None:
        content = self.hub.files[repository][commit][path]
        wanted = self.headers.get("range", "bytes=0-").removeprefix("bytes=").split("-")
        first, last = int(wanted[0]), int(wanted[1] or len(content) - 1)
        self._note(path, first)
        self.send_response(206 if first else 200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{_oid(content)}"')
        self.send_header("Content-Length", str(last + 1 - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        sent = content[first : last + 1] if self.hub.honest else bytes(last + 1 - first)
        cut = self.hub.cut_after.get(path, len(sent))
        if first and path in self.hub.only_once:
            cut = 0
        step = LARGE if self.hub.pause and len(content) >= LARGE else max(cut, 1)
        with contextlib.suppress(ConnectionError):  # who asked is gone
            for start in range(0, cut, step):
                self.wfile.write(sent[start : min(start + step, cut)])
                threading.Event().wait(self.hub.pause)
        self.close_connection = cut < len(sent)


def _oid(content: bytes) -> str:
    """What git calls it."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _oid(content)}
    if len(content) >= LARGE:
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry
