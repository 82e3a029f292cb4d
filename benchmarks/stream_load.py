"""A closed load of streamed chat completions over kept connections, cheap enough to share a core with what it measures.

Each connection sends its next request when the last answer has ended. Answers are not parsed but searched: for the
status, for the first token, for the usage at the end. A tenth of the CPU time of an HTTP client library.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import cast

from slipstream.errors import DeadlineError, UnavailableError

# The first token's event: content that is there and not empty.
_CONTENT = re.compile(rb'"content":\s*"[^"]')
_USAGE = re.compile(rb'"completion_tokens":\s*(\d+)')
_EVENT = b"data: {"
_DONE = b"data: [DONE]"
_LAST_CHUNK = b"0\r\n\r\n"
# The longest piece of an answer that is searched as a whole: an event is never longer.
_TAIL_BYTES = 4096


@dataclass(slots=True)
class Streamed:
    """What one load saw.

    Attributes:
        ttft_s: of each answer, from sending the request to its first token.
        total_s: of each answer, from sending the request to its last byte.
        events: server-sent events of all answers.
        tokens: completion tokens of all answers, by the server's own count.
        errors: what went wrong, in the order it did.
        wall_s: of the whole load.
    """

    ttft_s: list[float] = field(default_factory=list)
    total_s: list[float] = field(default_factory=list)
    events: int = 0
    tokens: int = 0
    errors: list[str] = field(default_factory=list)
    wall_s: float = 0.0

    @property
    def requests_per_s(self) -> float:
        return len(self.total_s) / self.wall_s


def chat_request(host: str, model: str, prompt: str, max_tokens: int) -> bytes:
    """One streamed request, as it goes over the wire."""
    body = json.dumps(
        {
            "model": model,
            "messages": [{"role": "user", "content": prompt}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": max_tokens,
            "ignore_eos": True,
            "temperature": 0,
        }
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class _Connection(asyncio.Protocol):
    """Sends requests from `source` until there are no more."""

    def __init__(self, source: Iterator[bytes], into: Streamed) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._source = source
        self._into = into
        self._transport: asyncio.WriteTransport | None = None
        self._sent_s = 0.0
        self._tail = b""
        self._status_ok = False
        self._first_s: float | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Not an instance of it under uvloop, though it has its methods.
        self._transport = cast("asyncio.WriteTransport", transport)
        self._next()

    def data_received(self, data: bytes) -> None:
        if not self._status_ok:
            if not data.startswith(b"HTTP/1.1 200"):
                self._fail(data[:500].decode(errors="replace"))
                return
            self._status_ok = True
        if self._first_s is None and _CONTENT.search(self._tail + data):
            self._first_s = time.perf_counter()
        # An event's mark may be cut in two between reads.
        self._into.events += (self._tail[1 - len(_EVENT) :] + data).count(_EVENT)
        self._tail = (self._tail + data)[-_TAIL_BYTES:]
        if self._tail.endswith(_LAST_CHUNK) and _DONE in self._tail:
            self._answered()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self._fail(f"connection lost: {exc}")

    def close(self) -> None:
        """Give up what is still open."""
        if not self.done.done():
            self.done.cancel()
        if self._transport is not None:
            self._transport.abort()

    def _answered(self) -> None:
        now_s, usage = time.perf_counter(), _USAGE.search(self._tail)
        if self._first_s is None or usage is None:
            self._fail(f"an answer without tokens or usage: {self._tail[-500:].decode(errors='replace')}")
            return
        self._into.ttft_s.append(self._first_s - self._sent_s)
        self._into.total_s.append(now_s - self._sent_s)
        self._into.tokens += int(usage[1])
        self._next()

    def _next(self) -> None:
        assert self._transport is not None
        request = next(self._source, None)
        if request is None:
            self.done.set_result(None)
            self._transport.close()
            return
        self._tail, self._status_ok, self._first_s = b"", False, None
        self._sent_s = time.perf_counter()
        self._transport.write(request)

    def _fail(self, reason: str) -> None:
        self._into.errors.append(reason)
        if not self.done.done():
            self.done.set_result(None)
        if self._transport is not None:
            self._transport.abort()


async def closed_load(
    host: str,
    port: int,
    requests: Iterable[bytes],
    *,
    connections: int,
    timeout_s: float,
    ramp_s: float = 0.0,
    tls: ssl.SSLContext | None = None,
) -> Streamed:
    """Send `requests` over `connections` connections, each as soon as its last answer has ended.

    Args:
        ramp_s: over which the connections are opened, evenly.
        tls: whom to trust; None: without TLS.

    Raises:
        DeadlineError: it took longer than `timeout_s`.
        UnavailableError: no connection can be made.
    """
    into, source, loop = Streamed(), iter(requests), asyncio.get_running_loop()
    began_s = time.perf_counter()
    opened: list[_Connection] = []
    try:
        async with asyncio.timeout(timeout_s):
            for _ in range(connections):
                _transport, connection = await loop.create_connection(
                    lambda: _Connection(source, into), host, port, ssl=tls
                )
                opened.append(connection)
                if ramp_s:
                    await asyncio.sleep(ramp_s / connections)
            await asyncio.gather(*(connection.done for connection in opened))
    except TimeoutError as error:
        raise DeadlineError(f"only {len(into.total_s)} answers within {timeout_s:g} s") from error
    except OSError as error:
        raise UnavailableError(f"cannot connect to {host}:{port}: {error}") from error
    finally:
        for connection in opened:
            connection.close()
    into.wall_s = time.perf_counter() - began_s
    return into
