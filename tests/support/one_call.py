"""One request over a stream of its own, for tests of a worker's services: its events until the last."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping

import grpc.aio

from slipstream.grpc_errors import from_failure
from slipstream.v1.worker_pb2 import (
    DecodeCommands,
    DecodeEvent,
    DecodeRequest,
    PrefillCommands,
    PrefillEvent,
    PrefillRequest,
)
from slipstream.v1.worker_pb2_grpc import DecodeWorkerStub, PrefillWorkerStub


async def decode(
    channel: grpc.aio.Channel, request: DecodeRequest, trace: Mapping[str, str] | None = None
) -> AsyncIterator[DecodeEvent]:
    """Raises the worker's error."""
    request.trace.update(trace or {})
    stream = DecodeWorkerStub(channel).DecodeMany(iter([DecodeCommands(start=[request])]))
    async for message in stream:
        for event in message.events:
            if event.HasField("failure"):
                raise from_failure(event.failure)
            yield event


async def prefill(
    channel: grpc.aio.Channel, request: PrefillRequest, trace: Mapping[str, str] | None = None
) -> AsyncIterator[PrefillEvent]:
    """Raises the worker's error."""
    request.trace.update(trace or {})
    stream = PrefillWorkerStub(channel).PrefillMany(iter([PrefillCommands(start=[request])]))
    try:
        async for message in stream:
            for event in message.events:
                if event.HasField("failure"):
                    raise from_failure(event.failure)
                yield event
    finally:
        stream.cancel()
