"""As much of a Kubernetes API server as Helm's `lookup` of a Secret asks for, in a thread."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

_SECRETS = {
    "kind": "APIResourceList",
    "groupVersion": "v1",
    "resources": [
        {"name": "secrets", "singularName": "secret", "namespaced": True, "kind": "Secret", "verbs": ["get"]},
    ],
}


@contextmanager
def secrets_served(namespace: str, secrets: Mapping[str, Mapping[str, str]], folder: Path) -> Iterator[Path]:
    """A kubeconfig of a server that has these Secrets' data, by their names; as the mapping is at each question."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            name = path.removeprefix(f"/api/v1/namespaces/{namespace}/secrets/")
            if path == "/api/v1":
                self._say(200, _SECRETS)
            elif name in secrets:
                metadata = {"name": name, "namespace": namespace}
                self._say(200, {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": secrets[name]})
            else:
                reason = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
                self._say(404, reason | {"message": f"{path} not found"})

        def _say(self, status: int, body: Mapping[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield _kubeconfig(folder / "kubeconfig", f"http://127.0.0.1:{server.server_port}")
        finally:
            server.shutdown()
            thread.join(10)


def _kubeconfig(path: Path, url: str) -> Path:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "fake", "cluster": {"server": url}}],
        "users": [{"name": "nobody", "user": {}}],
        "contexts": [{"name": "here", "context": {"cluster": "fake", "user": "nobody"}}],
    }
    path.write_text(yaml.safe_dump(config))
    return path
