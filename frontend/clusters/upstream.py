"""The HTTP client of a global frontend: one pool of kept connections to one frontend of a cluster.

Made for passing on: a body is handed over as the bytes that came, many chunks at a time when they came together. An
exchange that is left before its end closes its connection, which is how the cluster learns that nobody listens.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast
from urllib.parse import urlsplit

import httptools

from slipstream.addresses import host_port
from slipstream.errors import ConfigError

Headers = Sequence[tuple[bytes, bytes]]

MAX_IDLE = 256
MAX_HELD_BYTES = 1 << 18
"""Of an answer that its client reads slowly; beyond that the cluster is not read either."""


class UpstreamError(Exception):
    """The other side could not be reached, or went away.

    Attributes:
        unreachable: no connection came about: certainly nothing was begun there.
    """

    def __init__(self, message: str, *, unreachable: bool = False) -> None:
        super().__init__(message)
        self.unreachable = unreachable


@dataclass(frozen=True, slots=True)
class Target:
    """Where a frontend is.

    Attributes:
        prefix: of every path; empty, or with a slash at its beginning and none at its end.
    """

    host: str
    port: int
    prefix: str
    tls: ssl.SSLContext | None

    @property
    def authority(self) -> str:
        return host_port(self.host, self.port)


def target_of(url: str, ca_file: str | None = None) -> Target:
    """The target of `http(s)://host[:port][/prefix]`.

    Raises:
        ConfigError: it is no such URL, or the certificates cannot be read.
    """
    parts = urlsplit(url)
    try:
        port = parts.port
    except ValueError:
        port = -1
    if parts.scheme not in ("http", "https") or not parts.hostname or port == -1 or parts.query or parts.username:
        raise ConfigError(f"global_frontend.clusters: '{url}' is no http://host:port or https://host:port")
    context = None
    if parts.scheme == "https":
        try:
            context = ssl.create_default_context(cafile=ca_file)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"global_frontend.clusters: cannot read the certificates in {ca_file}: {error}") from None
    return Target(parts.hostname, port or (443 if context else 80), parts.path.rstrip("/"), context)


class Upstream:
    """The connections to one target. Close it when done."""

    def __init__(self, target: Target, *, connect_timeout_s: float) -> None:
        self._target = target
        self._connect_timeout_s = connect_timeout_s
        self._idle: list[_Connection] = []
        self._open: set[_Connection] = set()

    async def send(self, method: str, path: str, headers: Headers, body: bytes = b"") -> UpstreamAnswer:
        """Send a request; returns with the head of its answer. Close the answer.

        Raises:
            UpstreamError: there is none. No deadline but that of connecting: the caller has one.
        """
        content = self._encoded(method, path, headers, body)
        while True:
            connection, is_new = await self._connection()
            try:
                await connection.exchange(content)
            except UpstreamError:
                # One that was kept may have been closed while nobody looked; a new one says how things are.
                connection.abort()
                if is_new or connection.answer_begun:
                    raise
                continue
            except BaseException:
                connection.abort()
                raise
            return UpstreamAnswer(connection, self)

    def give_back(self, connection: _Connection) -> None:
        """An exchange is over: keep its connection if it can be used again."""
        if connection.reusable and len(self._idle) < MAX_IDLE:
            self._idle.append(connection)
        else:
            connection.abort()

    def abort_silent(self, silent_s: float) -> None:
        """Close the connections in use on which nothing has come for so long: nobody may be there any more."""
        now_s = asyncio.get_running_loop().time()
        for connection in list(self._open):
            if now_s - connection.heard_s > silent_s:
                connection.abort()

    def close(self) -> None:
        """Close all connections, also those in use."""
        for connection in list(self._open):
            connection.abort()

    async def _connection(self) -> tuple[_Connection, bool]:
        while self._idle:
            connection = self._idle.pop()
            if connection.reusable:
                return connection, False
        target = self._target
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: _Connection(self._open), target.host, target.port, ssl=target.tls
                )
        except TimeoutError as error:
            raise UpstreamError(f"no connection within {self._connect_timeout_s:g} s", unreachable=True) from error
        except OSError as error:  # a certificate that is not trusted is one, too
            raise UpstreamError(error.strerror or str(error), unreachable=True) from error
        return connection, True

    def _encoded(self, method: str, path: str, headers: Headers, body: bytes) -> bytes:
        target = self._target
        lines = [f"{method} {target.prefix}{path} HTTP/1.1\r\nhost: {target.authority}\r\n".encode("latin-1")]
        lines += [name + b": " + value + b"\r\n" for name, value in headers]
        if body or method == "POST":
            lines.append(b"content-length: %d\r\n" % len(body))
        lines += [b"\r\n", body]
        return b"".join(lines)


class UpstreamAnswer:
    """One answer: its status and headers, then its body in pieces as they come."""

    def __init__(self, connection: _Connection, pool: Upstream) -> None:
        self._connection: _Connection | None = connection
        self._pool = pool
        self.status = connection.status
        self.headers = connection.headers

    def header(self, name: bytes) -> bytes:
        """A header's value; its name in lower case."""
        return next((value for found, value in self.headers if found == name), b"")

    async def read(self) -> bytes:
        """What has come since the last time, or comes next; nothing at the end.

        Raises:
            UpstreamError: the other side went away before the end.
        """
        return await self._connection.read() if self._connection is not None else b""

    async def read_all(self, most_bytes: int) -> bytes:
        """The whole body.

        Raises:
            UpstreamError: as above, or it is longer.
        """
        parts, length = [], 0
        while part := await self.read():
            parts.append(part)
            length += len(part)
            if length > most_bytes:
                raise UpstreamError(f"an answer of more than {most_bytes} bytes")
        return b"".join(parts)

    def close(self) -> None:
        """Again is fine."""
        connection, self._connection = self._connection, None
        if connection is not None:
            self._pool.give_back(connection)


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self, among: set[_Connection]) -> None:
        self._among = among
        self._transport: asyncio.Transport | None = None
        self._lost: str | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._paused = False
        self.heard_s = 0.0
        self._reset()

    def _reset(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._parts: list[bytes] = []
        self._held = 0
        self._head_complete = self._complete = False
        self.answer_begun = False
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []

    @property
    def reusable(self) -> bool:
        return self._lost is None and self._complete and not self._parts and self._keeps_alive

    async def exchange(self, content: bytes) -> None:
        """Send a request and wait for the head of its answer."""
        self._reset()
        if self._transport is None or self._lost is not None:
            raise UpstreamError(self._lost or "not connected")
        self._keeps_alive = False
        self.heard_s = asyncio.get_running_loop().time()
        self._transport.write(content)
        while not self._head_complete:
            await self._news()

    async def read(self) -> bytes:
        while not self._parts:
            if self._complete:
                return b""
            await self._news()
        content = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts, self._held = [], 0
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()
        return content

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def _news(self) -> None:
        if self._lost is not None:
            raise UpstreamError(self._lost)
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.heard_s = asyncio.get_running_loop().time()
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are none by inheritance
        self._complete = True  # nothing is asked yet
        self._keeps_alive = True
        self._among.add(self)

    def data_received(self, data: bytes) -> None:
        self.answer_begun = True
        self.heard_s = asyncio.get_running_loop().time()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._lost = f"no HTTP: {error}"
            self.abort()
        if self._held > MAX_HELD_BYTES and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._among.discard(self)
        if self._lost is None:
            # What is told neither by length nor in chunks ends with its connection.
            if self._head_complete and not self._complete and self._until_close:
                self._complete = True
            self._lost = str(exc) if exc else "the connection was closed"
        self._wake()

    # httptools' callbacks

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        names = {name for name, _ in self.headers}
        self._until_close = not names & {b"content-length", b"transfer-encoding"}
        self._head_complete = self.status >= 200
        if not self._head_complete:
            self.headers = []

    def on_body(self, body: bytes) -> None:
        self._parts.append(body)
        self._held += len(body)

    def on_message_complete(self) -> None:
        self._complete = self._head_complete
        self._keeps_alive = self._parser.should_keep_alive()

    _keeps_alive = False
    _until_close = False
