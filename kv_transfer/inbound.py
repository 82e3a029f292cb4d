"""The receiver's part of one handoff: spans come in, are checked, and count when they are intact.

A piece counts once its bytes lie in the KV cache and fit their digest. What does not fit is asked for again, a limited
number of times. Blocks are in nobody's use before all pieces have come: vLLM keeps the request waiting.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from kv_transfer import permits, wire
from kv_transfer.handoff import Handoff, Seal
from kv_transfer.kv_memory import Codec, KvMemory, tensor_of
from kv_transfer.layout import Layout
from kv_transfer.transports.base import LandingLink, ReadLink
from slipstream import telemetry
from slipstream.errors import TransferError

log = telemetry.get_logger(__name__)

# Spans that are taken at the same time: one is copied while another one is digested.
_LANES = 2
# Landing places that one handoff has at the same time: few while its prompt is still being computed, more as spans
# come, so that slow senders do not sit on places that others could use.
_FIRST_PLACES = 2
_MOST_PLACES = 8
# Far above what a prompt's layers and chunks come to: without a bound a broken sender could fill the memory.
_MOST_WAITING_SPANS = 1 << 16
# What a sender may say of the time that a span took it: more is nonsense, and would spoil the figures.
_MOST_SEND_NS = 600 * 10**9


@dataclass(slots=True)
class Tally:
    """What one handoff moved and how long it took.

    Attributes:
        wire_bytes: bytes that travelled; less than the blocks' bytes when compressed.
        busy_s: time spent in digesting, sending, copying and checking, both sides together.
        exposed_s: from the last computed token to the last checked block: the part that decode waited for.
        again: spans that had to be sent again.
    """

    blocks: int = 0
    wire_bytes: int = 0
    busy_s: float = 0.0
    exposed_s: float = 0.0
    again: int = 0
    way: str = ""


class _Piece(NamedTuple):
    """One piece of a span. `source` and `target` are block ids there and here; `offset` is in the landed bytes."""

    region: int
    block: int
    source: int
    target: int
    digest: int
    offset: int
    length: int

    @property
    def place(self) -> tuple[int, int]:
        return self.region, self.block


class State(Enum):
    OPEN = "open"  # waits for the prompt's computation to begin
    STARTED = "started"  # it has begun; decode has announced nothing yet
    RECEIVING = "receiving"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Sender:
    """Where a handoff comes from: the sender's connection, its link, and where its blocks lie.

    Attributes:
        session: of the connection; see `greeting.Session.id`.
    """

    post: Callable[[wire.Message], None]
    session: bytes
    link: ReadLink | LandingLink
    codec: Codec | None
    layout: Layout


@dataclass(slots=True)
class Want:
    """Blocks `first`... of the prompt, and the block ids here that they go to."""

    first: int
    targets: Sequence[int]


@dataclass(slots=True)
class Inbound:
    """One handoff at its receiver. Lives in the agent's event loop.

    Args:
        on_started: called once with (tokens, digest) when the prompt's computation begins.
        on_end: called once with None, or with the error that ended it.
        timeout_s: longest wait for a span once everything is computed.
        budget: spans that may be asked for again.
        memory: where the blocks go; shard: which part of the KV heads that is.
        source: the same part of the sender's blocks: which of how many.
    """

    handoff: Handoff
    memory: KvMemory
    in_thread: Callable[[Callable[[], bool], int], Awaitable[bool]]
    on_started: Callable[[int, int], None]
    on_end: Callable[[TransferError | None], None]
    timeout_s: float
    budget: int
    shard: int = 0
    source: tuple[int, int] = (0, 1)
    state: State = State.OPEN
    tally: Tally = field(default_factory=Tally)
    _seal: Seal = field(init=False)
    _want: Want | None = None
    _missing: set[tuple[int, int]] = field(default_factory=set)
    _claimed: set[tuple[int, int]] = field(default_factory=set)  # that a lane is writing
    _unclaimed: asyncio.Event = field(default_factory=asyncio.Event)
    _spans: asyncio.Queue[wire.Sent] = field(default_factory=asyncio.Queue)
    _post: Callable[[wire.Message], None] | None = None
    _session: bytes = b""
    _reading: ReadLink | None = None
    _landing: LandingLink | None = None
    _source: Layout | None = None
    _codec: Codec | None = None
    _tickets: set[int] = field(default_factory=set)
    _computed_at: float | None = None
    _taking: asyncio.Task[None] | None = None
    _places: int = _FIRST_PLACES
    _freed: asyncio.Event = field(default_factory=asyncio.Event)
    _progress: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._seal = Seal(self.handoff.id, self.handoff.epoch, self.handoff.token, self.shard)

    # -- what the connection does -------------------------------------------------------------------------

    def connected(self, way: Sender) -> None:
        """There is a way; ask for the handoff."""
        post, link = way.post, way.link
        self._post, self._codec, self._session = post, way.codec, way.session
        self._source = way.layout.part(*self.source)
        if isinstance(link, ReadLink):
            self._reading = link
        else:
            self._landing = link
        self.tally.way = str(link.way)
        handoff = self.handoff
        post(wire.Open(handoff.id, permits.opens(handoff.token, way.session, handoff.id)))

    def started(self, message: wire.Started) -> None:
        """Raises TransferError, `bad_token`: who dispatched the request has not told the sender of this handoff."""
        if self.state is not State.OPEN:
            return
        handoff, tokens, digest = self.handoff, message.tokens, message.digest
        shown = permits.begins(handoff.token, self._session, handoff.id, tokens, digest)
        permits.check(message.shown, shown, "the sender")
        self.state = State.STARTED
        self.on_started(tokens, digest)

    def computed(self) -> None:
        if self._computed_at is None:
            self._computed_at = time.monotonic()
            self._progress.set()  # the deadline counts from here

    def sent(self, span: wire.Sent) -> None:
        """Raises TransferError, `bad_message`: so many cannot wait of one handoff."""
        if self._spans.qsize() >= _MOST_WAITING_SPANS:
            raise TransferError(f"more than {_MOST_WAITING_SPANS} spans of one handoff wait", code="bad_message")
        self._spans.put_nowait(span)

    def failed(self, error: TransferError) -> None:
        """The connection, the link or the sender has given up."""
        self._end(error)

    # -- what the engine asks -----------------------------------------------------------------------------

    def receive(self, want: Want) -> None:
        """The blocks are allocated: let them come."""
        if self.state is State.ENDED:
            return
        assert self._post is not None
        self._want = want
        self.state = State.RECEIVING
        count = len(want.targets)
        regions = range(len(self.memory.piece_bytes))
        self._missing = {(region, block) for region in regions for block in range(want.first, want.first + count)}
        self._taking = asyncio.create_task(self._take_all(), name=f"take-{self.handoff.id.hex()[:8]}")

    @property
    def ended(self) -> bool:
        return self.state is State.ENDED

    def cancel(self) -> None:
        """Nobody waits for it any more. The blocks are not touched once `on_end` has been called."""
        self._end(TransferError("given up by its owner", code="cancelled"))

    def _end(self, error: TransferError | None) -> None:
        if self.state is State.ENDED:
            return
        self.state = State.ENDED
        if self._taking is not None and self._taking is not asyncio.current_task():
            self._taking.cancel()  # calls `on_end` when no thread writes to the blocks any more
            self._taking.add_done_callback(lambda _: self._settle(error))
        else:
            self._settle(error)

    def _settle(self, error: TransferError | None) -> None:
        for ticket in self._tickets:
            assert self._landing is not None
            self._landing.release(ticket)
        self._tickets.clear()
        if self._post is not None:
            if error is None:
                self._post(wire.Done(self.handoff.id))
            else:
                self._post(wire.Closed(self.handoff.id, error.code, error.message))
        self.on_end(error)

    # -- taking spans -------------------------------------------------------------------------------------

    async def _take_all(self) -> None:
        want = self._want
        assert want is not None
        assert self._post is not None
        error: TransferError | None = None
        try:
            self._post(wire.Announce(self.handoff.id, want.first, len(want.targets)))
            async with asyncio.TaskGroup() as lanes:
                running = [lanes.create_task(self._lane(want)) for _ in range(_LANES)]
                if self._landing is not None:
                    running.append(lanes.create_task(self._grant(self._landing)))
                lanes.create_task(self._until_complete(running))
        except* TransferError as group:
            first = group.exceptions[0]
            assert isinstance(first, TransferError)
            error = first
        except* Exception as group:  # an unforeseen failure must still end the wait: the prompt is computed here
            log.exception("take_failed", handoff=self.handoff.id.hex(), exc_info=group)
            error = TransferError("the transfer broke", code="internal_error")
        self.tally.blocks = len(want.targets) if error is None else 0
        if self._computed_at is not None and error is None:
            self.tally.exposed_s = max(0.0, time.monotonic() - self._computed_at)
        self._end(error)

    async def _grant(self, link: LandingLink) -> None:
        """Give the sender landing places, and new ones as they become free."""
        assert self._post is not None
        while True:
            while len(self._tickets) >= self._places:
                self._freed.clear()
                await self._freed.wait()
            ticket = await link.grant()
            self._tickets.add(ticket)
            self._post(wire.Credit(self.handoff.id, ticket))

    async def _until_complete(self, running: list[asyncio.Task[None]]) -> None:
        """Ends the lanes when all has come; the deadline counts from the last sign of progress after computation."""
        while self._missing:
            before = len(self._missing)
            self._progress.clear()
            try:
                async with asyncio.timeout(self.timeout_s):
                    await self._progress.wait()
            except TimeoutError as error:
                if self._computed_at is not None and before == len(self._missing):
                    raise TransferError(
                        f"{before} pieces did not come in transfer.timeout_s = {self.timeout_s:g} s", code="timeout"
                    ) from error
        for task in running:
            task.cancel()

    async def _lane(self, want: Want) -> None:
        while True:
            span = await self._spans.get()
            began = time.monotonic()
            try:
                intact = await self._take(span, want)
            finally:
                if span.ticket:
                    self._give_back(span.ticket)
            self.tally.busy_s += min(span.send_ns, _MOST_SEND_NS) / 1e9 + time.monotonic() - began
            self.tally.wire_bytes += span.length
            if not intact:
                self._ask_again(span)
            self._progress.set()

    def _give_back(self, ticket: int) -> None:
        if ticket in self._tickets:
            assert self._landing is not None
            self._tickets.discard(ticket)
            self._places = min(self._places + 1, _MOST_PLACES)
            self._landing.release(ticket)
            self._freed.set()

    def _ask_again(self, span: wire.Sent) -> None:
        assert self._post is not None
        self.tally.again += 1
        log.warning("span_not_intact", handoff=self.handoff.id.hex(), blocks=span.blocks, regions=span.regions)
        if self.tally.again > self.budget:
            raise TransferError(
                f"{self.tally.again} spans were not intact (transfer.resend_budget = {self.budget})", code="digest"
            )
        self._post(wire.Again(self.handoff.id, span.number))

    async def _take(self, span: wire.Sent, want: Want) -> bool:
        """Bring the span's pieces to where they belong. False when one is not intact."""
        wanted = await self._claim(self._pieces(span, want))
        try:
            intact = await self._write(span, wanted) if wanted else True
            if intact:
                self._missing.difference_update(piece.place for piece in wanted)
            return intact
        finally:
            self._claimed.difference_update(piece.place for piece in wanted)
            self._unclaimed.set()

    async def _claim(self, pieces: list[_Piece]) -> list[_Piece]:
        """The pieces that are still missing. While another lane writes to one of them this one waits.

        After a preemption the same piece comes a second time, and the first copy may have been of blocks with a new
        use: written late, it would destroy the second one, which has been checked.
        """
        while True:
            wanted = [piece for piece in pieces if piece.place in self._missing]
            if self._claimed.isdisjoint(piece.place for piece in wanted):
                self._claimed.update(piece.place for piece in wanted)
                return wanted
            self._unclaimed.clear()
            await self._unclaimed.wait()

    async def _write(self, span: wire.Sent, wanted: list[_Piece]) -> bool:
        reading, landing = self._reading, self._landing
        if reading is not None:
            return await self.in_thread(lambda: self._read(reading, wanted), span.length)
        if landing is None or span.ticket not in self._tickets:
            raise TransferError("a span under a ticket that was not given", code="bad_message")
        try:
            async with asyncio.timeout(self.timeout_s):
                data = await landing.receive(span.ticket, span.length)
        except TimeoutError as error:
            raise TransferError(
                f"a span did not arrive in transfer.timeout_s = {self.timeout_s:g} s", code="timeout"
            ) from error
        return await self.in_thread(lambda: self._unpack(data, wanted), span.length)

    def _pieces(self, span: wire.Sent, want: Want) -> list[_Piece]:
        """What the span says it holds.

        Raises:
            TransferError: `bad_message`: it cannot hold that.
        """
        (first, count), (region, regions) = span.blocks, span.regions
        sizes = self.memory.piece_bytes
        inside = want.first <= first and first + count <= want.first + len(want.targets)
        if not inside or not 0 <= region <= region + regions <= len(sizes):
            raise TransferError(
                f"a span outside of what was announced: {span.blocks} {span.regions}", code="bad_message"
            )
        if len(span.digests) != count * regions or len(span.block_ids) != count:
            raise TransferError(f"a span of {count} blocks has {len(span.digests)} digests", code="bad_message")
        pieces, offset = [], 0
        for number, (of_region, index) in enumerate(
            (r, i) for r in range(region, region + regions) for i in range(count)
        ):
            length = sizes[of_region] if self._codec is None else self._codec.encoded_bytes(sizes[of_region])
            target = want.targets[first + index - want.first]
            pieces.append(
                _Piece(of_region, first + index, span.block_ids[index], target, span.digests[number], offset, length)
            )
            offset += length
        if offset != span.length:
            raise TransferError(f"a span of {span.length} bytes, its pieces have {offset}", code="bad_message")
        return pieces

    def _read(self, link: ReadLink, pieces: list[_Piece]) -> bool:
        """In a thread: copy out of the sender's memory, then look at the copy. What is not intact does not stay."""
        memory = self.memory
        assert self._source is not None
        sources = [self._source.run(piece.region, piece.source) for piece in pieces]
        try:
            link.read(sources, [memory.run(piece.region, piece.target) for piece in pieces])
        except TransferError:
            for piece in pieces:
                memory.clear(piece.region, piece.target)
            raise
        intact = [self._kept_if_intact(piece) for piece in pieces]  # all of them: every bad one has to be cleared
        return all(intact)

    def _kept_if_intact(self, piece: _Piece) -> bool:
        copy = self.memory.piece(piece.region, piece.target)
        if self._seal.digest(copy, piece.block, piece.region) == piece.digest:
            return True
        self.memory.clear(piece.region, piece.target)
        return False

    def _unpack(self, data: memoryview, pieces: list[_Piece]) -> bool:
        """In a thread: copy the landed bytes to where they belong.

        What is looked at is the copy. A sender that was given up, but was frozen in the middle of writing, may go on
        at any moment, and the landing place is another handoff's by then.
        """
        memory, codec = self.memory, self._codec
        for piece in pieces:
            landed = data[piece.offset : piece.offset + piece.length]
            if codec is None:
                memory.fill(piece.region, piece.target, landed)
                if not self._kept_if_intact(piece):
                    return False
                continue
            copy = memoryview(bytearray(landed))
            if self._seal.digest(copy, piece.block, piece.region) != piece.digest:
                return False
            codec.decode(tensor_of(copy), [memory.tensor(piece.region, piece.target)])
        return True
