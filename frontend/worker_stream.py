"""One gRPC stream to one worker, over which all of this process's requests to it go.

Opened with the first request, and opened anew with the next one when it has broken: then every request on it
fails, as if its own connection had broken. What is sent at the same time travels in one message, and so does
what the worker made at the same time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet
from contextlib import suppress
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

import grpc.aio

from frontend.deadlines import Deadlines
from frontend.worker_call import DecodeCall, Event, PrefillCall, WorkerCall
from frontend.worker_channels import Place, WorkerChannels
from frontend.worker_failure import failure_of
from slipstream.errors import RequestTooLargeError, SlipstreamError, WorkerLostError
from slipstream.grpc_channels import MAX_MESSAGE_BYTES
from slipstream.grpc_errors import from_rpc_error
from slipstream.v1.registry_pb2 import WorkerRecord
from slipstream.v1.worker_pb2 import (
    DecodeCommands,
    DecodeEvent,
    DecodeRequest,
    PrefillCommands,
    PrefillEvent,
    PrefillRequest,
)
from slipstream.v1.worker_pb2_grpc import DecodeWorkerStub, PrefillWorkerStub

Request = TypeVar("Request", PrefillRequest, DecodeRequest)

_MESSAGE_BYTES = 1 << 20
"""About where a message is full: others shall not wait behind one that takes long to read."""

_ROOM_BYTES = 1 << 16
"""Of the largest message, for what is around a request."""


class WorkerStream(Generic[Request, Event]):
    """The stream for one kind of requests.

    Args:
        commands: makes a message.
        method: the call, on a channel.
        deadlines: of the calls.
    """

    def __init__(
        self,
        channels: WorkerChannels,
        place: Place,
        commands: Callable[..., Any],
        method: Callable[[grpc.aio.Channel], Any],
        deadlines: Deadlines,
    ) -> None:
        self.deadlines = deadlines
        self._channels = channels
        self._place = place
        self._commands = commands
        self._method = method
        self._number = 0
        self._calls: dict[int, WorkerCall[Event]] = {}
        self._starting: list[Request] = []
        self._cancelling: list[int] = []
        self._wake = asyncio.Event()
        self._open: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()

    @property
    def idle(self) -> bool:
        """Whether no request is on it."""
        return not self._calls

    def next_number(self) -> int:
        """A name for the next call."""
        self._number += 1
        return self._number

    def start(self, call: WorkerCall[Event], request: Request) -> None:
        """Send a request.

        Raises:
            RequestTooLargeError: it fits into no message.
        """
        size = request.ByteSize()
        if size > MAX_MESSAGE_BYTES - _ROOM_BYTES:
            raise RequestTooLargeError(
                f"The request has {size} bytes as workers get it; {MAX_MESSAGE_BYTES - _ROOM_BYTES} are allowed."
            )
        if self._open is None:
            self._starting, self._cancelling = [], []
            self._open = asyncio.create_task(self._run(), name=f"worker stream {self._place.address}")
        request.call = call.number
        self._calls[call.number] = call
        self._starting.append(request)
        self._wake.set()

    def cancel(self, number: int) -> None:
        """Abort a request."""
        self._cancelling.append(number)
        self._wake.set()

    def leave(self, call: WorkerCall[Event]) -> None:
        """Nothing more is wanted of this call."""
        self._calls.pop(call.number, None)
        self.deadlines.drop(call)

    async def close(self) -> None:
        """End the stream; what is on it fails."""
        if self._open is not None:
            self._open.cancel()
            self._ending.add(self._open)
        await asyncio.gather(*self._ending, return_exceptions=True)

    async def _run(self) -> None:
        """From the stream's opening to its end."""
        channel = self._channels.acquire(self._place)
        stream = self._method(channel)
        writing = asyncio.create_task(self._write(stream), name="worker stream writing")
        broken: grpc.aio.AioRpcError | None = None
        try:
            while True:
                message = await stream.read()
                if message is grpc.aio.EOF:
                    break
                for event in message.events:
                    call = self._calls.get(event.call)
                    if call is not None:
                        call.came(event)
        except grpc.aio.AioRpcError as error:
            broken = error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # Not this task was cancelled but the stream: its channel was closed under it.
        finally:
            stream.cancel()
            writing.cancel()
            self._channels.release(self._place)
            self._broke(broken)
            await asyncio.gather(writing, return_exceptions=True)

    def _broke(self, error: grpc.aio.AioRpcError | None) -> None:
        """The stream has ended: so have its calls, and the next one opens another."""
        if self._open is not None:
            self._ending.add(self._open)
            self._open.add_done_callback(self._ending.discard)
            self._open = None
        calls = [*self._calls.values()]
        self._calls.clear()
        for call in calls:
            call.broke(failure_of(call.worker, _cause(error)))

    async def _write(self, stream: Any) -> None:
        # A write that fails is told by the read, with the reason.
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while True:
                await self._wake.wait()
                self._wake.clear()
                starting, self._starting = self._starting, []
                cancelling, self._cancelling = self._cancelling, []
                for requests in _messages(starting):
                    await stream.write(self._commands(start=requests))
                if cancelling:
                    await stream.write(self._commands(cancel=cancelling))


