"""What a receiver has checked is what lies in its KV cache, whoever still writes somewhere."""

from __future__ import annotations

import asyncio
import ctypes
import threading
from collections.abc import Callable, Sequence

import torch

from kv_transfer import permits, wire
from kv_transfer.handoff import Handoff, Seal
from kv_transfer.inbound import Inbound, Sender, Want
from kv_transfer.kv_memory import KvMemory
from kv_transfer.layout import Layout
from kv_transfer.transports.base import LandingLink, ReadLink, Run, Way
from slipstream.errors import TransferError

BLOCKS, PIECE_BYTES = 4, 64
HANDOFF = Handoff(b"h" * 16, "127.0.0.1:1", 7, bytes(32), bytes(32))
SESSION = b"s" * 32


def cache(fill: int) -> list[torch.Tensor]:
    return [torch.full((BLOCKS, PIECE_BYTES), fill, dtype=torch.uint8)]


class Threads:
    """Runs work in threads, to its end whatever is cancelled, as the agent does; tells when a copy was found intact."""

    def __init__(self) -> None:
        self.intact = threading.Event()

    async def __call__(self, work: Callable[[], bool], size_bytes: int) -> bool:
        future = asyncio.get_running_loop().run_in_executor(None, work)
        try:
            intact = await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future])
            raise
        if intact:
            self.intact.set()
        return intact


def span(number: int, source: int, data: memoryview, ticket: int) -> wire.Sent:
    """Block 0 of the prompt, which lies in block `source` at the sender."""
    digest = Seal(HANDOFF.id, HANDOFF.epoch, HANDOFF.token).digest(data, 0, 0)
    return wire.Sent(HANDOFF.id, number, (0, 1), [source], (0, 1), [digest], ticket, PIECE_BYTES, 0)


class Receiving:
    """One handoff of one block, into block 2, and what is posted and reported about it."""

    def __init__(self, memory: KvMemory, link: ReadLink | LandingLink, threads: Threads, sender: KvMemory) -> None:
        self.posted: list[wire.Message] = []
        self.ended: asyncio.Future[TransferError | None] = asyncio.get_running_loop().create_future()
        self.inbound = Inbound(HANDOFF, memory, threads, lambda *_: None, self.ended.set_result, 5.0, 4)
        layout = Layout("", BLOCKS, 32, sender.regions)
        self.inbound.connected(Sender(self.posted.append, SESSION, link, None, layout))
        self.inbound.started(wire.Started(HANDOFF.id, 32, 0, permits.begins(HANDOFF.token, SESSION, HANDOFF.id, 32, 0)))
        self.inbound.receive(Want(0, [2]))

    async def posts(self, kind: type[wire.Message], count: int) -> list[wire.Message]:
        async with asyncio.timeout(5):
            while True:
                found = [one for one in self.posted if isinstance(one, kind)]
                if len(found) >= count:
                    return found
                await asyncio.sleep(0.001)


class OnePlace:
    """A landing link with the tests' own landing place."""

    way = Way("shm", "staged")
    span_bytes = PIECE_BYTES

    def __init__(self) -> None:
        self.place = bytearray(PIECE_BYTES)
        self._tickets = iter(range(1, 100))
        self._free = asyncio.Semaphore(1)

    async def grant(self) -> int:
        await self._free.acquire()
        return next(self._tickets)

    async def send(self, ticket: int, pieces: Sequence[Run]) -> None:
        raise AssertionError("nothing is sent from here")

    async def receive(self, ticket: int, length: int) -> memoryview:
        return memoryview(self.place)[:length]

    def release(self, ticket: int) -> None:
        self._free.release()

    async def close(self) -> None:
        """Nothing is held."""


class LateWriter(KvMemory):
    """A KV cache beside which a sender wakes up that was given up long ago: its last bytes reach the landing place at
    the moment when this worker copies out of it."""

    def __init__(self, place: bytearray) -> None:
        super().__init__(cache(0), dtype="uint8")
        self._place = place
        self.wrote_late = 0

    def fill(self, region: int, block_id: int, data: memoryview) -> None:
        if not self.wrote_late:
            self.wrote_late = 1
            self._place[10] ^= 0xFF
        super().fill(region, block_id, data)


async def test_a_late_write_into_the_landing_place_is_noticed_and_the_span_is_asked_for_again() -> None:
    link = OnePlace()
    memory = LateWriter(link.place)
    receiving = Receiving(memory, link, Threads(), memory)
    right = bytes(range(PIECE_BYTES))
    for number in (1, 2):
        credit = (await receiving.posts(wire.Credit, number))[-1]
        assert isinstance(credit, wire.Credit)
        link.place[:] = right
        receiving.inbound.sent(span(number, 0, memoryview(right), credit.ticket))
        if number == 1:
            await receiving.posts(wire.Again, 1)
            assert bytes(memory.piece(0, 2)) == bytes(PIECE_BYTES), "what is not intact does not stay"
    async with asyncio.timeout(5):
        assert await receiving.ended is None
    assert memory.wrote_late
    assert bytes(memory.piece(0, 2)) == right


async def test_what_was_read_and_is_not_intact_does_not_stay_in_the_cache() -> None:
    sender, memory = KvMemory(cache(0xFF), dtype="uint8"), KvMemory(cache(9), dtype="uint8")
    threads = Threads()
    receiving = Receiving(memory, SlowStaleReads(sender, threads), threads, sender)
    await receiving.posts(wire.Announce, 1)
    receiving.inbound.sent(span(1, 1, memoryview(bytearray(PIECE_BYTES)), 0))
    await receiving.posts(wire.Again, 1)
    receiving.inbound.cancel()
    async with asyncio.timeout(5):
        assert await receiving.ended is not None
    assert bytes(memory.piece(0, 2)) == bytes(PIECE_BYTES)


class SlowStaleReads:
    """Block 0 of the sender has been overwritten, and reading it takes until another copy was found intact."""

    way = Way("shm", "direct")

    def __init__(self, sender: KvMemory, threads: Threads) -> None:
        self._sender = sender
        self._threads = threads

    def read(self, sources: Sequence[Run], targets: Sequence[Run]) -> None:
        if sources[0].address == self._sender.run(0, 0).address:
            self._threads.intact.wait(0.3)
        for source, target in zip(sources, targets, strict=True):
            ctypes.memmove(target.address, source.address, source.length)

    async def close(self) -> None:
        """Nothing is held."""


async def test_an_overwritten_copy_is_not_written_over_the_one_that_was_sent_after_it() -> None:
    sender, memory = KvMemory(cache(0), dtype="uint8"), KvMemory(cache(9), dtype="uint8")
    right = bytes(range(PIECE_BYTES))
    sender.piece(0, 1)[:] = right
    threads = Threads()
    receiving = Receiving(memory, SlowStaleReads(sender, threads), threads, sender)
    await receiving.posts(wire.Announce, 1)
    # The sender was preempted between the two: block 0 of its cache holds another request's bytes by now.
    receiving.inbound.sent(span(1, 0, memoryview(right), 0))
    receiving.inbound.sent(span(2, 1, memoryview(right), 0))
    async with asyncio.timeout(5):
        assert await receiving.ended is None
    assert bytes(memory.piece(0, 2)) == right
