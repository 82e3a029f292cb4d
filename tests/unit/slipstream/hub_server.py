"""A server that speaks as much of the Hugging Face hub's HTTP as its client needs to list and fetch one repository."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Hub:
    """One repository.

    Attributes:
        files: name to content; lied: names whose content is served with a byte changed.
        fetched: names of files whose content was asked for.
    """

    repo: str
    files: dict[str, bytes]
    url: str = ""
    lied: set[str] = field(default_factory=set)
    fetched: list[str] = field(default_factory=list)

    def information(self) -> bytes:
        siblings = [
            {"rfilename": name, "size": len(content)}
            | (
                {"lfs": {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 1}}
                if name.endswith(".safetensors")
                else {}
            )
            for name, content in self.files.items()
        ]
        return json.dumps({"id": self.repo, "modelId": self.repo, "sha": COMMIT, "siblings": siblings}).encode()

    def tree(self) -> bytes:
        rows = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in self.files.items()]
        return json.dumps(rows).encode()

    def content(self, name: str) -> bytes:
        content = self.files[name]
        return bytes([content[0] ^ 1]) + content[1:] if name in self.lied else content


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            name = path.rpartition("/")[2]
            if path.startswith(f"/api/models/{hub.repo}/tree/"):
                self._send(hub.tree(), "tree", body=body)
            elif path == f"/api/models/{hub.repo}" or path.startswith(f"/api/models/{hub.repo}/revision/"):
                self._send(hub.information(), "information", body=body)
            elif path.startswith(f"/{hub.repo}/resolve/") and name in hub.files:
                if body:
                    hub.fetched.append(name)
                self._send(hub.content(name), hashlib.sha256(hub.files[name]).hexdigest(), body=body)
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "RepoNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()

        def _send(self, content: bytes, etag: str, *, body: bool) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{etag}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        hub.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()
