"""A hub on this machine: model folders by id and revision, as huggingface_hub asks for them."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants, hf_api


def use(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path, *, offline: bool = False) -> None:
    """Have huggingface_hub take this address for the hub's, and keep what it fetches here."""
    monkeypatch.setattr(hf_api.api, "endpoint", address)
    values = {"ENDPOINT": address, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": offline}
    values["HUGGINGFACE_CO_URL_TEMPLATE"] = address + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)


def commit_of(revision: str) -> str:
    """The commit that a revision is here."""
    return hashlib.sha1(revision.encode()).hexdigest()


@contextmanager
def hub(revisions: Mapping[str, Path], repository: str = "me/toy") -> Iterator[tuple[str, list[str]]]:
    """Serve folders as the revisions of one repository; gives the address and, as they come, the paths asked for."""
    asked: list[str] = []
    folders = {commit_of(name): folder for name, folder in revisions.items()}
    names = {name: commit_of(name) for name in revisions} | {commit: commit for commit in folders}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].removeprefix("/")
            asked.append(path)
            if path.startswith(f"api/models/{repository}"):
                self._facts(path.removeprefix(f"api/models/{repository}").strip("/").split("/"))
            elif path.startswith(f"{repository}/resolve/"):
                revision, _, name = path.removeprefix(f"{repository}/resolve/").partition("/")
                self._file(names.get(revision, ""), name)
            else:
                self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET  # noqa: N815

        def _facts(self, parts: list[str]) -> None:
            commit = names.get(parts[1] if len(parts) > 1 else "main", "")
            if not commit:
                return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            files = [path for path in sorted(folders[commit].rglob("*")) if path.is_file()]
            listed = [(path.relative_to(folders[commit]).as_posix(), path.stat().st_size) for path in files]
            body: object = {
                "id": repository,
                "sha": commit,
                "siblings": [{"rfilename": name} for name, _ in listed],
                "tags": [],
                "private": False,
            }
            if parts[0] == "tree":
                body = [{"type": "file", "path": name, "size": size, "oid": commit_of(name)} for name, size in listed]
            return self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

        def _file(self, commit: str, name: str) -> None:
            path = folders.get(commit, Path("nowhere")) / name
            if not path.is_file():
                code = "EntryNotFound" if commit else "RevisionNotFound"
                return self._send(404, b"", {"X-Error-Code": code, "X-Repo-Commit": commit})
            data = path.read_bytes()
            return self._send(200, data, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

        def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
