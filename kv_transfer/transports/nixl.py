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
import ctypes
import mmap
import secrets
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeVar

import msgspec
import psutil

from kv_transfer.transports import nixl_roads
from kv_transfer.transports.base import Run, Way
from kv_transfer.transports.landing import Landing, Places
from kv_transfer.transports.nixl_agent import NixlAgent
from slipstream.errors import TransferError

T = TypeVar("T")

Backend = Literal["UCX", "LIBFABRIC"]

_CARD_VERSION = 1
_TICKET = struct.Struct("<Q")
_ORPHAN_S = 2.0
_INFINIBAND = Path("/sys/class/infiniband")
_TCP_REMEDY = {"UCX": "UCX_TLS and UCX_NET_DEVICES", "LIBFABRIC": "FI_PROVIDER"}


class _Card(msgspec.Struct, array_like=True, frozen=True):
    version: int
    backend: str
    metadata: bytes
    base: int
    places: int
    place_bytes: int


class NixlTransport:
    """A worker's NIXL agent and its landing memory.

    Args:
        span_bytes: most bytes under one ticket.
        landing_bytes: host memory that spans land in; at least one span.
        host: this worker's address. On a machine without RDMA devices, UCX uses the network interface that has it; an
            address that no interface has restricts nothing, and neither does LIBFABRIC mind. UCX_NET_DEVICES wins.
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
        infiniband: Path = _INFINIBAND,
    ) -> None:
        self._backend: Backend = backend
        self._rdma = sorted(path.name for path in infiniband.glob("*"))
        self._places = Places(max(landing_bytes // span_bytes, 1), span_bytes)
        self._host = host
        self._links: dict[str, NixlLink] = {}
        self._agent: NixlAgent | None = None
        self._card = b""

    async def open(self, memory: Sequence[Run]) -> None:
        parameters: dict[str, str] = {}
        if self._backend == "UCX" and not self._rdma and (device := _interface(self._host)):
            parameters["engine_config"] = f"NET_DEVICES={device}"
        # A UCX name has at most 31 characters, of which UCX's worker needs some.
        agent = NixlAgent(
            f"slipstream-{secrets.token_hex(6)}",
            backend=self._backend,
            parameters=parameters,
            on_message=self._arrived,
        )
        await agent.start()
        try:
            # Private, and in place from the start: the first writes would wait for the kernel to find pages.
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
            landing_map = mmap.mmap(-1, self._places.total_bytes, flags=flags)
            base = ctypes.addressof(ctypes.c_char.from_buffer(landing_map))
            self.landing = Landing(self._places.count, self._places.place_bytes, memoryview(landing_map))
            if memory:
                await agent.register(memory)
            landing_run = await agent.register([Run(base, self._places.total_bytes)])
            metadata = await agent.metadata(landing_run)
        except BaseException:
            await agent.stop()
            raise
        self._agent = agent
        self._card = msgspec.msgpack.encode(
            _Card(_CARD_VERSION, self._backend, metadata, base, self._places.count, self._places.place_bytes)
        )

    def card(self) -> bytes:
        return self._card

    async def connect(self, card: bytes) -> NixlLink:
        peer = _read_card(card, self._backend)
        agent = self._opened()
        before = await agent.call(lambda: nixl_roads.ucx_endpoints(agent.name))
        try:
            name = await agent.add_peer(peer.metadata)
        except TransferError as error:
            raise TransferError(f"cannot connect to the peer: {error}", code="transport_unavailable") from None
        if (older := self._links.get(name)) is not None:
            await older.close()
            name = await agent.add_peer(peer.metadata)
        way = await agent.call(lambda: self._way(agent.name, before))
        link = self._links[name] = NixlLink(self, agent, name, peer, way)
        return link

    async def close(self) -> None:
        for link in list(self._links.values()):
            await link.close()
        if self._agent is not None:
            await self._agent.stop()
            self._agent = None

    def expect(self) -> None:
        """Tell the agent how much may come; after each change of that."""
        if self._agent is not None:
            orphans = sum(len(link.orphans) for link in self._links.values())
            urgent = sum(len(link.receiving) for link in self._links.values())
            self._agent.expect(self.landing.granted + orphans, urgent=urgent)

    def forget(self, link: NixlLink, name: str) -> None:
        """The link has ended."""
        if self._links.get(name) is link:
            del self._links[name]
        self.expect()

    def _opened(self) -> NixlAgent:
        if self._agent is None:
            raise TransferError("the nixl transport is not open", code="transport_unavailable")
        return self._agent

    def _arrived(self, peer: str, message: bytes) -> None:
        link = self._links.get(peer)
        if link is not None and len(message) == _TICKET.size:
            link.arrived(_TICKET.unpack(message)[0])

    def _way(self, agent_name: str, before: set[int]) -> Way:
        if self._backend == "LIBFABRIC":
            provider = nixl_roads.libfabric_provider()
            return self._described(provider, provider in ("tcp", "sockets"))
        new = nixl_roads.ucx_endpoints(agent_name) - before
        lane = nixl_roads.fastest([lane for endpoint in new for lane in nixl_roads.ucx_lanes(endpoint)])
        return self._described("/".join(lane) if lane else "", lane is not None and lane[0] == "tcp")

    def _described(self, road: str, slow: bool) -> Way:
        warning = ""
        if slow and self._rdma:
            warning = (
                f"blocks go over TCP although this machine has {', '.join(self._rdma)}: "
                f"look at {_TCP_REMEDY[self._backend]}, and at the drivers"
            )
        return Way("nixl", f"{self._backend}:{road}" if road else self._backend, warning)


class NixlLink:
    """A link to one peer's agent."""

    def __init__(self, transport: NixlTransport, agent: NixlAgent, name: str, peer: _Card, way: Way) -> None:
        self._transport = transport
        self._landing = transport.landing
        self._agent = agent
        self._name = name
        self._peer = peer
        self._places = Places(peer.places, peer.place_bytes)
        self._way = way
        self._span_bytes = min(peer.place_bytes, self._landing.places.place_bytes)
        self._gone: TransferError | None = None
        self._closed = False
        self._writes: set[asyncio.Future[None]] = set()
        self._here: set[int] = set()
        self.receiving: dict[int, asyncio.Future[None]] = {}
        self.orphans: dict[int, asyncio.TimerHandle] = {}

    @property
    def way(self) -> Way:
        return self._way

    @property
    def span_bytes(self) -> int:
        return self._span_bytes

    async def grant(self) -> int:
        self._check()
        ticket = await self._landing.grant(self)
        self._transport.expect()
        return ticket

    async def send(self, ticket: int, pieces: Sequence[Run]) -> None:
        self._check()
        joined = _join(pieces)
        total = sum(piece.length for piece in joined)
        if ticket < self._places.count or not 0 < total <= self._places.place_bytes:
            message = (
                f"{total} bytes under ticket {ticket}: the peer has no such place of {self._places.place_bytes} bytes"
            )
            raise TransferError(message, code="bad_handoff")
        targets: list[Run] = []
        address = self._peer.base + self._places.offset(ticket)
        for piece in joined:
            targets.append(Run(address, piece.length))
            address += piece.length
        write = self._agent.write(self._name, joined, targets, _TICKET.pack(ticket))
        self._writes.add(write)
        try:
            await write
        except TransferError as error:
            if error.code == "worker_gone":
                self._fail(error)
            raise
        finally:
            self._writes.discard(write)

    async def receive(self, ticket: int, length: int) -> memoryview:
        self._check()
        view = self._landing.view(ticket, length)
        if ticket not in self._here:
            arrival = self.receiving[ticket] = asyncio.get_running_loop().create_future()
            self._transport.expect()
            try:
                await arrival
            finally:
                del self.receiving[ticket]
                self._transport.expect()
        return view

    def release(self, ticket: int) -> None:
        if self._landing.owner(ticket) is not self:
            return
        settled = ticket in self._here
        self._here.discard(ticket)
        if not settled:
            # What is under way now needs this side's help to end, and its sender waits for that.
            loop = asyncio.get_running_loop()
            self.orphans[ticket] = loop.call_later(_ORPHAN_S, self._give_up, ticket)
        self._landing.release(ticket, settled=settled)
        self._transport.expect()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._fail(TransferError("the link was closed", code="worker_gone"))
        for timer in self.orphans.values():
            timer.cancel()
        self.orphans.clear()
        self._transport.forget(self, self._name)
        await self._agent.remove_peer(self._name)

    def arrived(self, ticket: int) -> None:
        """The peer has written all that goes under this ticket."""
        if (timer := self.orphans.pop(ticket, None)) is not None:
            timer.cancel()
            self._transport.expect()
        elif self._landing.owner(ticket) is self:
            self._here.add(ticket)
            if (arrival := self.receiving.get(ticket)) is not None and not arrival.done():
                arrival.set_result(None)

    def _give_up(self, ticket: int) -> None:
        del self.orphans[ticket]
        self._transport.expect()

    def _check(self) -> None:
        if self._gone is not None:
            raise TransferError(self._gone.message, code="worker_gone")

    def _fail(self, error: TransferError) -> None:
        """The peer is gone: all waiting calls end, and its tickets are void."""
        self._gone = self._gone or error
        for waiting in (*self._writes, *self.receiving.values()):
            if not waiting.done():
                waiting.set_exception(TransferError(error.message, code="worker_gone"))
        self._landing.reclaim(self, error)
        self._here.clear()
        self._transport.expect()


def _read_card(card: bytes, backend: Backend) -> _Card:
    try:
        peer = msgspec.msgpack.decode(card, type=_Card)
    except msgspec.DecodeError as error:
        raise TransferError(f"this is no card of a nixl transport: {error}", code="transport_unavailable") from None
    if peer.version != _CARD_VERSION or peer.places < 1 or peer.place_bytes < 1:
        message = f"the peer's nixl card is of version {peer.version}, not {_CARD_VERSION}"
        raise TransferError(message, code="transport_unavailable")
    if peer.backend != backend:
        message = f"transfer.nixl_backend is {backend} here and {peer.backend} there; both ends need the same"
        raise TransferError(message, code="transport_unavailable")
    return peer


def _interface(host: str | None) -> str | None:
    """The network interface that has this address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == host for address in addresses):
            return name
    return None


def _join(pieces: Sequence[Run]) -> list[Run]:
    """The same bytes in fewer pieces."""
    joined: list[Run] = []
    for piece in pieces:
        if joined and joined[-1].address + joined[-1].length == piece.address:
            joined[-1] = Run(joined[-1].address, joined[-1].length + piece.length)
        else:
            joined.append(piece)
    return joined
