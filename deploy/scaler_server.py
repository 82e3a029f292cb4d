"""Where planners in other processes reach a launcher's scaler: the same for every kind of launcher."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from slipstream.errors import StartupError
from slipstream.grpc_channels import server_options
from slipstream.security.servers import create_server_at, listen
from slipstream.v1.scaler_pb2_grpc import ScalerServicer, add_ScalerServicer_to_server

MAX_REQUEST_BYTES = 64 << 10


@asynccontextmanager
async def served(service: ScalerServicer, address: str) -> AsyncIterator[None]:
    """Let planners call the service while the block runs.

    Args:
        address: to listen on, a Unix socket as a rule.

    Raises:
        StartupError: it cannot be listened on.
    """
    server = create_server_at(address, server_options(max_receive_bytes=MAX_REQUEST_BYTES))
    add_ScalerServicer_to_server(service, server)
    try:
        listen(server, address, what="the scaler (planner.scaler)")
    except RuntimeError as error:
        raise StartupError(f"planner.scaler: cannot listen on {address}: {error}") from error
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)
