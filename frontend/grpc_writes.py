"""Writing to a gRPC client, which may not read."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio

from slipstream.errors import CancelledByClientError


async def write_within(context: grpc.aio.ServicerContext[Any, Any], message: Any, timeout_s: float) -> None:
    """Write a message; it waits for room in what the client has agreed to take.

    Raises:
        CancelledByClientError: there was none in all this time.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await context.write(message)
    except TimeoutError as error:
        raise CancelledByClientError(
            f"The client took nothing of its answer for {timeout_s:g} s (limits.write_timeout_s)."
        ) from error
