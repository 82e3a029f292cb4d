"""A sender's end of one receiver's connection: agrees on a way, then routes messages to the handoffs they are about."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from kv_transfer import wire
from kv_transfer.channel import Channel
from kv_transfer.outbound import Outbound, Receiver
from kv_transfer.path_probe import ProbeMemory
from kv_transfer.sender_link import Terms
from kv_transfer.transports.base import LandingLink, ReadLink, Run
from kv_transfer.ways import Transports
from slipstream import telemetry
from slipstream.errors import TransferError

log = telemetry.get_logger(__name__)

# Of one connection at the same time; a receiver that measures asks for four.
_MOST_PROBES = 16


class Handoffs(Protocol):
    """The agent's outbound handoffs."""

    def attach(self, handoff_id: bytes, receiver: Receiver) -> None:
        """A receiver waits for this handoff, which the engine may not know yet."""
        ...

    def find(self, handoff_id: bytes, post: Callable[[wire.Message], None]) -> Outbound | None:
        """What of this handoff goes to the receiver behind this connection."""
        ...

    def taken(self, outbound: Outbound) -> None:
        """The receiver has all it wanted."""
        ...

    def refused(self, handoff_id: bytes, code: str, post: Callable[[wire.Message], None]) -> None:
        """The receiver behind this connection has given the handoff up; it may be another one's by now."""
        ...

    def leave(self, post: Callable[[wire.Message], None]) -> None:
        """The receiver behind this connection is gone."""
        ...


async def serve(
    line: Channel,
    hello: wire.Hello,
    terms: Terms,
    transports: Transports,
    handoffs: Handoffs,
    probed: ProbeMemory,
) -> None:
    """Serve a receiver until it goes.

    Raises:
        TransferError: it went (`worker_gone`), or said something that makes no sense.
    """
    line.post(terms.hello())
    if hello.expected_epoch != terms.epoch:
        raise TransferError("a receiver that looks for an earlier worker at this address", code="worker_gone")
    link: ReadLink | LandingLink | None = None
    codec = "none"
    post = line.post
    probes: set[asyncio.Task[None]] = set()
    try:
        while True:
            message = await line.next()
            match message:
                case wire.Link():
                    if link is not None:
                        await link.close()
                    link, codec = await _link(line, message, terms, transports), message.codec
                case wire.Open() if link is not None:
                    of_codec = terms.codec_of(codec) if isinstance(link, LandingLink) else None
                    rank, ranks = _place(hello, terms)
                    proof = {"peer": line.peer, "session": line.session, "shown": message.shown}
                    handoffs.attach(message.handoff, Receiver(post, link, of_codec, rank=rank, ranks=ranks, **proof))
                case wire.ProbeAsk() if link is not None:
                    if len(probes) >= _MOST_PROBES:
                        raise TransferError(f"more than {_MOST_PROBES} probes at once", code="bad_message")
                    task = asyncio.create_task(_answer_probe(line, link, message, probed))
                    probes.add(task)
                    task.add_done_callback(probes.discard)
                case _:
                    _route(message, handoffs, post)
    finally:
        for task in probes:
            task.cancel()
        handoffs.leave(post)
        if link is not None:
            await link.close()


def _place(hello: wire.Hello, terms: Terms) -> tuple[int, int]:
    """The receiver's rank, and of how many.

    Raises:
        TransferError: it has nothing in common with this rank.
    """
    layout = hello.layout
    if layout is None or not 0 <= layout.rank < layout.ranks or layout.rank not in terms.layout.partners(layout.ranks):
        raise TransferError("a receiver that has no part of this rank's KV heads", code="layout")
    return layout.rank, layout.ranks


def _route(message: wire.Message, handoffs: Handoffs, post: Callable[[wire.Message], None]) -> None:
    handoff_id = getattr(message, "handoff", b"")
    if isinstance(message, wire.Closed):
        handoffs.refused(handoff_id, message.code, post)
        return
    outbound = handoffs.find(handoff_id, post)
    if outbound is None:
        return  # about a handoff that has ended here, or that another receiver has taken over
    match message:
        case wire.Announce():
            outbound.announce(message.first, message.count)
        case wire.Credit():
            outbound.credit(message.ticket)
        case wire.Again():
            outbound.again(message.number)
        case wire.Done():
            handoffs.taken(outbound)
        case _:
            raise TransferError(f"unexpected {type(message).__name__} from a receiver", code="bad_message")


async def _link(line: Channel, ask: wire.Link, terms: Terms, transports: Transports) -> ReadLink | LandingLink | None:
    try:
        async with asyncio.timeout(terms.setup_s):
            transport = await transports.get(ask.way)
            link = await transport.connect(ask.card)
            line.post(wire.Linked(transport.card()))
            return link
    except TransferError as error:
        line.post(wire.Linked(b"", error.message))
    except TimeoutError:
        line.post(wire.Linked(b"", f"{ask.way} was not ready in {terms.setup_s:g} s"))
    return None


async def _answer_probe(line: Channel, link: ReadLink | LandingLink, ask: wire.ProbeAsk, memory: ProbeMemory) -> None:
    try:
        if isinstance(link, LandingLink):
            await link.send(ask.ticket, [Run(memory.run.address, min(ask.length, memory.run.length))])
        line.post(wire.ProbeSent(ask.ticket, memory.run.address, memory.run.length))
    except TransferError as error:
        log.warning("probe_failed", code=error.code, error=error.message)
