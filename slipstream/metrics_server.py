"""The HTTP server of a component's /metrics: a thread for each question, over TLS where there is a certificate."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

from prometheus_client.exposition import ThreadingWSGIServer

from slipstream import telemetry
from slipstream.addresses import host_port
from slipstream.security.http_ends import metrics_context

log = telemetry.get_logger(__name__)

StartResponse = Callable[[str, list[tuple[str, str]]], object]
WsgiApp = Callable[[dict[str, Any], StartResponse], Iterable[bytes]]

_SILENCE_S = 10.0
_STOP_POLL_S = 0.05
_STOP_TIMEOUT_S = 5.0


class _QuietHandler(WSGIRequestHandler):
    timeout = _SILENCE_S  # a client that says nothing does not keep its thread

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        """A scrape each few seconds is no news."""


class _Server(ThreadingWSGIServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, or has no certificate, is no reason for a traceback."""
        log.debug("metrics_connection_failed", exc_info=True)


class _Ipv6Server(_Server):
    address_family = socket.AF_INET6


class MetricsHttpServer:
    """Serves from its creation until `close`.

    Attributes:
        url: of /metrics.

    Raises:
        OSError: the port is taken. ConfigError: the certificate cannot be read.
    """

    def __init__(self, host: str, port: int, app: WsgiApp) -> None:
        kind = _Ipv6Server if ":" in host else _Server
        context = metrics_context()
        self._server = make_server(host, port, app, kind, handler_class=_QuietHandler)
        if context is not None:
            # Each connection shakes hands in the thread that serves it: none holds up the others.
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        scheme = "http" if context is None else "https"
        self.url = f"{scheme}://{host_port(host, self._server.server_port)}/metrics"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_STOP_POLL_S,), name="metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=_STOP_TIMEOUT_S)
