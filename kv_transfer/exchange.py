"""What the transfer agent does inside its event loop: all handoffs, in both directions, and the connections they use.

`TransferAgent` hands the engine's wishes over to the methods under "the engine"; connections from receivers come in
through `converse`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

from kv_transfer import receiver_link, wire
from kv_transfer.channel import Channel
from kv_transfer.door import Door
from kv_transfer.extents import Extent
from kv_transfer.gathered import Gathered
from kv_transfer.handoff import Handoff, Seal, check
from kv_transfer.inbound import Inbound, Tally, Want
from kv_transfer.kv_memory import KvMemory, SendBuffer
from kv_transfer.outbound import Fence, Outbound, Receiver
from kv_transfer.path_probe import ProbeMemory
from kv_transfer.permits import TOKEN_BYTES, Permit
from kv_transfer.sender_link import SenderLink, Terms
from kv_transfer.spread import Spread
from kv_transfer.ways import Transports
from slipstream import telemetry
from slipstream.errors import TransferError

log = telemetry.get_logger(__name__)

T = TypeVar("T")

# What is copied and digested in about the time that it takes to wake a thread and to be woken by it.
_SMALL_BYTES = 1 << 20
_IDLE_LINK_S = 600.0
_PROBE_S = 20.0
# Receivers that wait for handoffs of which the engine has not heard; each has a request in its worker's engine.
_MOST_PARKED = 8192


@dataclass(frozen=True, slots=True)
class Started:
    """A sender has begun to compute: its prompt has `tokens` tokens with this digest."""

    request_id: str
    tokens: int
    digest: int


@dataclass(frozen=True, slots=True)
class Received:
    """A handoff has ended here; `error` is None when all blocks have come."""

    request_id: str
    tally: Tally
    error: TransferError | None


@dataclass(frozen=True, slots=True)
class Taken:
    """A receiver has a checked copy of all it wanted of this handoff, or (`refused`) does not want it any more."""

    handoff_id: bytes
    refused: str = ""


Event = Started | Received | Taken


@dataclass(frozen=True, slots=True)
class Limits:
    """Times and sizes; `slipstream.settings.TransferSettings` has the same names.

    Attributes:
        parked_s: how long a receiver may wait for a handoff of which the engine has not heard.
        span_bytes: of one landing place and one send buffer.
    """

    timeout_s: float
    parked_s: float
    resend_budget: int
    span_bytes: int


@dataclass(slots=True)
class _Parked:
    receiver: Receiver
    until_s: float


class Exchange:
    """See the module's docstring.

    Args:
        happened: takes what the engine should know.
        pool: for copying and digesting.
        buffers: for links that send encoded copies. probed: what is sent when a peer measures the way.
    """

    def __init__(
        self,
        memory: KvMemory,
        door: Door,
        terms: Terms,
        limits: Limits,
        transports: Transports,
        happened: Callable[[Event], None],
        pool: Executor,
        buffers: list[SendBuffer],
        probed: ProbeMemory,
    ) -> None:
        self._memory = memory
        self._door = door
        self._terms = terms
        self._limits = limits
        self._transports = transports
        self._happened = happened
        self._pool = pool
        self._buffers: asyncio.Queue[SendBuffer] = asyncio.Queue()
        for buffer in buffers:
            self._buffers.put_nowait(buffer)
        self._inbounds: dict[str, Gathered] = {}
        self._outbounds: dict[bytes, Spread] = {}
        self._parked: dict[bytes, list[_Parked]] = {}  # one for each rank of the receiver
        self._links: dict[tuple[str, int, bytes], SenderLink] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._probed = probed

    async def tidy(self) -> None:
        """For ever: turn receivers away that wait for what is never computed; close links that nobody uses."""
        while True:
            await asyncio.sleep(min(1.0, self._limits.parked_s / 4))
            now_s = time.monotonic()
            for handoff_id, parked in list(self._parked.items()):
                if now_s > max(one.until_s for one in parked):
                    del self._parked[handoff_id]
                    for one in parked:
                        one.receiver.post(
                            wire.Closed(handoff_id, "unknown_handoff", "the sender was not asked for this prompt")
                        )
            for key, link in list(self._links.items()):
                if link.ended or (not link.busy and now_s - link.last_used_s > _IDLE_LINK_S):
                    del self._links[key]
                    link.close()

    async def close(self) -> None:
        """End everything; handoffs under way fail."""
        for gathered in list(self._inbounds.values()):
            gathered.cancel()
        while self._tasks:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._transports.close()

    def _spawn(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _in_thread(self, work: Callable[[], T], size_bytes: int) -> T:
        """Run work on so many bytes in a copy thread, or here when that is quicker than waking a thread.

        Cancelled, it still waits for the end: the work may be writing to KV blocks.
        """
        if size_bytes <= _SMALL_BYTES:
            return work()
        future = asyncio.get_running_loop().run_in_executor(self._pool, work)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            while not future.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([future])
            if not future.cancelled():
                future.exception()  # seen
            raise

    # -- the engine, as a receiver ------------------------------------------------------------------------

    def open(self, request_id: str, handoff: Handoff) -> None:
        try:
            addresses = check(handoff).addresses
            sources = self._terms.layout.partners(len(addresses))
        except TransferError as error:
            self._door.count(error)
            self._happened(Received(request_id, Tally(), error))
            return
        gathered = Gathered(
            len(sources),
            on_started=lambda tokens, digest: self._happened(Started(request_id, tokens, digest)),
            on_end=lambda error: self._received(request_id, error),
        )
        self._inbounds[request_id] = gathered
        for rank in sources:
            source = Handoff(handoff.id, addresses[rank], handoff.epoch, handoff.key, handoff.token)
            self._open_part(request_id, gathered, source, rank, len(addresses))

    def _open_part(self, request_id: str, gathered: Gathered, source: Handoff, rank: int, ranks: int) -> None:
        """Receive from this rank of the sender what it has for this one."""
        here, there = self._terms.layout.share(rank, ranks), self._terms.layout.seen_from(rank, ranks)
        inbound = Inbound(
            handoff=source,
            memory=self._memory.part(here.part, here.parts),
            in_thread=self._in_thread,
            on_started=gathered.started,
            on_end=lambda error: self._received_part(gathered, source, error),
            timeout_s=self._limits.timeout_s,
            budget=self._limits.resend_budget,
            shard=here.shard,
            source=(there.part, there.parts),
        )
        gathered.add(inbound, wanted=here.first)
        self._spawn(self._link_to(source).open(inbound), f"open-{request_id}")

    def _received_part(self, gathered: Gathered, source: Handoff, error: TransferError | None) -> None:
        link = self._links.get(_key(source))
        if link is not None:
            link.forget(source.id)
        gathered.ended(error)

    def receive(self, request_id: str, want: Want) -> None:
        gathered = self._inbounds.get(request_id)
        if gathered is not None:  # else it has failed, and `Received` has said so
            gathered.receive(want)

    def cancel(self, request_id: str) -> None:
        gathered = self._inbounds.get(request_id)
        if gathered is not None:
            gathered.cancel()

    def _received(self, request_id: str, error: TransferError | None) -> None:
        gathered = self._inbounds.pop(request_id)
        self._happened(Received(request_id, gathered.tally, error))

    def _link_to(self, handoff: Handoff) -> SenderLink:
        key = _key(handoff)
        link = self._links.get(key)
        if link is None or link.ended:
            link = self._links[key] = SenderLink(*key, self._door, self._terms, self._transports)
            link.start(self._spawn)
        return link

    # -- the engine, as a sender --------------------------------------------------------------------------

    def expect(self, permit: Permit, fence: Fence) -> None:
        if permit.handoff in self._outbounds or len(permit.token) != TOKEN_BYTES:
            return
        outbound = self._outbound(permit, fence)
        self._outbounds[permit.handoff] = outbound
        for parked in self._parked.pop(permit.handoff, ()):
            self._attach(outbound, parked.receiver)

    def _outbound(self, permit: Permit, fence: Fence) -> Spread:
        seal = Seal(permit.handoff, self._terms.epoch, permit.token)
        return Spread(Outbound(permit, seal, self._memory, fence, self._in_thread, self._buffers), self._part)

    def _part(self, whole: Outbound, receiver: Receiver) -> Outbound:
        """What a rank of the receiver gets."""
        share, permit = self._terms.layout.share(receiver.rank, receiver.ranks), whole.permit
        seal = Seal(permit.handoff, self._terms.epoch, permit.token, share.shard)
        return whole.of_part(self._memory.part(share.part, share.parts), seal)

    def begin(self, handoff_id: bytes, tokens: int, digest: int) -> None:
        outbound = self._outbounds.get(handoff_id)
        if outbound is not None:  # else nobody may have it
            outbound.start(tokens, digest)

    def publish(self, handoff_id: bytes, generation: int, block_ids: list[int], extent: Extent) -> None:
        outbound = self._outbounds.get(handoff_id)
        if outbound is not None:
            outbound.publish(generation, block_ids, extent)

    def computed(self, handoff_id: bytes) -> None:
        outbound = self._outbounds.get(handoff_id)
        if outbound is not None:
            outbound.finish()

    def reset(self, handoff_id: bytes) -> None:
        outbound = self._outbounds.get(handoff_id)
        if outbound is not None:
            outbound.reset()

    def end(self, handoff_id: bytes, code: str, message: str) -> None:
        outbound = self._outbounds.pop(handoff_id, None)
        if outbound is not None:
            outbound.end(code, message)
            return
        for parked in self._parked.pop(handoff_id, ()):
            parked.receiver.post(wire.Closed(handoff_id, code, message))

    # -- receivers ----------------------------------------------------------------------------------------

    def welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection was accepted."""
        self._spawn(self._converse(reader, writer), "receiver")

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with self._door.welcomed(reader, writer) as line:
                hello = await line.next()
                if line.peer == self._door.owner:
                    await self._obey(line, hello)
                elif isinstance(hello, wire.Hello):
                    await self._serve(line, hello)
        except TransferError as error:
            log.info("receiver_left", code=error.code, reason=error.message)

    async def _obey(self, line: Channel, said: wire.Message) -> None:
        """What this worker's own service wants."""
        if isinstance(said, wire.Registered):
            self._door.peers.set(said.keys)
            line.post(wire.Noted())
        elif isinstance(said, wire.ProbePeer):
            line.post(await self._probe_peer(said))
        await line.drained()

    async def _serve(self, line: Channel, hello: wire.Hello) -> None:
        try:
            await receiver_link.serve(line, hello, self._terms, self._transports, self, self._probed)
        except TransferError as error:
            self._door.count(error)
            raise

    def attach(self, handoff_id: bytes, receiver: Receiver) -> None:
        """See `receiver_link.Handoffs`."""
        outbound = self._outbounds.get(handoff_id)
        if outbound is not None:
            self._attach(outbound, receiver)
            return
        if sum(map(len, self._parked.values())) >= _MOST_PARKED:
            receiver.post(wire.Closed(handoff_id, "unknown_handoff", f"{_MOST_PARKED} receivers wait already"))
            return
        stay = []
        for one in self._parked.get(handoff_id, ()):
            if one.receiver.ranks == receiver.ranks and one.receiver.rank != receiver.rank:
                stay.append(one)
            else:
                one.receiver.give_way(handoff_id, receiver)
        self._parked[handoff_id] = [*stay, _Parked(receiver, time.monotonic() + self._limits.parked_s)]

    def _attach(self, outbound: Spread, receiver: Receiver) -> None:
        """Let it have the blocks if they are for it: the worker that was told the token, and is registered still."""
        try:
            if receiver.peer not in self._door.peers:
                raise TransferError("the receiver is not registered any more", code="not_registered")
            outbound.attach(receiver)
        except TransferError as error:
            self._door.count(error)
            log.warning("handoff_refused", handoff=outbound.id.hex(), code=error.code, reason=error.message)
            receiver.post(wire.Closed(outbound.id, error.code, error.message))

    def find(self, handoff_id: bytes, post: Callable[[wire.Message], None]) -> Outbound | None:
        """See `receiver_link.Handoffs`."""
        spread = self._outbounds.get(handoff_id)
        return spread.of(post) if spread is not None else None

    def taken(self, outbound: Outbound) -> None:
        """See `receiver_link.Handoffs`."""
        spread = self._outbounds[outbound.id]
        if spread.taken(outbound, len(self._terms.layout.partners(spread.ranks))):
            self._happened(Taken(outbound.id))

    def refused(self, handoff_id: bytes, code: str, post: Callable[[wire.Message], None]) -> None:
        """See `receiver_link.Handoffs`."""
        outbound = self.find(handoff_id, post)
        if outbound is not None:
            outbound.detach()
            self._happened(Taken(handoff_id, refused=code))
        else:
            self._leave_parking(handoff_id, post)

    def leave(self, post: Callable[[wire.Message], None]) -> None:
        """See `receiver_link.Handoffs`."""
        for spread in self._outbounds.values():
            outbound = spread.of(post)
            if outbound is not None:
                outbound.detach()
                # At its end, too, the loss of the connection has ended the handoff. Waiting for the caller's connection
                # to be found dead as well would keep the blocks for half a minute when a network is cut.
                self._happened(Taken(outbound.id, refused="worker_gone"))
        for handoff_id in list(self._parked):
            self._leave_parking(handoff_id, post)

    def _leave_parking(self, handoff_id: bytes, post: Callable[[wire.Message], None]) -> None:
        left = [one for one in self._parked.get(handoff_id, ()) if one.receiver.post != post]
        if left:
            self._parked[handoff_id] = left
        else:
            self._parked.pop(handoff_id, None)

    # -- probes -------------------------------------------------------------------------------------------

    async def _probe_peer(self, ask: wire.ProbePeer) -> wire.ProbeResult:
        """Over the link that handoffs use, or, for a named transport, over one of its own."""
        if ask.transport:
            link = SenderLink(
                ask.address, ask.epoch, ask.key, self._door, self._terms, self._transports, asked=ask.transport
            )
            link.start(self._spawn)
        else:
            link = self._link_to(Handoff(b"", ask.address, ask.epoch, ask.key, b""))
        try:
            return await link.measure(_PROBE_S)
        except TransferError as error:
            return wire.ProbeResult(error=error.message)
        finally:
            if ask.transport:
                link.close()


def _key(handoff: Handoff) -> tuple[str, int, bytes]:
    return handoff.address, handoff.epoch, handoff.key
