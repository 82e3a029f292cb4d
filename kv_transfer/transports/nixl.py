"""The transport over NIXL: the sender writes spans into the receiver's landing memory.

Only the landing memory can be written to by a peer: it alone is in the card. A write is followed by a message that
names its ticket, which NIXL delivers after the bytes; `receive` waits for it.

Bytes to and from GPUs' memory are not covered: a `Run` is host memory here.

Over TCP UCX moves written bytes with the receiver's help, so a receiver looks after its agent while tickets are out
(1% of a core when nothing comes), and for a while after a ticket that was released too early. With no ticket out and
no write under way nothing runs. An unreachable peer shows with the first write: `connect` only makes it known.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import mmap
import secrets
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

import msgspec

from kv_transfer.transports import nixl_roads, one_ucx
from kv_transfer.transports.base import Run, Way
from kv_transfer.transports.landing import Landing
from kv_transfer.transports.nixl_agent import NixlAgent
from kv_transfer.transports.ucx_devices import RDMA_DEVICES, check_is_up, interface_of
from slipstream.errors import TransferError

T = TypeVar("T")

Backend = Literal["UCX", "LIBFABRIC"]

_CARD_VERSION = 1
_TICKET = struct.Struct("<Q")
# How long a receiver goes on helping with a span whose ticket was released before it came.
_LATE_S = 2.0
# How often a receiver that waits in vain looks whether its peer is still there.
_PROBE_S = 1.0
_TCP_REMEDY = {"UCX": "UCX_TLS and UCX_NET_DEVICES", "LIBFABRIC": "FI_PROVIDER"}


class _Card(msgspec.Struct, array_like=True, frozen=True):
    version: int
    backend: str
    agent: str
    metadata: bytes
    base: int
    places: int
    place_bytes: int


class NixlTransport:
    """A worker's NIXL agent and its landing memory.

    Args:
        span_bytes: most bytes under one ticket.
        landing_bytes: host memory that spans land in; at least one span.
        host: this worker's address. On a machine without RDMA devices, UCX uses the network interface that has it;
            an address that no interface has restricts nothing. UCX_NET_DEVICES wins. LIBFABRIC does not mind it.
        infiniband: where the kernel lists RDMA devices.
    """

    name = "nixl"

    def __init__(
        self,
        *,
        backend: Backend,
        span_bytes: int,
        landing_bytes: int,
        host: str | None,
        infiniband: Path = RDMA_DEVICES,
    ) -> None:
        self._backend: Backend = backend
        self._rdma = sorted(path.name for path in infiniband.glob("*"))
        self._places = max(1, landing_bytes // span_bytes)
        self._span_bytes = span_bytes
        self._host = host
        self._agent: NixlAgent | None = None
        self._landing: Landing | None = None
        self._card = b""
        self._peers: dict[str, _Peer] = {}
        self._meeting = asyncio.Lock()
        # LIBFABRIC never returns from a message to a peer that is gone.
        self.can_probe = backend == "UCX"
        # Tickets under which something may come: granted ones, and those released before it came.
        self._tickets: dict[int, _Ticket] = {}

    async def open(self, memory: Sequence[Run]) -> None:
        one_ucx.claim(self.name)
        parameters: dict[str, str] = {}
        if self._backend == "UCX" and not self._rdma and (device := interface_of(self._host or "")):
            check_is_up(device, self._host or "")
            parameters["engine_config"] = f"NET_DEVICES={device}"
        self._agent = agent = NixlAgent(
            f"slipstream-{secrets.token_hex(6)}",  # UCX cuts names after 31 characters, its own suffix included
            backend=self._backend,
            parameters=parameters,
            on_message=self._arrived,
        )
        await agent.start()
        # In place from the start: the first writes would wait for the kernel to find pages.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        size = self._places * self._span_bytes
        landing_map = await asyncio.to_thread(mmap.mmap, -1, size, flags=flags)
        base = ctypes.addressof(ctypes.c_char.from_buffer(landing_map))
        self._landing = Landing(self._places, self._span_bytes, memoryview(landing_map))
        if memory:
            await agent.register(memory)
        metadata = await agent.metadata(await agent.register([Run(base, size)]))
        card = _Card(_CARD_VERSION, self._backend, agent.name, metadata, base, self._places, self._span_bytes)
        self._card = msgspec.msgpack.encode(card)

    def card(self) -> bytes:
        return self._card

    async def connect(self, card: bytes) -> NixlLink:
        theirs = _read_card(card, self._backend)
        assert self._agent is not None, "open() comes first"
        assert self._landing is not None
        agent = self._agent
        async with self._meeting:
            peer = self._peers.get(theirs.agent)
            if peer is not None and peer.gone:
                await self._part(peer, agent)
                peer = None
            if peer is None:
                way = await agent.call(lambda: self._meet(agent, theirs))
                peer = self._peers[theirs.agent] = _Peer(theirs, way)
            link = NixlLink(self, agent, self._landing, peer)
            peer.links.add(link)
        return link

    async def close(self) -> None:
        for link in [link for peer in self._peers.values() for link in peer.links]:
            await link.close()
        if self._agent is not None:
            await self._agent.stop()
            self._agent = None
        self._landing = None

    def expect(self, ticket: int, link: NixlLink) -> _Ticket:
        """Something will come under this ticket."""
        self._tickets[ticket] = entry = _Ticket(link)
        self.watch()
        return entry

    def forget(self, ticket: int, *, after_s: float) -> None:
        """Nothing more is to come under this ticket, or will not matter `after_s` from now."""
        entry = self._tickets.get(ticket)
        if entry is not None and after_s and not entry.arrived:
            entry.released = True
            asyncio.get_running_loop().call_later(after_s, self.forget_released, ticket)
        else:
            self._tickets.pop(ticket, None)
        self.watch()

    def forget_released(self, ticket: int) -> None:
        self._tickets.pop(ticket, None)
        self.watch()

    def watch(self) -> None:
        """Tell the agent what to look out for; after every change of that."""
        if self._agent is not None:
            coming = [entry for entry in self._tickets.values() if not entry.arrived]
            self._agent.expect(len(coming), urgent=sum(entry.waiter is not None for entry in coming))

    async def leave(self, link: NixlLink, peer: _Peer) -> None:
        """The link has ended; with its last one the peer is forgotten."""
        for ticket in [ticket for ticket, entry in self._tickets.items() if entry.link is link]:
            del self._tickets[ticket]
        self.watch()
        async with self._meeting:
            peer.links.discard(link)
            if self._agent is not None:
                with contextlib.suppress(TransferError):  # NIXL hangs; the agent says so to whoever needs it next
                    await (self._agent.drop_abandoned() if peer.links else self._part(peer, self._agent))

    async def _part(self, peer: _Peer, agent: NixlAgent) -> None:
        if self._peers.get(peer.card.agent) is peer:
            del self._peers[peer.card.agent]
            await agent.remove_peer(peer.card.agent)

    def _arrived(self, peer: str, message: bytes) -> None:
        if len(message) != _TICKET.size:
            return
        ticket = _TICKET.unpack(message)[0]
        entry = self._tickets.get(ticket)
        if entry is None or entry.link.peer.card.agent != peer:
            return  # late, or not the one who was given this ticket
        entry.arrived = True
        if entry.waiter is not None and not entry.waiter.done():
            entry.waiter.set_result(None)
        if entry.released:
            del self._tickets[ticket]
        self.watch()

    def _meet(self, agent: NixlAgent, theirs: _Card) -> Way:
        before = nixl_roads.ucx_endpoints(agent.name)
        agent.add_peer(theirs.metadata)
        if self._backend == "LIBFABRIC":
            provider = nixl_roads.libfabric_provider()
            return self._way(provider, provider in ("tcp", "sockets"))
        new = nixl_roads.ucx_endpoints(agent.name) - before
        lane = nixl_roads.fastest([lane for endpoint in new for lane in nixl_roads.ucx_lanes(endpoint)])
        return self._way("/".join(lane) if lane else "", lane is not None and lane[0] == "tcp")

    def _way(self, road: str, slow: bool) -> Way:
        warning = ""
        if slow and self._rdma:
            warning = (
                f"blocks go over TCP although this machine has {', '.join(self._rdma)}: "
                f"look at {_TCP_REMEDY[self._backend]}, and at the drivers"
            )
        return Way("nixl", f"{self._backend}:{road}" if road else self._backend, warning)


@dataclass(eq=False, slots=True)
class _Ticket:
    link: NixlLink
    arrived: bool = False
    released: bool = False
    waiter: asyncio.Future[None] | None = None


@dataclass(eq=False, slots=True)
class _Peer:
    """An agent that ours knows. Two workers may have a link for each direction; they share this."""

    card: _Card
    way: Way
    gone: bool = False
    links: set[NixlLink] = field(default_factory=set)


class NixlLink:
    """A link to one peer's agent."""

    def __init__(self, transport: NixlTransport, agent: NixlAgent, landing: Landing, peer: _Peer) -> None:
        self.peer = peer
        self._transport = transport
        self._agent = agent
        self._own = landing
        self._theirs = Landing(peer.card.places, peer.card.place_bytes, memoryview(b""))  # only to find places
        self._gone: TransferError | None = None
        self._closed = False
        self._granted: dict[int, _Ticket] = {}
        self._waiting: set[asyncio.Future[Any]] = set()

    @property
    def way(self) -> Way:
        return self.peer.way

    @property
    def span_bytes(self) -> int:
        return min(self._own.place_bytes, self._theirs.place_bytes)

    async def grant(self) -> int:
        self._check()
        asked = asyncio.ensure_future(self._own.grant())
        try:
            ticket = await self._unless_gone(asked)
        except BaseException:
            asked.cancel()
            asked.add_done_callback(self._return)
            raise
        self._granted[ticket] = self._transport.expect(ticket, self)
        return ticket

    async def send(self, ticket: int, pieces: Sequence[Run]) -> None:
        self._check()
        joined = _join(pieces)
        total = sum(piece.length for piece in joined)
        if not 0 < total <= self._theirs.place_bytes:
            message = f"a span of {total} bytes, for a landing place of {self._theirs.place_bytes} bytes"
            raise TransferError(message, code="bad_handoff")
        address = self.peer.card.base + self._theirs.offset(ticket)
        targets: list[Run] = []
        for piece in joined:
            targets.append(Run(address, piece.length))
            address += piece.length
        try:
            await self._unless_gone(self._agent.write(self.peer.card.agent, joined, targets, _TICKET.pack(ticket)))
        except TransferError as error:
            self._lost(error)

    async def receive(self, ticket: int, length: int) -> memoryview:
        self._check()
        entry = self._granted.get(ticket)
        if entry is None or not 0 <= length <= self._own.place_bytes:
            raise TransferError(f"no ticket {ticket} for {length} bytes was granted", code="bad_handoff")
        if not entry.arrived:
            await self._arrival(entry)
        return self._own.place(ticket)[:length]

    def release(self, ticket: int) -> None:
        if self._granted.pop(ticket, None) is not None:
            # What is under way over TCP now needs this side's help to end, and its sender waits for that.
            self._transport.forget(ticket, after_s=_LATE_S)
            self._own.release(ticket)

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._fail(TransferError("the link was closed", code="worker_gone"))
        for ticket in list(self._granted):
            self.release(ticket)
        await self._transport.leave(self, self.peer)

    async def _arrival(self, entry: _Ticket) -> None:
        entry.waiter = waiter = asyncio.get_running_loop().create_future()
        self._waiting.add(waiter)
        self._transport.watch()
        try:
            while not entry.arrived:
                await asyncio.wait([waiter], timeout=_PROBE_S)
                self._check()
                if not waiter.done() and self._transport.can_probe:
                    await self._probe()
        finally:
            entry.waiter = None
            self._waiting.discard(waiter)
            self._transport.watch()

    async def _probe(self) -> None:
        """Nothing comes: see whether the peer is still there. UCX may tell only at the next try."""
        try:
            await self._agent.probe(self.peer.card.agent)
        except TransferError as error:
            self._lost(error)

    def _lost(self, error: TransferError) -> NoReturn:
        self.peer.gone = True
        self._fail(error)
        raise TransferError(error.message, code="worker_gone") from error

    async def _unless_gone(self, waiting: asyncio.Future[T]) -> T:
        self._waiting.add(waiting)
        try:
            return await waiting
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and not current.cancelling():  # not this call, but what it waits for was cancelled
                self._check()
            raise
        finally:
            self._waiting.discard(waiting)

    def _check(self) -> None:
        if self._gone is not None:
            raise TransferError(self._gone.message, code="worker_gone")

    def _fail(self, error: TransferError) -> None:
        self._gone = self._gone or error
        for waiting in self._waiting:
            waiting.cancel()

    def _return(self, asked: asyncio.Future[int]) -> None:
        if not asked.cancelled() and asked.exception() is None:
            self._own.release(asked.result())  # came in the very moment in which it was given up


def _read_card(card: bytes, backend: Backend) -> _Card:
    try:
        peer = msgspec.msgpack.decode(card, type=_Card)
    except msgspec.MsgspecError as error:
        raise TransferError(f"an unreadable transport card: {error}", code="bad_message") from error
    if peer.version != _CARD_VERSION or peer.places < 1 or peer.place_bytes < 1:
        message = f"the peer's nixl card is of version {peer.version}, not {_CARD_VERSION}"
        raise TransferError(message, code="transport_unavailable")
    if peer.backend != backend:
        message = f"transfer.nixl_backend is {backend} here and {peer.backend} there; both ends need the same"
        raise TransferError(message, code="transport_unavailable")
    return peer


def _join(pieces: Sequence[Run]) -> list[Run]:
    """The same bytes in fewer pieces."""
    joined: list[Run] = []
    for piece in pieces:
        if joined and joined[-1].address + joined[-1].length == piece.address:
            joined[-1] = Run(joined[-1].address, joined[-1].length + piece.length)
        else:
            joined.append(piece)
    return joined
