"""A control connection between two agents that know each other: tagged frames, and signs of life in both directions.

A peer that died is noticed when its connection breaks; one that is frozen, or cut off, when nothing has come from it
for `silence_s`. Each side pings four times as often.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from kv_transfer import wire
from kv_transfer.greeting import TAG_BYTES, Session
from slipstream.errors import TransferError

# A peer that does not read is found by its silence; until then its messages wait here.
_MOST_UNREAD_BYTES = 64 << 20


class Channel:
    """Made by `channel` and used while that context is open.

    Attributes:
        peer: the other side's public key. session: see `greeting.Session.id`.
    """

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, session: Session, silence_s: float
    ) -> None:
        self.peer = session.peer
        self.session = session.id
        self._reader = reader
        self._writer = writer
        self._seal = session.sends
        self._unseal = session.receives
        self._silence_s = silence_s

    def post(self, message: wire.Message) -> None:
        """Send, without waiting; what is posted on a closed connection is lost, and its peer is known to be gone."""
        if self._writer.is_closing():
            return
        if self._writer.transport.get_write_buffer_size() > _MOST_UNREAD_BYTES:
            self._writer.transport.abort()
            return
        self._writer.write(wire.frame(self._seal.seal(wire.encode(message))))

    async def next(self) -> wire.Message:
        """The next message that is not a sign of life.

        Raises:
            TransferError: `worker_gone`: the connection was closed, or nothing came for too long; `bad_message`.
        """
        while True:
            try:
                async with asyncio.timeout(self._silence_s):
                    sealed = await wire.read_frame(self._reader, wire.MAX_FRAME_BYTES + TAG_BYTES)
            except TimeoutError as error:
                raise TransferError(
                    f"nothing came from the other worker for transfer.silence_s = {self._silence_s:g} s",
                    code="worker_gone",
                ) from error
            if sealed is None:
                raise TransferError("the other worker has closed the connection", code="worker_gone")
            message = wire.decode(self._unseal.open(sealed))
            if not isinstance(message, wire.Ping):
                return message

    async def drained(self) -> None:
        """Wait until what was posted has been given to the kernel."""
        with suppress(OSError):
            await self._writer.drain()

    async def ping(self) -> None:
        """Give signs of life, for ever."""
        while True:
            await asyncio.sleep(self._silence_s / 4)
            self.post(wire.Ping())


@asynccontextmanager
async def channel(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, session: Session, silence_s: float
) -> AsyncIterator[Channel]:
    """The connection as a channel; pings while the context is open, closed at its end."""
    opened = Channel(reader, writer, session, silence_s)
    pings = asyncio.create_task(opened.ping(), name="channel-ping")
    try:
        yield opened
    finally:
        pings.cancel()
        writer.close()
        with suppress(OSError, asyncio.CancelledError):
            await pings
