"""One open call to a worker: how its events are read, what its end means, and how it is ended from here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import grpc.aio

from frontend.worker_channels import WorkerChannels
from frontend.worker_failure import FailureKind, WorkerFailure, failure_of
from slipstream.errors import WorkerLostError
from slipstream.v1.registry_pb2 import WorkerRecord
from slipstream.v1.worker_pb2 import DecodeEvent, PrefillEvent

Event = TypeVar("Event", PrefillEvent, DecodeEvent)


class WorkerCall(Generic[Event]):
    """A call that streams events. It is under way once this exists; pair it with one `end`.

    Args:
        begin: makes the call on the worker's channel.
    """

    def __init__(
        self,
        channels: WorkerChannels,
        worker: WorkerRecord,
        begin: Callable[[grpc.aio.Channel], grpc.aio.UnaryStreamCall[Any, Event]],
    ) -> None:
        self.worker = worker
        self._channels = channels
        self._call: grpc.aio.UnaryStreamCall[Any, Event] = begin(channels.acquire(worker.address))
        self._ended = False

    async def read(self) -> Event | None:
        """The next event; None at the call's regular end. Cancelling a read cancels the call.

        Raises:
            WorkerFailure: the call broke.
            InvalidRequestError, RequestTooLargeError: the worker finds the request itself wrong.
        """
        try:
            event = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise failure_of(self.worker, error) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if self._ended or (task is not None and task.cancelling()):
                raise
            # Not this task was cancelled but the call: its channel was closed under it.
            closed = WorkerLostError("the connection was closed")
            raise WorkerFailure(self.worker, FailureKind.LOST, closed) from error
        return None if event is grpc.aio.EOF else cast("Event", event)

    def end(self) -> None:
        """Cancel the call, which aborts on the worker what has not finished. Again is fine; never blocks."""
        if self._ended:
            return
        self._ended = True
        self._call.cancel()
        self._channels.release(self.worker.address)
