"""The transport for workers on different hosts: UCX messages over RDMA where there is some, else over TCP.

A span is one tagged message, its ticket is the tag. The sender copies the pieces into a buffer of its own first, and
`send` returns then: a few spans are on their way while the next ones are computed, and a sender that gives up, or
whose blocks get a new use, cannot harm a span that is still leaving. The receiver looks at the tag of what comes before
it takes it (`ucx_worker`): bytes of a known ticket go straight to its landing place, all else to a bin. A place that
was released while its bytes were on their way is lent out again once UCX is done with it, not before.

Peers connect by the address of the UCX worker in their cards; there is no listener and no port to configure. UCX is
steered by its own environment variables, `UCX_TLS` and `UCX_NET_DEVICES` before all.

Memory is host memory. Shared memory is not among what UCX may pick: its shared-memory transports cannot tell that a
peer has died, and for one host there is the `shm` transport.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import zlib
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from kv_transfer.transports import one_ucx
from kv_transfer.transports.base import Run, Way
from kv_transfer.transports.landing import Landing, gather
from kv_transfer.transports.ucx_devices import RDMA_DEVICES, devices_of, slow_road
from kv_transfer.transports.ucx_worker import Claim, Endpoint, UcxWorker
from slipstream.errors import TransferError

T = TypeVar("T")

# Spans of one link that are on their way at the same time, each with a buffer: enough to keep a network busy while the
# next one is computed.
_STAGED_SPANS = 4
_CONNECT_TIMEOUT_S = 10.0
_GREETING = 0  # a tag that is no ticket
_OPTIONS = {
    # Longer messages are announced before their bytes are sent, which is what lets the receiver choose the place.
    "RNDV_THRESH": "8192",
    # UCX's own 8 KiB a system call cost nearly twice the CPU (a core second a GB, both ends together, instead of 0.6).
    "TCP_TX_SEG_SIZE": "512K",
    "TCP_RX_SEG_SIZE": "512K",
}


class _Card(msgspec.Struct, frozen=True):
    """`check` is the address's CRC-32: UCX reads an address without looking whether it is one."""

    address: bytes
    check: int
    span_bytes: int


@dataclass(eq=False, slots=True)
class _Ticket:
    """Attributes:
    arrived: gets the number of bytes once they are in the place.
    landing: UCX is writing to the place.
    """

    link: UcxLink
    arrived: asyncio.Future[int]
    landing: bool = False
    released: bool = False


