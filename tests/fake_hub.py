"""A hub on this machine: what `snapshot_download` uses of the Hugging Face hub's HTTP interface, and its failures."""

import hashlib
import json
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class FakeHub:
    """Serves the directories in `repositories[model id][revision]`; use as a context manager.

    `gated` ids answer 403, `failing` makes every answer that status, `cut` maps a file name to the number of times its
    download breaks off half-way, and downloads of the files in `broken_after_cut` answer 500 from then on. `requests`
    lists what was asked, as "METHOD path".
    """

    def __init__(self, repositories: Mapping[str, Mapping[str, Path]]):
        self.repositories = repositories
        self.gated: set[str] = set()
        self.failing: int | None = None
        self.cut: dict[str, int] = {}
        self.broken_after_cut: set[str] = set()
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FakeHub":
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def commit_of(directory: Path) -> str:
    """A commit hash: the same for the same files."""
    digest = hashlib.sha1()
    for file in sorted(directory.iterdir()):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    """GET /api/models/ID[/revision/R], GET /api/models/ID/tree/R, HEAD and GET /ID/resolve/R/FILE."""

    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if self.hub.failing is not None:
            return self._refuse(self.hub.failing, None, "the hub is out of order")
        api, parts = path.startswith("/api/models/"), path.removeprefix("/api/models/").strip("/").split("/")
        repo, verb, rest = "/".join(parts[:2]), (parts[2] if len(parts) > 2 else "revision"), parts[3:] or ["main"]
        if repo not in self.hub.repositories:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        if repo in self.hub.gated and verb == "resolve":
            return self._refuse(403, "GatedRepo", f"Access to model {repo} is restricted")
        directory = self._directory(repo, rest[0])
        if directory is None:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {rest[0]}")
        if api:
            return self._json(_tree(directory) if verb == "tree" else _info(repo, directory))
        return self._file(directory, "/".join(rest[1:]))

    def _directory(self, repo: str, revision: str) -> Path | None:
        branches = self.hub.repositories[repo]
        by_commit = {commit_of(directory): directory for directory in branches.values()}
        return branches.get(revision) or by_commit.get(revision)

    def _file(self, directory: Path, name: str) -> None:
        if not (directory / name).is_file():
            return self._refuse(404, "EntryNotFound", "Entry not found")
        if self.command == "GET" and name in self.hub.broken_after_cut and self.hub.cut.get(name) == 0:
            return self._refuse(500, None, "the storage is out of order")
        body = (directory / name).read_bytes()
        headers = {"ETag": f'"{_etag(body)}"', "X-Repo-Commit": commit_of(directory), "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted is None:
            return self._send(200, body, headers, cut=self._cut(name))
        start = int(wanted.removeprefix("bytes=").split("-")[0])
        headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        return self._send(206, body[start:], headers, cut=self._cut(name))

    def _cut(self, name: str) -> bool:
        left = self.hub.cut.get(name, 0)
        if self.command == "GET" and left:
            self.hub.cut[name] = left - 1
        return self.command == "GET" and left > 0

    def _refuse(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str], cut: bool = False) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True


def _etag(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _info(repo: str, directory: Path) -> dict[str, object]:
    siblings = [{"rfilename": file.name} for file in sorted(directory.iterdir())]
    return {
        "id": repo,
        "modelId": repo,
        "sha": commit_of(directory),
        "siblings": siblings,
        "private": False,
        "tags": [],
    }


def _tree(directory: Path) -> list[dict[str, object]]:
    return [
        {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _etag(file.read_bytes())[:40]}
        for file in sorted(directory.iterdir())
    ]
