"""The worker's end of a frontend's stream: many requests by one gRPC call, and their events many to a message.

Each request has a task of its own, which reads the service's answer to it and posts what comes. Posted events wait
until those that come at the same time are there too, and then go out as one message: a message costs both sides some
0.1 ms of CPU time, however little is in it.

A stream that its frontend does not read holds up no request: what waits is never more than the answers themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, Generic, Protocol, TypeVar

from slipstream import telemetry
from slipstream.errors import SlipstreamError
from slipstream.grpc_errors import to_failure
from slipstream.v1.worker_pb2 import DecodeEvent, DecodeRequest, PrefillEvent, PrefillRequest

log = telemetry.get_logger(__name__)

Request = TypeVar("Request", PrefillRequest, DecodeRequest)
Event = TypeVar("Event", PrefillEvent, DecodeEvent)
Asked = TypeVar("Asked", PrefillRequest, DecodeRequest, covariant=True)

MERGE_WITHIN_S = 0.005
"""Tokens that come faster than this become one event: nobody reads 200 of them a second. The first tokens of a call,
and its end, never wait."""

_MESSAGE_BYTES = 1 << 20
"""About where a message is full: others shall not wait behind one that takes long to read."""


class Commands(Protocol[Asked]):
    """What a frontend sends: requests that begin, and calls that end."""

    @property
    def start(self) -> Iterable[Asked]: ...
    @property
    def cancel(self) -> Iterable[int]: ...


class RequestStream(Generic[Request, Event]):
    """One stream.

    Args:
        answer: one request's events, of which the last ends it; closing it aborts the request.
        merge_within_s: least time between two messages.
    """

    def __init__(
        self,
        answer: Callable[[Request], AsyncGenerator[Event, None]],
        event: type[Event],
        *,
        merge_within_s: float = MERGE_WITHIN_S,
    ) -> None:
        self._answer: Callable[[Request], AsyncGenerator[Event, None]] = answer
        self._event: type[Event] = event
        self._merge_within_s = merge_within_s
        self._loop = asyncio.get_running_loop()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._ready: list[Event] = []
        self._growing: dict[int, Event] = {}
        self._due = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._released_s = -float("inf")
        self._sending = False
        self._overdue = False
        self._ending = False

    async def follow(self, commands: AsyncIterator[Commands[Request]]) -> None:
        """Do what the frontend says, until it says no more and every request has ended."""
        async for said in commands:
            for request in said.start:
                self._begin(request)
            for call in said.cancel:
                task = self._tasks.get(call)
                if task is not None:
                    task.cancel()
        while self._tasks:
            await asyncio.wait([*self._tasks.values()])

    def end(self) -> None:
        """Send what is left, and no more."""
        self._ending = True
        self._due.set()

    async def close(self) -> None:
        """Abort every request, and see them end."""
        if self._timer is not None:
            self._timer.cancel()
        tasks = [*self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def messages(self) -> AsyncIterator[list[Event]]:
        """The events, as many together as there are when the stream can take them."""
        while not self._ending or self._ready:
            await self._due.wait()
            self._due.clear()
            ready, self._ready = self._ready, []
            self._sending = True
            for events in _messages(ready):
                yield events
            self._sending = False
            if self._overdue:
                self._release()

    def _begin(self, request: Request) -> None:
        call = request.call
        if call in self._tasks:
            # The one that runs would have no name any more: nobody could cancel it, and nothing would end it.
            log.warning("call_begun_twice", call=call, request_id=request.request_id)
            return
        task = self._loop.create_task(self._run(request), name=f"call {call}")
        self._tasks[call] = task
        task.add_done_callback(lambda _: self._tasks.pop(call, None))

    async def _run(self, request: Request) -> None:
        call, first, last = request.call, True, False
        try:
            async with aclosing(self._answer(request)) as events:
                async for event in events:
                    event.call = call
                    last = _is_last(event)
                    self._post(event, at_once=first or last or isinstance(event, PrefillEvent))
                    first = False
        except SlipstreamError as error:
            self._post(self._event(call=call, failure=to_failure(error)), at_once=True)
        except Exception as error:
            log.exception("request_crashed", request_id=request.request_id)
            crash = SlipstreamError(f"the worker failed on this request: {type(error).__name__}: {error}")
            self._post(self._event(call=call, failure=to_failure(crash)), at_once=True)
        else:
            if not last:
                self._post(self._event(call=call, ended=True), at_once=True)

    def _post(self, event: Event, *, at_once: bool) -> None:
        growing = self._growing.pop(event.call, None)
        if growing is not None:
            growing.MergeFrom(event)
            event = growing
        if at_once:
            self._ready.append(event)
            self._released_s = self._loop.time()
            self._due.set()
            return
        self._growing[event.call] = event
        if self._timer is None and not self._overdue:
            wait_s = self._released_s + self._merge_within_s - self._loop.time()
            self._timer = self._loop.call_later(max(0.0, wait_s), self._release)

    def _release(self) -> None:
        """Tokens that waited for others go out, unless the frontend has yet to take what went before."""
        self._timer, self._overdue = None, self._sending
        if self._sending:
            return
        self._released_s = self._loop.time()
        self._ready += self._growing.values()
        self._growing.clear()
        self._due.set()


@asynccontextmanager
async def serving(
    stream: RequestStream[Request, Event], commands: AsyncIterator[Any], drained: Callable[[], Awaitable[None]]
) -> AsyncIterator[AsyncIterator[list[Event]]]:
    """Follow the commands while the block sends the messages; every request is aborted when it is left.

    Args:
        drained: returns when the worker has done its last request, which ends the stream.
    """

    async def end_when_drained() -> None:
        await drained()
        stream.end()

    following = asyncio.create_task(stream.follow(commands), name="commands")
    following.add_done_callback(lambda _: stream.end())
    tasks = [following, asyncio.create_task(end_when_drained(), name="drained")]
    try:
        yield stream.messages()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await stream.close()


def _is_last(event: PrefillEvent | DecodeEvent) -> bool:
    if isinstance(event, DecodeEvent):
        return bool(event.finish_reason)
    return event.HasField("closed")


def _messages(posted: list[Event]) -> Iterator[list[Event]]:
    """In their order, in pieces that are not too large."""
    first, size = 0, 0
    for position, event in enumerate(posted):
        size += event.ByteSize()
        if size >= _MESSAGE_BYTES:
            yield posted[first : position + 1]
            first, size = position + 1, 0
    if first < len(posted):
        yield posted[first:]
