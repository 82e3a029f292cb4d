"""The receiver's side of simulated transfers; see `sending`. One connection to each peer, kept while it lives."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from engine.simulated.sending import TRANSPORT
from kv_transfer import permits, wire
from kv_transfer.channel import Channel
from kv_transfer.door import Door
from kv_transfer.handoff import Handoff
from slipstream.errors import TransferError


@dataclass(slots=True, eq=False)
class Incoming:
    """One handoff that is received here.

    Attributes:
        started: tokens and their digest, once the sender computes the prompt.
        arrived: once all blocks that were asked for are here.
        transfer_s: that they took on the link, summed. exposed_s: since the prompt was computed.
    """

    handoff: Handoff
    peer: Channel
    started: asyncio.Future[tuple[int, int]] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    arrived: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    missing: int = -1
    bytes_moved: int = 0
    transfer_s: float = 0.0
    exposed_s: float = 0.0
    computed_at_s: float = 0.0

    def ask(self, first: int, count: int) -> None:
        """These blocks of the prompt are wanted, and have room."""
        self.missing = count
        self.peer.post(wire.Announce(self.handoff.id, first, count))

    def fail(self, error: TransferError) -> None:
        for future in (self.started, self.arrived):
            if not future.done():
                future.set_exception(error)
                future.exception()  # nobody may be waiting for this one

    def take(self, message: wire.Message) -> None:
        if isinstance(message, wire.Started):
            self._begin(message)
        elif isinstance(message, wire.Computed):
            self.computed_at_s = time.monotonic()
        elif isinstance(message, wire.Sent):
            self.missing -= message.blocks[1]
            self.bytes_moved += message.length
            self.transfer_s += message.send_ns / 1e9
            if self.missing == 0 and not self.arrived.done():
                self.exposed_s = time.monotonic() - self.computed_at_s if self.computed_at_s else 0.0
                self.arrived.set_result(None)
        elif isinstance(message, wire.Closed):
            self.fail(TransferError(message.message, code=message.code))

    def _begin(self, message: wire.Started) -> None:
        if self.started.done():
            return
        tokens, digest = message.tokens, message.digest
        shown = permits.begins(self.handoff.token, self.peer.session, self.handoff.id, tokens, digest)
        try:
            permits.check(message.shown, shown, "the sender")
        except TransferError as error:
            self.fail(error)
        else:
            self.started.set_result((tokens, digest))


class _Link:
    """A connection to one sender, whose agent has this key."""

    def __init__(self, address: str, epoch: int, key: bytes, door: Door, dial_s: float) -> None:
        self.incoming: dict[bytes, Incoming] = {}
        self.ready: asyncio.Future[Channel] = asyncio.get_running_loop().create_future()
        self._address, self._epoch, self._key = address, epoch, key
        self._door, self._dial_s = door, dial_s
        self.task = asyncio.create_task(self._run(), name="simulated-link")

    async def _run(self) -> None:
        error = TransferError("the other worker has closed the connection", code="worker_gone")
        try:
            async with self._door.dialed(self._address, self._key, self._dial_s) as peer:
                await self._greet(peer)
                self.ready.set_result(peer)
                while True:
                    message = await peer.next()
                    handoff_id = getattr(message, "handoff", b"")
                    if handoff_id in self.incoming:
                        self.incoming[handoff_id].take(message)
        except TransferError as failure:
            error = failure
        finally:
            if not self.ready.done():
                self.ready.set_exception(error)
                self.ready.exception()
            for incoming in self.incoming.values():
                incoming.fail(error)

    async def _greet(self, peer: Channel) -> None:
        peer.post(wire.Hello(wire.VERSION, 0, self._epoch, "", [TRANSPORT], None))
        answer = await peer.next()
        if not isinstance(answer, wire.Hello) or TRANSPORT not in answer.transports:
            raise TransferError("the other worker's engine is not a simulated one", code="no_path")
        if answer.epoch != self._epoch:
            raise TransferError("the other worker has been started anew", code="worker_gone")


class ReceivingSide:
    """All that this worker receives."""

    def __init__(self, door: Door, *, dial_s: float) -> None:
        self._door, self._dial_s = door, dial_s
        self._links: dict[tuple[str, int, bytes], _Link] = {}

    @asynccontextmanager
    async def receiving(self, handoff: Handoff) -> AsyncIterator[Incoming]:
        """Open a handoff; at the end of the block the sender hears that all has come, or that it is given up.

        Raises:
            TransferError: the sender cannot be reached.
        """
        link = self._link(handoff.address, handoff.epoch, handoff.key)
        peer = await asyncio.shield(link.ready)
        incoming = link.incoming[handoff.id] = Incoming(handoff, peer)
        if link.task.done():
            incoming.fail(TransferError("the other worker has closed the connection", code="worker_gone"))
        peer.post(wire.Open(handoff.id, permits.opens(handoff.token, peer.session, handoff.id)))
        try:
            yield incoming
        except BaseException:
            peer.post(wire.Closed(handoff.id, "cancelled", "not waited for any more"))
            raise
        else:
            whole = incoming.arrived.done() and incoming.arrived.exception() is None
            peer.post(wire.Done(handoff.id) if whole else wire.Closed(handoff.id, "cancelled", "not needed any more"))
        finally:
            del link.incoming[handoff.id]
            incoming.fail(TransferError("not waited for any more", code="cancelled"))

    async def reach(self, address: str, epoch: int, key: bytes) -> float:
        """Seconds for a new connection and its greeting.

        Raises:
            TransferError: it cannot be reached, or is no simulated worker.
        """
        began_s = time.monotonic()
        link = self._link(address, epoch, key)
        await asyncio.shield(link.ready)
        return time.monotonic() - began_s

    async def close(self) -> None:
        tasks = [link.task for link in self._links.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _link(self, address: str, epoch: int, key: bytes) -> _Link:
        link = self._links.get((address, epoch, key))
        if link is None or link.task.done():
            link = self._links[address, epoch, key] = _Link(address, epoch, key, self._door, self._dial_s)
        return link
