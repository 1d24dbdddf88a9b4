"""A Hub on the loopback interface that takes uploads: repositories, branches, commits, large file storage."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from tests.hub import answering

TOKEN = "hf_of_this_test"
LARGE = 5000  # bytes; what is smaller travels in the commit


@dataclass
class UploadHub:
    """What was uploaded, and what is refused.

    Attributes:
        files: (owner/name, branch) -> path -> content.
        private: owner/name -> whether it was created so.
        stored: SHA-256 -> content, in large file storage.
        refusals: part of a request's path -> status that answers it.
        num_commits: that were made.
    """

    endpoint: str
    files: dict[tuple[str, str], dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    refusals: dict[str, int] = field(default_factory=dict)
    num_commits: int = 0


@contextlib.contextmanager
def taking_uploads(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[UploadHub]:
    """A Hub to which `huggingface_hub` of this process talks, and a user's home without a token."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = UploadHub(f"http://127.0.0.1:{server.server_port}")
    server.hub = hub  # type: ignore[attr-defined]
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with answering(server, hub.endpoint, home, monkeypatch):
        yield hub


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> UploadHub:
        return self.server.hub  # type: ignore[attr-defined]

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._send({}, 404)

    def do_PUT(self) -> None:
        content = self._body()
        self.hub.stored[hashlib.sha256(content).hexdigest()] = content
        self._send({})

    def do_POST(self) -> None:
        path = urllib.parse.unquote(self.path.split("?")[0])
        body = self._body()
        for part, status in self.hub.refusals.items():
            if part in path:
                return self._send({"error": "refused"}, status)
        if path == "/api/validate-yaml":
            return self._send({"errors": [], "warnings": []})
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self._send({"error": "Invalid credentials"}, 401)
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        parts = path.strip("/").split("/")
        if parts[0] != "api":  # owner/name.git/info/lfs/objects/batch
            return self._batch(json.loads(body))
        repository, verb, branch = "/".join(parts[2:4]), parts[4], "/".join(parts[5:])
        if verb == "branch":
            known = self.hub.files.get((repository, branch))
            self.hub.files.setdefault((repository, branch), dict(self.hub.files[repository, "main"]))
            return self._send({}, 409 if known is not None else 201)
        if (repository, branch) not in self.hub.files:
            return self._send({"error": "no such revision"}, 404)
        if verb == "preupload":
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= LARGE else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self._send({"files": modes})
        return self._commit(repository, branch, body)

    def _create(self, asked: dict[str, Any]) -> None:
        repository = f"{asked['organization']}/{asked['name']}"
        known = repository in self.hub.private
        self.hub.private.setdefault(
            repository, asked.get("visibility") == "private" or bool(asked.get("private"))
        )
        self.hub.files.setdefault((repository, "main"), {})
        self._send({"url": f"{self.hub.endpoint}/{repository}"}, 409 if known else 200)

    def _batch(self, asked: dict[str, Any]) -> None:
        objects = []
        for each in asked["objects"]:
            upload = {"upload": {"href": f"{self.hub.endpoint}/storage/{each['oid']}"}}
            known = each["oid"] in self.hub.stored
            objects.append(
                {"oid": each["oid"], "size": each["size"], **({} if known else {"actions": upload})}
            )
        self._send({"objects": objects, "transfer": "basic"})

    def _commit(self, repository: str, branch: str, body: bytes) -> None:
        files = self.hub.files[repository, branch]
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
        self.hub.num_commits += 1
        url = f"{self.hub.endpoint}/{repository}/commit/{self.hub.num_commits:040x}"
        self._send({"commitUrl": url, "commitOid": f"{self.hub.num_commits:040x}"})

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        found = b""
        while size := int(self.rfile.readline(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def _send(self, value: Any, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
