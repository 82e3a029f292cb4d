"""One request among those of a stream to a worker: how its events are read, and how it is ended from here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from frontend.deadlines import NEVER_S
from frontend.worker_failure import failure_of, is_of_request
from slipstream.errors import CancelledByClientError
from slipstream.grpc_errors import from_failure
from slipstream.v1.registry_pb2 import WorkerRecord
from slipstream.v1.worker_pb2 import DecodeEvent, PrefillEvent

if TYPE_CHECKING:
    from frontend.worker_stream import WorkerStream

Event = TypeVar("Event", PrefillEvent, DecodeEvent)

WAITING_TOKENS = 16_384
"""Tokens that may wait for a client that does not read; with its socket's buffers it is some minutes behind then."""


class WorkerCall(Generic[Event]):
    """A request that a worker has. Pair each with one `end`.

    Attributes:
        number: its name on the stream.
        due_s: see `frontend.deadlines`.
    """

    def __init__(self, stream: WorkerStream[Any, Event], worker: WorkerRecord, number: int) -> None:
        self.worker = worker
        self.number = number
        self.due_s = NEVER_S
        self._stream: WorkerStream[Any, Event] = stream
        self._over = False

    def expect_by(self, due_s: float) -> None:
        """`failed` is called with a TimeoutError at that time, unless another is set before."""
        if not self._over:
            self._stream.deadlines.set(self, due_s)

    def end(self) -> None:
        """Abort on the worker what has not finished. Again is fine; never blocks."""
        if self._leave():
            self._stream.cancel(self.number)

    def came(self, event: Event) -> None:
        """The worker sent this; called by the stream alone."""
        failed = event.HasField("failure")
        if not failed and not event.ended:
            self.received(event)
            return
        self._leave()
        if isinstance(event, DecodeEvent) and event.token_ids:
            self.received(event)
        if failed:
            cause = from_failure(event.failure)
            self.failed(cause if is_of_request(cause) else failure_of(self.worker, cause))
        else:
            self.received(None)

    def broke(self, error: Exception) -> None:
        """The stream broke; called by the stream alone."""
        if self._leave():
            self.failed(error)

    def expired(self) -> None:
        """See `frontend.deadlines`."""
        self.failed(TimeoutError())

    def received(self, event: Event | None) -> None:
        """An event; None at a regular end that says nothing more."""
        raise NotImplementedError

    def failed(self, error: Exception) -> None:
        """No more events come: a WorkerFailure, a TimeoutError, or an error of the request itself."""
        raise NotImplementedError

    def _leave(self) -> bool:
        """The stream has no more to do with it; returns whether it had."""
        if self._over:
            return False
        self._over = True
        self._stream.leave(self)
        return True


class PrefillCall(WorkerCall[PrefillEvent]):
    """Tells of its events by calling back: nobody waits for them alone."""

    def __init__(self, stream: WorkerStream[Any, PrefillEvent], worker: WorkerRecord, number: int) -> None:
        super().__init__(stream, worker, number)
        self.on_event: Callable[[PrefillEvent | None], None] = _tell_nobody
        self.on_failure: Callable[[Exception], None] = _tell_nobody

    def end(self) -> None:
        """And call nobody any more: who is called has this call, and both would wait for the collector of cycles."""
        super().end()
        self.on_event = self.on_failure = _tell_nobody

    def received(self, event: PrefillEvent | None) -> None:
        if event is not None and event.HasField("closed"):
            self._leave()
        self.on_event(event)

    def failed(self, error: Exception) -> None:
        self.on_failure(error)


def _tell_nobody(_: object) -> None:
    """Until somebody asks to be called, and when nobody does any more."""


class DecodeCall(WorkerCall[DecodeEvent]):
    """Is read by one reader. What comes faster than it reads becomes one event."""

    def __init__(self, stream: WorkerStream[Any, DecodeEvent], worker: WorkerRecord, number: int) -> None:
        super().__init__(stream, worker, number)
        self._waiting: DecodeEvent | None = None
        self._grown = False
        self._at_end = False
        self._error: Exception | None = None
        self._reader: asyncio.Future[None] | None = None

    async def read(self) -> DecodeEvent | None:
        """The next event with tokens or a finish reason; None at an end without one.

        Raises:
            WorkerFailure: the call broke.
            TimeoutError: nothing came in time; see `expect_by`.
            InvalidRequestError, RequestTooLargeError: the worker finds the request itself wrong.
            CancelledByClientError: the reader is too far behind.
        """
        if self._waiting is None and self._error is None and not self._at_end:
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        event, self._waiting = self._waiting, None
        if event is None and self._error is not None:
            raise self._let_go()
        return event

    def received(self, event: DecodeEvent | None) -> None:
        self.due_s = NEVER_S
        if isinstance(self._error, TimeoutError):
            self._error = None  # nobody has seen it yet
        if event is None:
            self._at_end = True
        elif self._waiting is not None:
            self._append(self._waiting, event)
        elif event.token_ids or event.finish_reason:
            self._waiting, self._grown = event, False
        else:
            return
        if event is not None and event.finish_reason:
            self._leave()
        self._wake()

    def failed(self, error: Exception) -> None:
        if self._error is None:
            self._error = error
        self._wake()

    def _let_go(self) -> Exception:
        """The error, to be raised: it will have the frame of its reader, who has this call."""
        error, self._error, self._at_end = self._error, None, True
        assert error is not None
        return error

    def _append(self, waiting: DecodeEvent, event: DecodeEvent) -> None:
        if not self._grown:  # an own copy: the first one shares its memory with the whole message it came in
            self._waiting, self._grown = DecodeEvent(), True
            self._waiting.CopyFrom(waiting)
            waiting = self._waiting
        waiting.MergeFrom(event)
        if len(waiting.token_ids) > WAITING_TOKENS:
            self.end()
            behind = f"The client reads too slowly: more than {WAITING_TOKENS} tokens of its answer wait for it."
            self._waiting = None
            self.failed(CancelledByClientError(behind))

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)