class WorkerStreams:
    """All streams of a frontend process; entered for as long as it lives, closes all of them on exit."""

    def __init__(self, channels: WorkerChannels, clock: Callable[[], float]) -> None:
        self._channels = channels
        self._deadlines = Deadlines(clock)
        self._prefill: dict[Place, WorkerStream[PrefillRequest, PrefillEvent]] = {}
        self._decode: dict[Place, WorkerStream[DecodeRequest, DecodeEvent]] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for streams in (self._prefill, self._decode):
            while streams:
                await streams.popitem()[1].close()

    def prefill(self, worker: WorkerRecord, request: PrefillRequest, trace: Mapping[str, str]) -> PrefillCall:
        """Send a request to a worker."""
        place = Place.of(worker)
        stream = self._prefill.get(place)
        if stream is None:
            stream = self._prefill[place] = WorkerStream(
                self._channels,
                place,
                PrefillCommands,
                lambda channel: PrefillWorkerStub(channel).PrefillMany(),
                self._deadlines,
            )
        if trace:
            request.trace.update(trace)
        call = PrefillCall(stream, worker, stream.next_number())
        stream.start(call, request)
        return call

    def decode(self, worker: WorkerRecord, request: DecodeRequest, trace: Mapping[str, str]) -> DecodeCall:
        """Send a request to a worker."""
        place = Place.of(worker)
        stream = self._decode.get(place)
        if stream is None:
            stream = self._decode[place] = WorkerStream(
                self._channels,
                place,
                DecodeCommands,
                lambda channel: DecodeWorkerStub(channel).DecodeMany(),
                self._deadlines,
            )
        if trace:
            request.trace.update(trace)
        call = DecodeCall(stream, worker, stream.next_number())
        stream.start(call, request)
        return call

    async def retain(self, places: AbstractSet[Place]) -> None:
        """Close the idle streams to places that are not among these; busy ones at a later call."""
        for streams in (self._prefill, self._decode):
            for place in [one for one, stream in streams.items() if one not in places and stream.idle]:
                await streams.pop(place).close()


def _cause(error: grpc.aio.AioRpcError | None) -> SlipstreamError:
    """Why a stream ended. What a worker says of one request comes on the stream, never as its end; where gRPC finds no
    better word for a connection that broke than INTERNAL ("Internal error from Core"), nobody is there all the same."""
    if error is None:
        return WorkerLostError("the connection was closed")
    cause = from_rpc_error(error)
    return WorkerLostError(cause.message) if type(cause) is SlipstreamError else cause


def _messages(requests: list[Request]) -> list[list[Request]]:
    """In their order, in pieces that are not too large."""
    pieces: list[list[Request]] = []
    room = 0
    for request in requests:
        size = request.ByteSize()
        if size > room:
            pieces.append([])
            room = _MESSAGE_BYTES
        pieces[-1].append(request)
        room -= size
    return pieces
