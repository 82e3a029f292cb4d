"""What the images' HEALTHCHECK says of processes that are well, unwell, or not there."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from prometheus_client import CollectorRegistry, make_wsgi_app

from deploy.images.healthcheck import main
from slipstream.metrics_server import MetricsHttpServer
from slipstream.security import identity
from slipstream.security.names import ComponentRole
from tests.support.certificates import an_authority

Status = health_pb2.HealthCheckResponse.ServingStatus


@contextmanager
def grpc_server(status: health_pb2.HealthCheckResponse.ServingStatus.ValueType) -> Iterator[int]:
    server = grpc.server(ThreadPoolExecutor(1))
    checks = health.HealthServicer()
    checks.set("", status)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


@contextmanager
def http_server(status: int) -> Iterator[str]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/health/live"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(("status", "verdict"), [(Status.SERVING, 0), (Status.NOT_SERVING, 1)])
def test_a_control_plane_is_asked_over_grpc(
    status: health_pb2.HealthCheckResponse.ServingStatus.ValueType, verdict: int
) -> None:
    with grpc_server(status) as port:
        assert main(["grpc", f"127.0.0.1:{port}"]) == verdict


def test_a_worker_is_asked_where_its_environment_says_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    with grpc_server(Status.SERVING) as port:
        monkeypatch.setenv("SLIPSTREAM_WORKER__HOST", "127.0.0.1")
        monkeypatch.setenv("SLIPSTREAM_WORKER__PORT", str(port))
        assert main(["worker"]) == 0
    assert main(["worker"]) == 1


@pytest.mark.parametrize(("status", "verdict"), [(200, 0), (503, 1)])
def test_a_frontend_is_asked_over_http(status: int, verdict: int) -> None:
    with http_server(status) as url:
        assert main(["http", url]) == verdict
    assert main(["http", url]) == 1


def test_a_follower_is_asked_over_tls_with_the_certificate_that_is_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a pod has it: a Secret's files, and metrics that are read with a certificate only."""
    settings, mounted = an_authority(tmp_path / "made"), tmp_path / "mounted"
    mounted.mkdir()
    for made, name in (("ca.pem", "ca.crt"), ("worker.pem", "tls.crt"), ("worker-key.pem", "tls.key")):
        shutil.copy(tmp_path / "made" / made, mounted / name)
    with identity.installed(settings, ComponentRole.WORKER):
        server = MetricsHttpServer("127.0.0.1", 0, make_wsgi_app(CollectorRegistry()))
    try:
        url = server.url.replace("127.0.0.1", "$POD_IP")
        monkeypatch.setenv("POD_IP", "127.0.0.1")
        assert main(["http", url, str(mounted)]) == 0
        assert main(["http", url]) == 1, "without a certificate"
        assert main(["http", url, str(tmp_path)]) == 1, "without files"
    finally:
        server.close()
    assert main(["http", url, str(mounted)]) == 1


def test_other_words_are_refused() -> None:
    assert main(["telepathy"]) == 2
