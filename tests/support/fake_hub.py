"""A Hugging Face hub on loopback: repositories of folders, with commits and branches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit


@dataclass
class FakeHub:
    """Folders by repository and revision; `branches` have moved on to another of these.

    `downloads` are the files that were asked for.
    """

    folders: dict[tuple[str, str], Path]
    branches: dict[tuple[str, str], str] = field(default_factory=dict)
    url: str = ""
    downloads: list[str] = field(default_factory=list)

    def commit(self, repository: str, revision: str) -> str | None:
        """Of a branch, or of a commit itself."""
        commits = {name: commit_of(repository, name) for owner, name in self.folders if owner == repository}
        moved = self.branches.get((repository, revision), revision)
        return revision if revision in commits.values() else commits.get(moved)

    def folder(self, repository: str, commit: str) -> Path:
        """The files of a commit."""
        return next(
            path for (owner, name), path in self.folders.items()
            if owner == repository and commit_of(repository, name) == commit
        )  # fmt: skip


def commit_of(repository: str, revision: str) -> str:
    """A hash as git's."""
    return hashlib.sha1(f"{repository}@{revision}".encode()).hexdigest()


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Answers on loopback until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""

    def _answer(self) -> None:
        words = urlsplit(self.path).path.strip("/").split("/")
        api = words[:2] == ["api", "models"]
        words = words[2:] if api else words
        repository, kind, revision = "/".join(words[:2]), words[2], words[3]
        if not any(owner == repository for owner, _ in self.hub.folders):
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        if repository.startswith("gated/"):
            return self._send(403, b"", {"X-Error-Code": "GatedRepo"})
        commit = self.hub.commit(repository, revision)
        if commit is None:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        folder = self.hub.folder(repository, commit)
        if not api:
            return self._send_file(folder, "/".join(words[4:]), commit)
        listing = [_entry(folder, path) for path in sorted(folder.rglob("*")) if path.is_file()]
        info = {"id": repository, "sha": commit, "siblings": [{"rfilename": one["path"]} for one in listing]}
        return self._send(200, json.dumps(listing if kind == "tree" else info).encode(), {})

    def _send_file(self, folder: Path, name: str, commit: str) -> None:
        data = (folder / name).read_bytes()
        if self.command == "GET":
            self.hub.downloads.append(name)
        self._send(200, data, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


def _entry(folder: Path, path: Path) -> dict[str, object]:
    digest = hashlib.sha1(path.read_bytes()).hexdigest()
    name = path.relative_to(folder).as_posix()
    return {"type": "file", "path": name, "size": path.stat().st_size, "oid": digest}
