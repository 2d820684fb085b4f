"""A stand-in of the Hugging Face Hub: the calls of `HfApi` and `HfFileSystem`, with a store of its own for large files.

Small files travel within commits, others by LFS to the store, on a port of its own as a CDN is; a question for one of
them is sent on there. Nothing is taken without the token, and the store must never see it.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from swarm.digest import sha256

TOKEN = "hf_not_a_real_one"
_REPOSITORY = r"/(?:api/models/)?(?P<repo>[^/]+/[^/]+?)(?:\.git)?"


@dataclass
class Hub:
    """``refuse``: a status for everything; ``is_private``: nothing is read without the token either."""

    url: str = ""
    store_url: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    large_names: set[str] = field(default_factory=set)
    messages: list[str] = field(default_factory=list)
    ranges: list[tuple[str, str]] = field(default_factory=list)
    sent_bytes: int = 0
    passwords: list[str] = field(default_factory=list)
    """what came with questions for files, by those who ask"""
    told_to_store: list[str] = field(default_factory=list)
    card: str = ""
    refuse: int = 0
    is_private: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def files(self, repository: str) -> dict[str, bytes]:
        return self.repositories.get(repository, {})


@contextmanager
def hub_server() -> Iterator[Hub]:
    """The Hub and its store on localhost."""
    hub = Hub()
    servers = [_server(hub, kind) for kind in (_Pages, _Store)]
    hub.url, hub.store_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.02,)) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()


def _server(hub: Hub, kind: type[_Handler]) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type(kind.__name__, (kind,), {"hub": hub}))
    server.daemon_threads = True
    return server


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, value: Any = None, **headers: str) -> None:
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name.replace("_", "-"), text)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def answer_file(self, raw: bytes) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        with self.hub.lock:
            self.hub.ranges.append((unquote(urlsplit(self.path).path), self.headers.get("Range", "")))
        part = raw[int(asked[1]) : int(asked[2]) + 1] if asked else raw
        with self.hub.lock:
            self.hub.sent_bytes += len(part)
        more = {"Content_Range": f"bytes {asked[1]}-{int(asked[1]) + len(part) - 1}/{len(raw)}"} if asked else {}
        self.answer(206 if asked else 200, part, ETag=f'"{sha256(raw).hex()}"', X_Repo_Commit="1" * 40, **more)

    def log_message(self, *arguments: object) -> None:
        pass


class _Store(_Handler):
    """Where large files lie, by their digest."""

    def do_PUT(self) -> None:
        self._hear()
        raw = self.body()
        with self.hub.lock:
            self.hub.blobs[sha256(raw).hex()] = raw
        self.answer(200, {})

    def do_GET(self) -> None:
        self._hear()
        self.answer_file(self.hub.blobs[urlsplit(self.path).path.strip("/")])

    def _hear(self) -> None:
        self.hub.told_to_store += [value for value in self.headers.values() if TOKEN in value]


class _Pages(_Handler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        found = re.fullmatch(
            _REPOSITORY + r"(?:/revision/[^/]+|/(?P<what>tree|resolve)/[^/]+(?:/(?P<name>.*))?)?", path
        )
        if self._is_refused(self.hub.is_private):
            return
        if found is None or found["repo"] not in self.hub.repositories:
            self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        elif found["what"] == "tree":
            self._tree(self.hub.files(found["repo"]), (found["name"] or "").strip("/"))
        elif found["what"] == "resolve":
            self._resolve(found["repo"], found["name"])
        else:
            self.answer(200, {"id": found["repo"], "sha": "1" * 40, "siblings": [], "private": self.hub.is_private})

    def do_POST(self) -> None:
        raw, path = self.body(), urlsplit(self.path).path
        if self._is_refused(True):
            return
        if path == "/api/validate-yaml":
            self.hub.card = json.loads(raw)["content"]
            self.answer(200, {"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            self._create(json.loads(raw))
        elif found := re.fullmatch(_REPOSITORY + r"/(?P<what>preupload/.+|commit/.+|info/lfs/objects/batch)", path):
            if found["repo"] not in self.hub.repositories:
                self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            elif found["what"].startswith("preupload"):
                self._preupload(json.loads(raw))
            elif found["what"].startswith("commit"):
                self._commit(found["repo"], raw)
            else:
                self._batch(json.loads(raw))
        else:
            self.answer(404, {"error": path})

    def _is_refused(self, wants_token: bool) -> bool:
        sent = self.headers.get("Authorization")
        if sent is not None:
            self.hub.passwords.append(sent)
        if self.hub.refuse or (wants_token and sent != f"Bearer {TOKEN}"):
            self.answer(self.hub.refuse or 401, {"error": "no"})
            return True
        return False

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        status = 409 if name in self.hub.repositories else 200
        self.hub.repositories.setdefault(name, {})
        self.answer(status, {"url": f"{self.hub.url}/{name}"})

    def _preupload(self, wanted: dict[str, Any]) -> None:
        files = []
        for file in wanted["files"]:
            is_large = file["path"].endswith(".safetensors")
            mode = "lfs" if is_large else "regular"
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None})
        self.answer(200, {"files": files})

    def _batch(self, wanted: dict[str, Any]) -> None:
        objects = [
            {**one, "actions": {"upload": {"href": f"{self.hub.store_url}/{one['oid']}", "header": {}}}}
            for one in wanted["objects"]
        ]
        self.answer(200, {"transfer": "basic", "objects": objects})

    def _commit(self, repository: str, raw: bytes) -> None:
        files = self.hub.repositories[repository]
        for line in map(json.loads, raw.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                self.hub.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
                self.hub.large_names.add(value["path"])
        self.answer(200, {"commitUrl": f"{self.hub.url}/{repository}/commit/1", "commitOid": "1" * 40})

    def _tree(self, files: dict[str, bytes], folder: str) -> None:
        start = f"{folder}/" if folder else ""
        names = [name for name in files if name.startswith(start)]
        if not names:
            self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            return
        is_recursive = parse_qs(urlsplit(self.path).query).get("recursive") == ["true"]
        entries: dict[str, dict[str, Any]] = {}
        for name in names:
            parts = name.removeprefix(start).split("/")
            for depth in range(1, len(parts)):
                path = start + "/".join(parts[:depth])
                entries[path] = {"type": "directory", "path": path, "size": 0, "oid": "0" * 40}
            entries[name] = {"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40}
        shown = [entry for path, entry in entries.items() if is_recursive or "/" not in path.removeprefix(start)]
        self.answer(200, shown)

    def _resolve(self, repository: str, name: str) -> None:
        raw = self.hub.files(repository).get(name)
        if raw is None:
            self.answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
        elif name in self.hub.large_names:
            self.answer(302, {}, Location=f"{self.hub.store_url}/{sha256(raw).hex()}?sig=1")
        else:
            self.answer_file(raw)