class UcxTransport:
    """Args:
    span_bytes: most bytes under one ticket.
    landing_bytes: memory for what comes in, shared by all links; at least one span.
    host: address of the network interface to use; None, or an unspecified address, leaves it to UCX.
    rdma_devices: where the system lists its RDMA devices.
    """

    name = "ucx"

    def __init__(
        self,
        *,
        span_bytes: int,
        landing_bytes: int,
        host: str | None,
        rdma_devices: Path = RDMA_DEVICES,
    ) -> None:
        self._span_bytes = span_bytes
        self._places = max(1, landing_bytes // span_bytes)
        self._host = host
        self._rdma_devices = rdma_devices
        self._worker: UcxWorker | None = None
        self._landing: Landing | None = None
        self._tickets: dict[int, _Ticket] = {}
        self._links: set[UcxLink] = set()

    async def open(self, memory: Sequence[Run]) -> None:
        one_ucx.claim(self.name)
        options = dict(_OPTIONS)
        if self._host is not None and (devices := await devices_of(self._host, self._rdma_devices)):
            options["NET_DEVICES"] = ",".join(devices)
        options = {name: value for name, value in options.items() if f"UCX_{name}" not in os.environ}
        self._worker = await asyncio.to_thread(UcxWorker, options, self._claim, most_bytes=self._span_bytes)
        self._landing = Landing(self._places, self._span_bytes, _pages(self._places * self._span_bytes))
        self._worker.start()

    def card(self) -> bytes:
        address = self._opened().address
        return msgspec.msgpack.encode(_Card(address, zlib.crc32(address), self._span_bytes))

    async def connect(self, card: bytes) -> UcxLink:
        worker = self._opened()
        peer = _read_card(card)
        link = UcxLink(self, worker, peer.address, min(self._span_bytes, peer.span_bytes))
        self._links.add(link)
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                await link.greet()
        except BaseException as error:
            await link.close()
            if isinstance(error, TransferError | TimeoutError):
                cause = error.message if isinstance(error, TransferError) else f"no answer in {_CONNECT_TIMEOUT_S:g} s"
                raise TransferError(
                    f"UCX does not reach the peer: {cause} (UCX_NET_DEVICES and transfer.host choose the network)",
                    code="transport_unavailable",
                ) from error
            raise
        lanes = link.lanes()
        link.way = Way(self.name, "+".join(lanes) or "unknown", slow_road(lanes, self._rdma_devices))
        return link

    async def close(self) -> None:
        for link in list(self._links):
            await link.close()
        if self._worker is not None:
            await self._worker.stop()
        self._worker = None
        self._tickets.clear()

    async def grant(self, link: UcxLink) -> int:
        """A ticket for the link's peer."""
        assert self._landing is not None
        if self._landing.granted < self._landing.places:
            number = await self._landing.grant()  # at once
        else:
            number = await link.unless_it_ends(self._landing.grant(), undo=self._landing.release)
        self._tickets[number] = _Ticket(link, asyncio.get_running_loop().create_future())
        return number

    def arrival(self, number: int) -> asyncio.Future[int]:
        """Becomes the number of bytes under a ticket.

        Raises:
            TransferError: `bad_handoff`: the ticket is not granted.
        """
        ticket = self._tickets.get(number)
        if ticket is None:
            raise TransferError(f"ticket {number} is not granted", code="bad_handoff")
        return ticket.arrived

    def place(self, number: int) -> memoryview:
        """The place of a ticket."""
        assert self._landing is not None
        return self._landing.place(number)

    def release(self, number: int) -> None:
        """The ticket is not wanted any more."""
        ticket = self._tickets.pop(number, None)
        if ticket is None:
            return
        ticket.released = True
        if not ticket.arrived.done():
            _set_error(ticket.arrived, TransferError(f"ticket {number} was released", code="bad_handoff"))
        if not ticket.landing:
            self._give_back(number)

    def forget(self, link: UcxLink) -> None:
        """Release all tickets of a link that has ended."""
        self._links.discard(link)
        for number in [number for number, ticket in self._tickets.items() if ticket.link is link]:
            self.release(number)

    def _opened(self) -> UcxWorker:
        if self._worker is None:
            raise TransferError("the ucx transport is not open", code="transport_unavailable")
        return self._worker

    def _claim(self, tag: int, length: int) -> Claim | None:
        ticket = self._tickets.get(tag)
        if ticket is None or ticket.landing or ticket.arrived.done() or length > self._span_bytes:
            return None
        ticket.landing = True
        return Claim(self.place(tag), lambda error: self._landed(tag, ticket, length, error))

    def _landed(self, number: int, ticket: _Ticket, length: int, error: Exception | None) -> None:
        ticket.landing = False
        if ticket.released:
            self._give_back(number)
        elif error is None:
            ticket.arrived.set_result(length)
        else:
            _set_error(ticket.arrived, TransferError(f"a span broke off on its way: {error}", code="worker_gone"))

    def _give_back(self, number: int) -> None:
        if self._landing is not None:
            self._landing.release(number)


class UcxLink:
    """Spans to and from one peer. Made by `UcxTransport.connect`."""

    def __init__(self, transport: UcxTransport, worker: UcxWorker, address: bytes, span_bytes: int) -> None:
        self.way = Way(transport.name, "unknown")
        self.span_bytes = span_bytes
        self._transport = transport
        self._worker = worker
        self._slots = asyncio.Semaphore(_STAGED_SPANS)
        self._buffers: list[memoryview] = []
        self._ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._endpoint: Endpoint = worker.connect(address, self._end)

    async def greet(self) -> None:
        """Say a word that the peer throws away: once it has left, the two UCX workers are connected."""
        said: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def done(error: Exception | None) -> None:
            if error is not None:
                self._end(f"the peer cannot be reached: {error}")
            elif not said.done():
                said.set_result(None)

        self._worker.send(self._endpoint, memoryview(bytearray(1)), _GREETING, done)
        await self._first_of(said)

    def lanes(self) -> list[str]:
        """What UCX uses for this link, as `transport/device`."""
        return self._worker.lanes(self._endpoint)

    async def grant(self) -> int:
        self._check()
        return await self._transport.grant(self)

    async def send(self, ticket: int, pieces: Sequence[Run]) -> None:
        self._check()
        length = sum(piece.length for piece in pieces)
        if not 0 < length <= self.span_bytes:
            raise TransferError(
                f"a span of {length} bytes; a landing place holds 1 to {self.span_bytes}", code="bad_handoff"
            )
        if self._slots.locked():
            await self.unless_it_ends(self._slots.acquire(), undo=lambda _: self._slots.release())
        else:
            await self._slots.acquire()  # at once
        buffer = self._buffers.pop() if self._buffers else _pages(self.span_bytes)
        gather(pieces, buffer)
        self._worker.send(self._endpoint, buffer[:length], ticket, lambda error: self._sent(buffer, error))

    async def receive(self, ticket: int, length: int) -> memoryview:
        arrived = self._transport.arrival(ticket)
        if not arrived.done():
            self._check()
            await self._first_of(arrived)
        if arrived.result() != length:
            raise TransferError(f"a span of {arrived.result()} bytes came for one of {length}", code="bad_handoff")
        return self._transport.place(ticket)[:length]

    def release(self, ticket: int) -> None:
        self._transport.release(ticket)

    async def close(self) -> None:
        self._end("the link was closed")
        await self._worker.disconnect(self._endpoint)

    async def unless_it_ends(self, work: Coroutine[Any, Any, T], undo: Callable[[T], object]) -> T:
        """Wait for `work` while the link lasts; what it gets too late for the caller is given to `undo`."""
        task = asyncio.ensure_future(work)
        try:
            await self._first_of(task)
        except BaseException:
            task.add_done_callback(lambda done: done.cancelled() or undo(done.result()))
            task.cancel()
            raise
        return task.result()

    async def _first_of(self, future: asyncio.Future[T]) -> None:
        """Return when `future` is done; raise when the link has ended meanwhile, which ends other things too."""
        await asyncio.wait((future, self._ended), return_when=asyncio.FIRST_COMPLETED)
        self._check()

    def _check(self) -> None:
        if self._ended.done():
            raise TransferError(self._ended.result(), code="worker_gone")

    def _sent(self, buffer: memoryview, error: Exception | None) -> None:
        if error is not None:
            self._end(f"a span could not be sent: {error}")
        elif not self._ended.done():
            self._buffers.append(buffer)
        self._slots.release()

    def _end(self, reason: str) -> None:
        if not self._ended.done():
            self._ended.set_result(reason)
            self._buffers.clear()
            self._transport.forget(self)


def _read_card(card: bytes) -> _Card:
    try:
        read = msgspec.msgpack.decode(card, type=_Card)
    except msgspec.MsgspecError as error:
        raise TransferError(f"an unreadable transport card: {error}", code="bad_message") from error
    if not read.address or zlib.crc32(read.address) != read.check or read.span_bytes < 1:
        raise TransferError("a transport card that was not made by the ucx transport", code="bad_message")
    return read


def _set_error(future: asyncio.Future[int], error: TransferError) -> None:
    """Fail a future for which perhaps nobody ever asks."""
    future.set_exception(error)
    future.exception()


def _pages(length: int) -> memoryview:
    """Memory that takes no room before it is used."""
    return memoryview(mmap.mmap(-1, length))
