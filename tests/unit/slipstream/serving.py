"""A real gRPC server on a free loopback port, for the scripted services of these tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc


@contextmanager
def serving(add: Callable[[grpc.Server], None], *, threads: int) -> Iterator[str]:
    """Serve what `add` adds to the server; yields the address."""
    with ThreadPoolExecutor(max_workers=threads) as executor:
        server = grpc.server(executor)
        add(server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            server.stop(grace=None).wait(5)
