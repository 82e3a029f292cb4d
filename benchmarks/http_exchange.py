"""One HTTP request after another on one connection, answers searched and not parsed: little CPU for a load generator.

What is learned of an answer: its status, Retry-After, the code of an error, when its first and last events with a token
came, the longest time between two of them, and how many tokens the server counted.
"""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from typing import cast

from slipstream.errors import UnavailableError

_STATUS = re.compile(rb"HTTP/1\.1 (\d{3})")
_LENGTH = re.compile(rb"(?i)content-length: *(\d+)")
_RETRY = re.compile(rb"(?i)retry-after: *(\d+)")
_CODE = re.compile(rb'"code": *"([a-z_]+)"')
_USAGE = re.compile(rb'"completion_tokens": *(\d+)')
_TOKEN = re.compile(rb'"(?:text|content)": *"[^"]')
_HEAD_END = b"\r\n\r\n"
_LAST_CHUNK = b"0\r\n\r\n"
_MARK_BYTES = 64
_TAIL_BYTES = 2048


@dataclass(slots=True)
class Answer:
    """What came back; times by the monotonic clock, 0 where there is none."""

    status: int = 0
    retry_after_s: float = 0.0
    code: str = ""
    first_s: float = 0.0
    last_s: float = 0.0
    longest_gap_s: float = 0.0
    tokens: int = 0


class Connection(asyncio.Protocol):
    """Kept open between requests. `ask` waits for one answer."""

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self._done: asyncio.Future[Answer] | None = None
        self._answer = Answer()
        self._head = b""
        self._tail = b""
        self._left_bytes = -1  # of a body of known length
        self._in_body = False
        self.alive = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)
        self.alive = True

    def connection_lost(self, exc: Exception | None) -> None:
        self.alive = False
        if self._done is not None and not self._done.done():
            self._done.set_exception(UnavailableError(f"the connection was lost: {exc}"))

    def abort(self) -> None:
        """Hang up."""
        self.alive = False
        if self._transport is not None:
            self._transport.abort()

    async def ask(self, request: bytes, leave_after_s: float | None = None) -> Answer:
        """Send it, and wait for the end of the answer, or hang up so long after its first token.

        Raises:
            UnavailableError: the connection was lost.
        """
        assert self._transport is not None, "not connected"
        self._answer, self._head, self._tail, self._left_bytes, self._in_body = Answer(), b"", b"", -1, False
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        try:
            if leave_after_s is None:
                return await self._done
            await asyncio.wait([self._done], timeout=leave_after_s)
            if not self._done.done():
                self.abort()
                self._done.cancel()
                return self._answer
            return self._done.result()
        except asyncio.CancelledError:
            self._done.cancel()
            self.abort()
            raise

    def data_received(self, data: bytes) -> None:
        if self._in_body:
            self._body(data)
            return
        self._head += data
        head, found, body = self._head.partition(_HEAD_END)
        if not found:
            return
        status = _STATUS.match(head)
        self._answer.status = int(status[1]) if status else 0
        if retry := _RETRY.search(head):
            self._answer.retry_after_s = float(retry[1])
        if length := _LENGTH.search(head):
            self._left_bytes = int(length[1])
        self._in_body = True
        self._body(body)

    def _body(self, data: bytes) -> None:
        if self._answer.status == 200 and _TOKEN.search(self._tail[-_MARK_BYTES:] + data):
            self._token(time.monotonic())
        self._tail = (self._tail + data)[-_TAIL_BYTES:]
        if self._left_bytes >= 0:
            self._left_bytes -= len(data)
            if self._left_bytes <= 0:
                self._end()
        elif self._tail.endswith(_LAST_CHUNK):
            self._end()

    def _token(self, now_s: float) -> None:
        answer = self._answer
        if not answer.first_s:
            answer.first_s = now_s
        else:
            answer.longest_gap_s = max(answer.longest_gap_s, now_s - answer.last_s)
        answer.last_s = now_s

    def _end(self) -> None:
        if code := _CODE.search(self._tail):
            self._answer.code = code[1].decode()
        if usage := _USAGE.search(self._tail):
            self._answer.tokens = int(usage[1])
        if self._done is not None and not self._done.done():
            self._done.set_result(self._answer)


class Connections:
    """As many as are needed at the same time; idle ones are used again."""

    def __init__(self, host: str, port: int, *, connect_timeout_s: float = 10.0) -> None:
        self._host, self._port, self._connect_timeout_s = host, port, connect_timeout_s
        self._idle: list[Connection] = []

    async def ask(self, request: bytes, leave_after_s: float | None = None) -> Answer:
        """On an idle connection, or a new one.

        Raises:
            UnavailableError: it cannot be made, or was lost.
        """
        while self._idle and not self._idle[-1].alive:
            self._idle.pop()
        one = self._idle.pop() if self._idle else await self._connect()
        answer = await one.ask(request, leave_after_s)
        if one.alive:
            self._idle.append(one)
        return answer

    def close(self) -> None:
        """Hang up all idle ones."""
        while self._idle:
            self._idle.pop().abort()

    async def _connect(self) -> Connection:
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, made = await asyncio.get_running_loop().create_connection(Connection, self._host, self._port)
        except (OSError, TimeoutError) as error:
            raise UnavailableError(f"cannot connect to {self._host}:{self._port}: {error!r}") from error
        return made
