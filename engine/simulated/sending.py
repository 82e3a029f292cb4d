"""The sender's side of simulated transfers: real messages, and the time that the bytes would take, but no bytes.

It speaks the protocol of the real transfer agents (kv_transfer/wire.py), with spans that have a length and no place.
All transfers of a worker share its link: they go one after another.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from engine.simulated.clock import Clock
from kv_transfer import permits, wire
from kv_transfer.channel import Channel
from kv_transfer.door import Door
from kv_transfer.permits import TOKEN_BYTES, Permit
from slipstream.addresses import host_port
from slipstream.errors import StartupError, TransferError
from slipstream.performance import Profile

TRANSPORT = "simulated"


@dataclass(slots=True, eq=False)
class Outgoing:
    """One prompt that is handed over.

    Attributes:
        tokens: that are handed over, with their digest.
        ready_blocks: computed ones, in the prompt's order; the receiver may have them.
    """

    permit: Permit
    tokens: int
    digest: int
    begun: bool = False
    ready_blocks: int = 0
    computed: bool = False
    receiver: Channel | None = None
    wanted: tuple[int, int] | None = None
    """First block and the one behind the last, as the receiver announced."""
    sent: int = 0
    work: asyncio.Event = field(default_factory=asyncio.Event)
    sender: asyncio.Task[None] | None = None

    @property
    def handoff_id(self) -> bytes:
        return self.permit.handoff


class SendingSide:
    """Serves receivers while the context is open.

    Args:
        taken: called when a receiver has all it wants.
        door: lets them in. parked_s: how long a receiver may wait for a prompt that is unknown.
    """

    def __init__(
        self,
        profile: Profile,
        clock: Clock,
        door: Door,
        *,
        epoch: int,
        host: str,
        port: int,
        parked_s: float,
        taken: Callable[[Outgoing], None],
    ) -> None:
        self._profile = profile
        self._clock = clock
        self._epoch = epoch
        self._host, self._port = host, port
        self._door = door
        self._parked_s = parked_s
        self._taken = taken
        self._server: asyncio.Server | None = None
        self._peers: set[asyncio.Task[None]] = set()
        self._outgoing: dict[bytes, Outgoing] = {}
        self._parked: dict[bytes, tuple[Channel, bytes, asyncio.TimerHandle]] = {}
        self._link_free_s = 0.0
        self.address = ""

    async def open(self) -> None:
        """Listen.

        Raises:
            StartupError: the port is taken.
        """
        try:
            self._server = await asyncio.start_server(self._welcome, self._host, self._port)
        except OSError as error:
            raise StartupError(
                f"transfer.port: cannot listen on {self._host}:{self._port} ({error.strerror})"
            ) from error
        self.address = host_port(self._host, self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """End all connections; whoever receives sees it."""
        if self._server is not None:
            self._server.close()
        for _, _, timer in self._parked.values():
            timer.cancel()
        tasks = [*self._peers, *(one.sender for one in self._outgoing.values() if one.sender is not None)]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # -- what the engine tells ----------------------------------------------------------------------------

    def expect(self, outgoing: Outgoing) -> None:
        """This prompt is going to be computed here."""
        self._outgoing[outgoing.handoff_id] = outgoing
        parked = self._parked.pop(outgoing.handoff_id, None)
        if parked is not None:
            peer, shown, timer = parked
            timer.cancel()
            self._attach(outgoing, peer, shown)

    def progress(self, outgoing: Outgoing, ready_blocks: int, *, computed: bool) -> None:
        """Its computation has begun, or come this far."""
        if not outgoing.begun:
            outgoing.begun = True
            self._greet(outgoing)
        outgoing.ready_blocks = max(outgoing.ready_blocks, ready_blocks)
        if computed and not outgoing.computed:
            outgoing.computed = True
            if outgoing.receiver is not None:
                outgoing.receiver.post(wire.Computed(outgoing.handoff_id))
        outgoing.work.set()

    def end(self, outgoing: Outgoing, code: str) -> None:
        """Its blocks are not held any more. Who still receives is told; again is fine."""
        if self._outgoing.pop(outgoing.handoff_id, None) is None:
            return
        if outgoing.sender is not None:
            outgoing.sender.cancel()
        if outgoing.receiver is not None and code:
            outgoing.receiver.post(wire.Closed(outgoing.handoff_id, code, "the prefill worker has given it up"))

    # -- receivers ----------------------------------------------------------------------------------------

    async def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._peers.add(task)
        peer: Channel | None = None
        try:
            with suppress(TransferError):
                async with self._door.welcomed(reader, writer) as peer:
                    while True:
                        self._take(peer, await peer.next())
        except asyncio.CancelledError:
            pass  # `close`: asyncio's server would log it
        finally:
            self._peers.discard(task)
            if peer is not None:
                self._forget(peer)

    def _take(self, peer: Channel, message: wire.Message) -> None:
        if isinstance(message, wire.Hello):
            peer.post(wire.Hello(wire.VERSION, self._epoch, 0, "", [TRANSPORT], None))
        elif isinstance(message, wire.Open):
            self._open(peer, message)
        elif isinstance(message, wire.Announce | wire.Done | wire.Closed):
            outgoing = self._outgoing.get(message.handoff)
            if outgoing is None or outgoing.receiver is not peer:
                self._unpark(message.handoff)
            elif isinstance(message, wire.Announce):
                self._begin_sending(outgoing, message)
            elif isinstance(message, wire.Done):
                self._taken(outgoing)
            else:
                outgoing.receiver = None

    def _open(self, peer: Channel, message: wire.Open) -> None:
        handoff_id = message.handoff
        outgoing = self._outgoing.get(handoff_id)
        if outgoing is not None:
            self._attach(outgoing, peer, message.shown)
            return
        self._unpark(handoff_id)
        give_up = asyncio.get_running_loop().call_later(self._parked_s, self._unknown, peer, handoff_id)
        self._parked[handoff_id] = (peer, message.shown, give_up)

    def _attach(self, outgoing: Outgoing, peer: Channel, shown: bytes) -> None:
        """As real agents do: only the worker that was told the token, and is registered, has it."""
        permit = outgoing.permit
        try:
            if peer.peer != permit.receiver or len(permit.token) != TOKEN_BYTES:
                raise TransferError("this handoff is for another worker", code="bad_token")
            if peer.peer not in self._door.peers:
                raise TransferError("the receiver is not registered any more", code="not_registered")
            permits.check(shown, permits.opens(permit.token, peer.session, permit.handoff), "the receiver")
        except TransferError as error:
            self._door.count(error)
            peer.post(wire.Closed(permit.handoff, error.code, error.message))
            return
        outgoing.receiver = peer
        if outgoing.begun:
            self._greet(outgoing)

    def _unknown(self, peer: Channel, handoff_id: bytes) -> None:
        del self._parked[handoff_id]
        peer.post(wire.Closed(handoff_id, "timeout", "the prompt never came to the prefill worker"))

    def _unpark(self, handoff_id: bytes) -> None:
        parked = self._parked.pop(handoff_id, None)
        if parked is not None:
            parked[2].cancel()

    def _forget(self, peer: Channel) -> None:
        for handoff_id in [key for key, (one, _, _) in self._parked.items() if one is peer]:
            self._unpark(handoff_id)
        for outgoing in self._outgoing.values():
            if outgoing.receiver is peer:
                outgoing.receiver = None

    def _greet(self, outgoing: Outgoing) -> None:
        receiver = outgoing.receiver
        if receiver is not None:
            tokens, digest, permit = outgoing.tokens, outgoing.digest, outgoing.permit
            shown = permits.begins(permit.token, receiver.session, permit.handoff, tokens, digest)
            receiver.post(wire.Started(permit.handoff, tokens, digest, shown))
            if outgoing.computed:
                receiver.post(wire.Computed(outgoing.handoff_id))

    def _begin_sending(self, outgoing: Outgoing, message: wire.Announce) -> None:
        if outgoing.sender is None:
            outgoing.wanted = (message.first, message.first + message.count)
            outgoing.sent = message.first
            outgoing.sender = asyncio.create_task(self._send(outgoing), name="simulated-send")

    async def _send(self, outgoing: Outgoing) -> None:
        """Send blocks as they become ready, until the receiver has what it asked for."""
        assert outgoing.wanted is not None
        end = outgoing.wanted[1]
        while outgoing.sent < end:
            outgoing.work.clear()
            ready = min(outgoing.ready_blocks, end)
            if ready <= outgoing.sent:
                await outgoing.work.wait()
                continue
            first, outgoing.sent = outgoing.sent, ready
            length = (ready - first) * self._profile.block_bytes
            now_s = self._clock.now_s()
            self._link_free_s = max(self._link_free_s, now_s) + length / self._profile.transfer_bytes_per_s
            arrives_s = self._link_free_s + self._profile.transfer_latency_s
            await self._clock.until(arrives_s)
            if outgoing.receiver is not None:
                busy_ns = int((arrives_s - now_s) * 1e9)
                outgoing.receiver.post(
                    wire.Sent(outgoing.handoff_id, 0, (first, ready - first), [], (0, 1), [], 0, length, busy_ns)
                )
