"""The sender's part of one handoff: spans leave as soon as they are computed and the receiver has room for them.

    published  what the engine has finished, extent by extent (kept: the receiver may come late, or ask again)
    queued     what of it the receiver announced and has not been sent
    sent       spans under way, by number

The engine's blocks may be taken away in the middle (preemption, an abort). Then `reset` comes before anything can be
overwritten, and what is being digested at that moment is thrown away: a digest that leaves this worker was made of the
right bytes. Whatever happens to the bytes after that, the receiver sees that they do not fit their digest.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable

from kv_transfer import permits, wire
from kv_transfer.extents import Extent, cut, joined
from kv_transfer.handoff import Seal
from kv_transfer.kv_memory import Codec, KvMemory, SendBuffer
from kv_transfer.permits import Permit
from kv_transfer.transports.base import LandingLink, ReadLink, Run
from slipstream import telemetry
from slipstream.errors import TransferError

log = telemetry.get_logger(__name__)

# What the receiver reads in one go: long beside the cost of a message, short beside a computation step.
_READ_SPAN_BYTES = 4 << 20
# One span is digested while another one is on its way.
_LANES = 2
# Landing places that one handoff has at most; a receiver gives it eight.
_MOST_TICKETS = 256


class Fence:
    """Counts how often a request's blocks were taken away. Raised by the engine's thread, before they can be
    overwritten; read by the event loop, after it has made a digest."""

    def __init__(self) -> None:
        self.generation = 0


class Receiver:
    """Where a handoff goes: the receiver's connection, its link and its announcement.

    Args:
        peer, session: of the connection (`channel.Channel`). shown: its proof that it was told the handoff's token.
        rank, ranks: the receiver's place in its worker.
    """

    def __init__(
        self,
        post: Callable[[wire.Message], None],
        link: ReadLink | LandingLink,
        codec: Codec | None,
        *,
        peer: bytes,
        session: bytes,
        shown: bytes,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self.post = post
        self.peer = peer
        self.session = session
        self.shown = shown
        self.rank, self.ranks = rank, ranks
        self.landing = link if isinstance(link, LandingLink) else None
        self.codec = codec
        self.first = 0
        self.end = 0
        self.tickets: deque[int] = deque()

    def check(self, permit: Permit) -> None:
        """Raises TransferError, `bad_token`: the handoff is not for this one."""
        if self.peer != permit.receiver:
            raise TransferError("this handoff is for another worker", code="bad_token")
        permits.check(self.shown, permits.opens(permit.token, self.session, permit.handoff), "the receiver")

    def give_way(self, handoff_id: bytes, other: Receiver) -> None:
        """Tell it that another one has opened its handoff. The same connection may also open it again."""
        if self.post != other.post:
            self.post(wire.Closed(handoff_id, "bad_handoff", "another worker has opened this handoff"))


class Outbound:
    """One handoff at its sender. Lives in the agent's event loop.

    Args:
        buffers: send buffers of the agent, for links that need encoded copies.
    """

    def __init__(
        self,
        permit: Permit,
        seal: Seal,
        memory: KvMemory,
        fence: Fence,
        in_thread: Callable[[Callable[[], list[int]], int], Awaitable[list[int]]],
        buffers: asyncio.Queue[SendBuffer],
    ) -> None:
        self.id = permit.handoff
        self.permit = permit
        self.tokens = 0
        self.digest = 0
        self.started = False
        self.computed = False
        self._memory = memory
        self._seal = seal
        self._in_thread = in_thread
        self._buffers = buffers
        self._fence = fence
        self._generation = fence.generation  # that of all that is published and queued
        self._block_ids: list[int] = []
        self._published: list[Extent] = []
        self._queued: deque[Extent] = deque()
        self._sent: dict[int, Extent] = {}
        self._number = 0
        self._receiver: Receiver | None = None
        self._work = asyncio.Event()
        self._sending: asyncio.Task[None] | None = None

    def of_part(self, memory: KvMemory, seal: Seal) -> Outbound:
        """Another one, that has published what this one has, of a part of its memory."""
        other = Outbound(self.permit, seal, memory, self._fence, self._in_thread, self._buffers)
        other.tokens, other.digest, other.started, other.computed = (
            self.tokens,
            self.digest,
            self.started,
            self.computed,
        )
        other._generation, other._block_ids = self._generation, self._block_ids
        other._published = list(self._published)
        return other

    # -- the engine's side --------------------------------------------------------------------------------

    def start(self, tokens: int, digest: int) -> None:
        """The prompt's computation begins."""
        self.tokens, self.digest, self.started = tokens, digest, True
        if self._receiver is not None:
            self._greet(self._receiver)

    def _greet(self, receiver: Receiver) -> None:
        shown = permits.begins(self.permit.token, receiver.session, self.id, self.tokens, self.digest)
        receiver.post(wire.Started(self.id, self.tokens, self.digest, shown))

    def publish(self, generation: int, block_ids: list[int], extent: Extent) -> None:
        """These pieces are finished; `block_ids` is the prompt's block table as far as the extent needs it."""
        if generation != self._generation:
            return
        self._block_ids = block_ids
        self._published.append(extent)
        self._queue(extent)

    def finish(self) -> None:
        """All tokens are computed."""
        self.computed = True
        if self._receiver is not None:
            self._receiver.post(wire.Computed(self.id))

    def reset(self) -> None:
        """The blocks were taken away from the request; it will publish anew from the first one."""
        self._generation = self._fence.generation
        self._published.clear()
        self._queued.clear()
        self._sent.clear()
        self.computed = False

    def end(self, code: str, message: str) -> None:
        """The lease has ended: nothing of this handoff is sent any more."""
        self.reset()
        receiver = self._receiver
        self.detach()
        if receiver is not None:
            receiver.post(wire.Closed(self.id, code, message))

    # -- the receiver's side ------------------------------------------------------------------------------

    def attach(self, receiver: Receiver) -> None:
        """A receiver opened this handoff; another connection that had opened it before gives way.

        Raises:
            TransferError: `bad_token`: the handoff is not for this one.
        """
        receiver.check(self.permit)
        if self._receiver is not None:
            self._receiver.give_way(self.id, receiver)
        self.detach()
        self._receiver = receiver
        if self.started:
            self._greet(receiver)
        if self.computed:
            receiver.post(wire.Computed(self.id))

    def is_attached(self, post: Callable[[wire.Message], None]) -> bool:
        return self._receiver is not None and self._receiver.post == post

    def detach(self) -> None:
        self._receiver = None
        self._queued.clear()
        self._sent.clear()
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None

    def announce(self, first: int, count: int) -> None:
        receiver = self._receiver
        if receiver is None:
            return
        receiver.first, receiver.end = first, first + count
        for extent in self._published:
            self._queue(extent)
        if self._sending is None:
            self._sending = asyncio.create_task(self._send(receiver), name=f"send-{self.id.hex()[:8]}")

    def credit(self, ticket: int) -> None:
        """Raises TransferError, `bad_message`: no receiver has so many landing places."""
        if self._receiver is not None:
            if len(self._receiver.tickets) >= _MOST_TICKETS:
                raise TransferError(f"more than {_MOST_TICKETS} landing places for one handoff", code="bad_message")
            self._receiver.tickets.append(ticket)
            self._work.set()

    def again(self, number: int) -> None:
        extent = self._sent.pop(number, None)
        if extent is not None:  # else it was taken back meanwhile, and will come when it is computed again
            self._queue(extent)

    def _queue(self, extent: Extent) -> None:
        receiver = self._receiver
        if receiver is None or receiver.end == 0:
            return
        wanted = extent.clip(receiver.first, receiver.end)
        if wanted.pieces == 0:
            return
        merged = joined(self._queued[-1], wanted) if self._queued else None
        if merged is not None:
            self._queued[-1] = merged
        else:
            self._queued.append(wanted)
        self._work.set()

    # -- sending ------------------------------------------------------------------------------------------

    async def _send(self, receiver: Receiver) -> None:
        """Send what is queued, for as long as this receiver is attached."""
        try:
            async with asyncio.TaskGroup() as lanes:
                for _ in range(_LANES):
                    lanes.create_task(self._lane(receiver))
        except* TransferError as group:
            error = group.exceptions[0]
            assert isinstance(error, TransferError)
            log.warning("send_failed", handoff=self.id.hex(), code=error.code, error=error.message)
            self._drop(receiver, error)
        except* Exception as group:  # an unforeseen failure must still end the receiver's wait
            log.exception("send_broke", handoff=self.id.hex(), exc_info=group)
            self._drop(receiver, TransferError("the transfer broke", code="internal_error"))

    def _drop(self, receiver: Receiver, error: TransferError) -> None:
        receiver.post(wire.Closed(self.id, error.code, error.message))
        if self._receiver is receiver:  # not another one that has opened the handoff meanwhile
            self._sending = None
            self.detach()

    async def _lane(self, receiver: Receiver) -> None:
        landing = receiver.landing
        limit = landing.span_bytes if landing is not None else _READ_SPAN_BYTES
        while True:
            if not self._queued or (landing is not None and not receiver.tickets):
                self._work.clear()
                await self._work.wait()
                continue
            ticket = receiver.tickets.popleft() if landing is not None else 0
            extent = self._pop(limit)
            if not await self._send_extent(receiver, extent, ticket) and landing is not None:
                receiver.tickets.appendleft(ticket)  # not used

    def _pop(self, limit_bytes: int) -> Extent:
        head = self._queued.popleft()
        parts = list(cut(head, self._memory.piece_bytes, limit_bytes))
        self._queued.extendleft(reversed(parts[1:]))
        return parts[0]

    async def _send_extent(self, receiver: Receiver, extent: Extent, ticket: int) -> bool:
        """False when the blocks were taken away meanwhile."""
        generation, ids = self._generation, self._block_ids
        began_ns = time.monotonic_ns()
        if receiver.codec is not None:
            buffer = await self._buffers.get()
        else:
            buffer = None
        try:
            pieces, digests = await self._prepare(receiver.codec, extent, ids, buffer)
            if generation != self._fence.generation:
                return False
            if receiver.landing is not None:
                await receiver.landing.send(ticket, pieces)
        finally:
            if buffer is not None:
                self._buffers.put_nowait(buffer)
        self._number += 1
        if generation == self._generation:  # else it is not to be sent again: it will be published anew
            self._sent[self._number] = extent
        receiver.post(
            wire.Sent(
                handoff=self.id,
                number=self._number,
                blocks=(extent.first, extent.end - extent.first),
                block_ids=ids[extent.first : extent.end],
                regions=(extent.region, extent.region_end - extent.region),
                digests=digests,
                ticket=ticket,
                length=sum(piece.length for piece in pieces),
                send_ns=time.monotonic_ns() - began_ns,
            )
        )
        return True

    async def _prepare(
        self, codec: Codec | None, extent: Extent, ids: list[int], buffer: SendBuffer | None
    ) -> tuple[list[Run], list[int]]:
        """The bytes to send, and their digests: one a piece."""
        memory, seal = self._memory, self._seal
        pieces = list(extent.each())
        if codec is None or buffer is None:
            runs = [memory.run(region, ids[block]) for region, block in pieces]

            def digest() -> list[int]:
                return [seal.digest(memory.piece(region, ids[block]), block, region) for region, block in pieces]

            return runs, await self._in_thread(digest, sum(run.length for run in runs))

        lengths: list[int] = []

        def encode() -> list[int]:
            digests, offset = [], 0
            for region, block in pieces:
                length = codec.encode([memory.tensor(region, ids[block])], buffer.tensor[offset:])
                digests.append(seal.digest(buffer.view[offset : offset + length], block, region))
                lengths.append(length)
                offset += length
            return digests

        digests = await self._in_thread(encode, buffer.run.length)
        return [Run(buffer.run.address, sum(lengths))], digests
