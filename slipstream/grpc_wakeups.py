"""How gRPC's asyncio side is woken: many events by one wake-up, instead of one by each.

gRPC's poller thread, which does all reading and writing, hands each event to the event loop and writes one byte into
a socket pair for it. The loop takes all events that are there when it is woken, but only one byte. So bytes pile
up, each a wake-up for nothing; and when the pair is full, which some 280 bytes are, the poller waits in `write` and
reads no sockets for as long as the loop is busy, until pings time out and every stream of a healthy connection breaks
("ping timeout"). Seen with grpcio 1.78.

Call `install` before anything uses `grpc.aio`: it makes the loop's end of that one pair read all bytes at once, and the
poller's end give up a byte that does not fit. A byte is written after its event was queued, and a full pair has bytes
that are still to be read, after which all queued events are taken: no event is missed.
"""

from __future__ import annotations

import socket
from typing import Any

from grpc._cython import cygrpc  # type: ignore[attr-defined]

_MANY_BYTES = 1 << 16


class _DrainingSocket(socket.socket):
    """Reads whatever is there."""

    def recv(self, bufsize: int, flags: int = 0) -> bytes:
        return super().recv(max(bufsize, _MANY_BYTES), flags)


def install() -> None:
    """Start gRPC's asyncio side with such a pair. Once; again does nothing."""
    if _installed:
        return
    _installed.append(True)
    original = socket.socketpair

    def draining_pair(*args: Any, **options: Any) -> tuple[socket.socket, socket.socket]:
        reading, writing = original(*args, **options)
        writing.setblocking(False)
        draining = _DrainingSocket(reading.family, reading.type, reading.proto, fileno=reading.detach())
        return draining, writing

    socket.socketpair = draining_pair
    try:
        cygrpc.init_grpc_aio()
    finally:
        socket.socketpair = original


_installed: list[bool] = []
