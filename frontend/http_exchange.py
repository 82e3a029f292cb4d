"""The mechanics of one HTTP request: reading a bounded body, noticing a client that leaves, writing SSE."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from slipstream.background import first_error
from slipstream.errors import CancelledByClientError, RequestTooLargeError, SlowRequestError

# A refused body is read on for a while: a connection closed in the middle of it loses the refusal.
_REFUSED_BODY_TIMEOUT_S = 5.0
# Longest wait for a client to read what was written before the end of its answer: no other deadline holds by then.
_LAST_WRITE_TIMEOUT_S = 30.0

_SSE_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # nginx would hold tokens back
}
DONE = b"data: [DONE]\n\n"


def _encoded(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


_ENCODED_SSE_HEADERS = _encoded(_SSE_HEADERS)


async def read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """The whole body, whatever its transfer encoding.

    Raises:
        RequestTooLargeError: it is longer than `max_bytes`.
        SlowRequestError: it did not come within `timeout_s`.
        CancelledByClientError: the client left before its end.
    """
    too_large = RequestTooLargeError(
        f"The request body is larger than the {max_bytes} bytes allowed (frontend.max_body_bytes)."
    )
    declared = request.headers.get("content-length", "")
    parts: list[bytes] = []
    length = 0
    stream = request.stream()
    try:
        async with asyncio.timeout(timeout_s):
            if declared.isdecimal() and int(declared) > max_bytes:
                await _discard(request)
                raise too_large
            async for part in stream:
                length += len(part)
                if length > max_bytes:
                    await _discard(request)
                    raise too_large
                parts.append(part)
    except TimeoutError as error:
        raise SlowRequestError(
            f"The request body did not arrive within the {timeout_s:g} s allowed (limits.body_timeout_s)."
        ) from error
    except ClientDisconnect as error:
        raise CancelledByClientError("The client left before its request was complete.") from error
    return b"".join(parts)


async def _discard(request: Request) -> None:
    try:
        async with asyncio.timeout(_REFUSED_BODY_TIMEOUT_S):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


class ConnectedResponse(Response):
    """A response that works while it is sent, and is cancelled the moment the client leaves.

    Args:
        work: sends the response; whatever it still does after its last message must not wait.
    """

    def __init__(self, work: Callable[[Send], Awaitable[None]]) -> None:
        # Not the base's own beginnings, which would render an empty body and its headers.
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watch: asyncio.Task[None] | None = None
        try:
            with first_error():
                async with asyncio.TaskGroup() as tasks:
                    watch = tasks.create_task(_raise_on_disconnect(receive))
                    await self._work(send)
                    watch.cancel()
        finally:
            watch = None  # see `first_error`


async def _raise_on_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    raise CancelledByClientError("The client left before the answer was complete.")


async def send_last(send: Send, message: Message) -> None:
    """Send the end of a streamed answer.

    Raises:
        CancelledByClientError: the client does not read.
    """
    try:
        async with asyncio.timeout(_LAST_WRITE_TIMEOUT_S):
            await send(message)
    except TimeoutError as error:
        raise CancelledByClientError("The client stopped reading its answer.") from error


def start_message(headers: Mapping[str, str] = _SSE_HEADERS, status: int = 200) -> Message:
    """The head of a response; of a stream of events when nothing else is said."""
    encoded = _encoded(headers) if headers is not _SSE_HEADERS else _ENCODED_SSE_HEADERS.copy()
    return {"type": "http.response.start", "status": status, "headers": encoded}


def body_message(body: bytes, *, more: bool) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


def sse_event(content: bytes) -> bytes:
    """One server-sent event. JSON has no raw line breaks, so one `data:` line is enough."""
    return b"data: " + content + b"\n\n"


def sse_events(chunks: list[msgspec.Struct]) -> bytes:
    return b"".join(sse_event(msgspec.json.encode(chunk)) for chunk in chunks)
