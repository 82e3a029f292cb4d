"""A client's connection as uvicorn serves it, held to `limits`: how many there are, how large and how slow a request
may be, and how long an answer may wait to be taken.

uvicorn waits for ever for a request that never comes whole and for a client that never reads, queues as many requests
as are sent ahead, and lets headers grow without end. Here each of these has a limit, and each breach of one is counted
and, where the client can still be told, answered in the shape of every other error.

Timers are set only for what did not come at once: a request in one piece costs none.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from typing import Any

import httptools
from prometheus_client import Counter, Gauge
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from frontend.connection_table import ConnectionTable, Verdict
from frontend.keys.connections import EXTENSION, ConnectionAccounts
from frontend.openai_responses import error_body
from slipstream.errors import (
    HeadersTooLargeError,
    InvalidRequestError,
    OverloadedError,
    SlipstreamError,
    UnavailableError,
)
from slipstream.limit_settings import LimitSettings

CONNECTIONS = Gauge(
    "slipstream_frontend_connections",
    "HTTP connections that are open. Near limits.max_connections idle ones are closed, then new ones refused.",
    multiprocess_mode="livesum",
)
CUT_CONNECTIONS = Counter(
    "slipstream_frontend_cut_connections_total",
    "HTTP connections refused or cut, by the limit they broke (docs/security/limits.md). A rising rate is an attack, a "
    "broken client, or a limit too low.",
    ("reason",),
)
# A refused client is read on for so long: closing in the middle of what it sends would lose the refusal.
_LINGER_S = 1.0
_MOST_LINGERING = 256
# After the application's own deadline for a body, and the time in which it reads on a refused one.
_BODY_GRACE_S = 6.0
_RESET = struct.pack("ii", 1, 0)


class Doorkeeper:
    """What the connections of one process share."""

    def __init__(self, limits: LimitSettings, *, most: int) -> None:
        self.limits = limits
        self.table = ConnectionTable[LimitedProtocol](most=most, most_per_address=limits.max_connections_per_address)
        self.lingering = 0

    def protocol(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> LimitedProtocol:
        """What uvicorn makes for each connection."""
        return LimitedProtocol(self, config, server_state, app_state, _loop)


class LimitedProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(
        self,
        door: Doorkeeper,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.address = ""
        self._door, self._limits = door, door.limits
        self.timeout_keep_alive = door.limits.keep_alive_s  # type: ignore[assignment]  # whole seconds only, it says
        self._admitted = False
        self._cut = False
        self._lingering = False
        self._in_head = self._in_body = False
        self._head_bytes = self._later_bytes = self._header_count = 0
        self._breach: SlipstreamError | None = None
        self._running: RequestResponseCycle | None = None
        self._accounts = ConnectionAccounts()
        self._waiting_for = ""  # head or body: what `_deadline` is for
        self._deadline: asyncio.TimerHandle | None = None
        self._write_deadline: asyncio.TimerHandle | None = None

    # -- the connection ------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.address = self.client[0] if self.client else ""
        verdict, evicted = self._door.table.open(self)
        if verdict is not Verdict.WELCOME:
            self._refuse(verdict.value, self._full(verdict))
            return
        self._admitted = True
        CONNECTIONS.inc()
        if evicted is not None:
            evicted.give_way()
        self._wait_for("head")

    def give_way(self) -> None:
        """Another connection needs the place of this idle one, which is out of the table already."""
        self._leave_table(forgotten=True)
        self._abort("idle")

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._deadline, self._write_deadline):
            if timer is not None:
                timer.cancel()
        self._deadline = self._write_deadline = None
        self._leave_table()
        self._accounts.close()
        if self._lingering:
            self._lingering = False
            self._door.lingering -= 1
        # Of requests sent ahead the base tells the newest alone that its client is gone; the one that runs is another.
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        self._running = None
        self.pipeline.clear()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._cut:
            return  # read only so that the refusal arrives
        began_before = self._in_head
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            pass  # to nothing that we speak: the request is answered like any other
        except httptools.HttpParserError:
            breach = self._breach or InvalidRequestError("This is not a valid HTTP/1.1 request.", code="invalid_http")
            self._refuse(breach.code, breach)
            return
        if self._in_head and began_before:
            # The parser keeps a header to itself until its end, however long that is in coming.
            self._later_bytes += len(data)
            if self._later_bytes > self._limits.max_header_bytes:
                breach = self._too_large()
                self._refuse(breach.code, breach)
                return
        # Bytes that began no request, in place of one, do not hold a connection open either.
        wanted = "head" if self._in_head else "body" if self._in_body else "" if self._busy else "head"
        if wanted != self._waiting_for:
            self._wait_for(wanted)

    def eof_received(self) -> None:
        """The client has left, as far as can be told: the connection closes once it has taken what was written."""
        self._await_taken()

    # -- the parser ----------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= self._limits.max_pipelined and self._busy:
            self._breach = InvalidRequestError(
                f"More than {self._limits.max_pipelined} requests were sent ahead (limits.max_pipelined).",
                code="too_many_pipelined",
            )
            raise self._breach
        self._in_head = True
        self._head_bytes = self._later_bytes = self._header_count = 0
        super().on_message_begin()
        self.scope["extensions"] = {EXTENSION: self._accounts}  # type: ignore[dict-item]

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # after a chunked body: who looked at the headers before us has not seen these
        self._header_count += 1
        self._count_head(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._in_head, self._in_body = False, True
        super().on_headers_complete()
        if self._admitted:
            self._door.table.busy(self)

    def on_message_complete(self) -> None:
        self._in_body = False
        super().on_message_complete()

    def _count_head(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > self._limits.max_header_bytes or self._header_count > self._limits.max_headers:
            self._breach = self._too_large()
            raise self._breach

    def _too_large(self) -> HeadersTooLargeError:
        return HeadersTooLargeError(
            f"The request's headers are more than {self._limits.max_headers} (limits.max_headers), or larger than "
            f"{self._limits.max_header_bytes} bytes (limits.max_header_bytes)."
        )

    # -- the answer ----------------------------------------------------------------------------------------

    @property
    def _busy(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        more = bool(self.pipeline)
        super().on_response_complete()
        if more:
            return
        if self._admitted:
            self._door.table.idle(self)
        if self.transport.is_closing():
            self._await_taken()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self._abort("write_timeout")
        else:
            super().timeout_keep_alive_handler()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._await_taken()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_deadline is not None and not self.transport.is_closing():
            self._write_deadline.cancel()
            self._write_deadline = None

    def _await_taken(self) -> None:
        """What is written waits for the client, and closing waits for it too: not for ever."""
        if self._write_deadline is None and self.transport.get_write_buffer_size():
            self._write_deadline = self.loop.call_later(self._limits.write_timeout_s, self._abort, "write_timeout")

    # -- limits --------------------------------------------------------------------------------------------

    def _wait_for(self, what: str) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._waiting_for = what
        if what:
            limits = self._limits
            limit_s = limits.header_timeout_s if what == "head" else limits.body_timeout_s + _BODY_GRACE_S
            self._deadline = self.loop.call_later(limit_s, self._out_of_time)

    def _out_of_time(self) -> None:
        self._deadline = None
        if self._waiting_for == "head" and self._busy:
            self._wait_for("head")  # of the next request, which is early: first comes the answer to this one
            return
        self._abort("header_timeout" if self._waiting_for == "head" else "body_timeout")

    def _full(self, verdict: Verdict) -> SlipstreamError:
        if verdict is Verdict.TOO_MANY:
            return UnavailableError(
                f"This frontend has {self._door.table.most} connections open, its limit (limits.max_connections).",
                code="too_many_connections",
                retry_after_s=1.0,
            )
        return OverloadedError(
            f"Your address has {self._door.table.most_per_address} connections open, its limit "
            "(limits.max_connections_per_address).",
            code="too_many_connections",
            retry_after_s=1.0,
        )

    def _refuse(self, reason: str, error: SlipstreamError) -> None:
        """Say why, if no other answer is on its way, and close."""
        if self._busy:
            if self.pipeline or self.cycle.response_started or self.cycle is not self._running:
                self._abort(reason)
                return
            self.cycle.disconnected = True  # it waits for a body that is none, and has said nothing
            self.cycle.message_event.set()
        if self._door.lingering >= _MOST_LINGERING:
            self._abort(reason)
            return
        CUT_CONNECTIONS.labels(reason).inc()
        self._cut = self._lingering = True
        self._door.lingering += 1
        content = error_body(error)
        head = [
            STATUS_LINE[error.http_status],
            b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n" % len(content),
            b"retry-after: 1\r\n" if error.retry_after_s is not None else b"",
        ]
        self.transport.write(b"".join((*head, b"\r\n", content)))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._leave_table()
        self._waiting_for = "end"
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = self.loop.call_later(_LINGER_S, self._reset)

    def _abort(self, reason: str) -> None:
        CUT_CONNECTIONS.labels(reason).inc()
        self._cut = True
        self._reset()

    def _reset(self) -> None:
        """Close at once: neither we nor the kernel keep what the client has not taken."""
        if self.transport.is_closing() and not self.transport.get_write_buffer_size():
            self.transport.abort()
            return
        connected: socket.socket | None = self.transport.get_extra_info("socket")
        if connected is not None:
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.transport.abort()

    def _leave_table(self, *, forgotten: bool = False) -> None:
        if self._admitted:
            self._admitted = False
            CONNECTIONS.dec()
            if not forgotten:
                self._door.table.close(self)
