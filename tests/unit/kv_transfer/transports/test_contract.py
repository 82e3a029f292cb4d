"""What every transport with landing places promises, between this process and another one.

A transport joins by a row in `tests.support.transport_peer.TRANSPORTS`.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import random
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from kv_transfer.transports.base import LandingLink, Transport
from slipstream.errors import TransferError
from tests.support.transport_peer import PLACES, SPAN_BYTES, TRANSPORTS, Memory, pattern

NOTICE_S = 20.0  # longest that a peer's end may go unnoticed here
IDLE_S = 5.0
IDLE_SHARE = 0.03
# Their receivers can tell that bytes are still to come; `shm-staged` relies on the sender's word alone.
AWARE = ["ucx", "nixl"]
# The receiver lets in what it expects; with `nixl` and `shm-staged` the sender writes wherever it thinks it may.
TWO_SIDED = ["ucx"]


class Peer:
    """A started `tests.support.transport_peer`."""

    def __init__(self, process: asyncio.subprocess.Process, card: bytes) -> None:
        self.process = process
        self.card = card
        self._numbers = itertools.count()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def start(cls, transport: str, folder: Path) -> Peer:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.support.transport_peer", transport, str(folder)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert process.stdout is not None
        return cls(process, bytes.fromhex((await process.stdout.readline()).decode()))

    def ask(self, command: str, *arguments: Any) -> asyncio.Future[Any]:
        """The answer to a command; what went wrong there is raised here, as it would be there."""
        assert self.process.stdin is not None
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        self.process.stdin.write(json.dumps([number, command, *arguments]).encode() + b"\n")
        return self._answers[number]

    async def _read(self) -> None:
        assert self.process.stdout is not None
        why = "the peer said what is no answer"
        try:
            while line := await self.process.stdout.readline():
                self._take(*json.loads(line))
            why = f"the peer ended with status {await self.process.wait()}"
        finally:
            for answer in self._answers.values():
                if not answer.done():
                    answer.set_exception(TransferError(why, code="worker_gone"))
                    answer.exception()  # whoever asked may have given up

    def _take(self, number: int, result: object) -> None:
        answer = self._answers.pop(number)
        if answer.done():
            return  # nobody waits for it any more
        if isinstance(result, dict):
            answer.set_exception(TransferError(f"at the peer: {result['error']}", code=result["error"]))
        else:
            answer.set_result(result)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()
        await self._reading
        for answer in self._answers.values():
            answer.cancel()

    async def stop(self) -> int:
        """Tell it to end and return its exit status."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        async with asyncio.timeout(NOTICE_S):
            status = await self.process.wait()
            await self._reading
        return status


class Pair:
    """A link between a transport here and one in another process."""

    def __init__(self, name: str, folder: Path, transport: Transport) -> None:
        self.name = name
        self.memory = Memory()
        self.transport = transport
        self.peer: Peer
        self.link: LandingLink
        self._folder = folder
        self._seeds = itertools.count(1)
        self._peers: list[Peer] = []

    async def connect(self) -> tuple[Peer, LandingLink]:
        """One more peer; `peer` and `link` are the latest."""
        self.peer = await Peer.start(self.name, self._folder)
        self._peers.append(self.peer)
        link, _ = await asyncio.gather(
            self.transport.connect(self.peer.card), self.peer.ask("connect", self.transport.card().hex())
        )
        assert isinstance(link, LandingLink)
        self.link = link
        return self.peer, self.link

    async def bring(self, *lengths: int) -> None:
        """A span of these pieces from the peer to here, byte for byte."""
        ticket, seed = await self.link.grant(), next(self._seeds)
        await self.peer.ask("send", ticket, seed, lengths)
        await self.take(ticket, seed, sum(lengths))

    async def take(self, ticket: int, seed: int, length: int) -> None:
        assert bytes(await self.link.receive(ticket, length)) == pattern(seed, length)
        self.link.release(ticket)

    async def carry(self, *lengths: int) -> None:
        """A span of these pieces from here to the peer, byte for byte."""
        ticket, seed = await self.peer.ask("grant"), next(self._seeds)
        await self.send(ticket, seed, *lengths)
        expected = hashlib.sha256(pattern(seed, sum(lengths))).hexdigest()
        assert await self.peer.ask("receive", ticket, sum(lengths)) == expected

    async def send(self, ticket: int, seed: int, *lengths: int) -> None:
        with self.memory.pieces(seed, lengths) as pieces:
            await self.link.send(ticket, pieces)

    async def close(self) -> None:
        await self.transport.close()
        for peer in self._peers:
            await peer.kill()


async def opened(name: str, folder: Path) -> AsyncIterator[Pair]:
    pair = Pair(name, folder, TRANSPORTS[name](folder, "here"))
    await pair.transport.open([pair.memory.run])
    try:
        await pair.connect()
        yield pair
    finally:
        await pair.close()


@pytest.fixture(params=list(TRANSPORTS))
async def pair(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Pair]:
    async for ready in opened(request.param, tmp_path):
        yield ready


@pytest.fixture(params=AWARE)
async def aware_pair(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Pair]:
    async for ready in opened(request.param, tmp_path):
        yield ready


@pytest.fixture(params=TWO_SIDED)
async def two_sided_pair(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Pair]:
    async for ready in opened(request.param, tmp_path):
        yield ready


async def ends_with(code: str, call: Awaitable[Any]) -> None:
    with pytest.raises(TransferError) as caught:
        async with asyncio.timeout(NOTICE_S):
            await call
    assert caught.value.code == code


@pytest.mark.parametrize("length", [1, 100, 8192, 8193, 100_000, SPAN_BYTES - 1, SPAN_BYTES])
async def test_a_span_of_any_length_arrives_byte_for_byte(pair: Pair, length: int) -> None:
    await pair.bring(length)
    await pair.carry(length)


async def test_pieces_arrive_in_the_order_given_wherever_they_lie(pair: Pair) -> None:
    await pair.bring(70_000, 1, 4096, 333_333, 12)
    await pair.carry(12, 333_333, 4096, 1, 70_000)


async def test_many_spans_go_both_ways_at_once(pair: Pair) -> None:
    async def one_after_the_other(move: Callable[..., Awaitable[None]], lengths: list[int]) -> None:
        for length in lengths:
            await move(length)

    lengths = [random.Random(7).randint(1, SPAN_BYTES) for _ in range(40)]
    async with asyncio.TaskGroup() as tasks:
        for lane in range(2):
            tasks.create_task(one_after_the_other(pair.bring, lengths[lane::2]))
            tasks.create_task(one_after_the_other(pair.carry, lengths[lane::2]))


async def test_a_span_larger_than_a_place_is_refused(pair: Pair) -> None:
    ticket = await pair.peer.ask("grant")
    await ends_with("bad_handoff", pair.send(ticket, 1, SPAN_BYTES, 1))
    await pair.carry(SPAN_BYTES)


async def test_grant_waits_while_all_places_are_taken(pair: Pair) -> None:
    tickets = [await pair.link.grant() for _ in range(PLACES)]
    assert len(set(tickets)) == PLACES
    assert all(0 < ticket < 2**63 for ticket in tickets)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await pair.link.grant()
    waiting = asyncio.create_task(pair.link.grant())
    await asyncio.sleep(0)
    pair.link.release(tickets[0])
    pair.link.release(tickets[0])  # again is fine
    assert await waiting not in tickets
    for ticket in tickets[1:]:
        pair.link.release(ticket)
    await pair.bring(1000)


async def test_what_comes_for_a_released_ticket_is_dropped(aware_pair: Pair) -> None:
    for length in (10, SPAN_BYTES):
        ticket = await aware_pair.link.grant()
        aware_pair.link.release(ticket)
        await aware_pair.peer.ask("send", ticket, 99, [length])
    for _ in range(3 * PLACES):
        await aware_pair.bring(SPAN_BYTES)


async def test_what_comes_for_a_ticket_that_never_was_is_dropped(two_sided_pair: Pair) -> None:
    for ticket in (1, 2**62, 12345):
        await two_sided_pair.peer.ask("send", ticket, 99, [SPAN_BYTES])
    for _ in range(3 * PLACES):
        await two_sided_pair.bring(SPAN_BYTES)


async def test_what_comes_twice_for_one_ticket_changes_nothing(two_sided_pair: Pair) -> None:
    ticket = await two_sided_pair.link.grant()
    await two_sided_pair.peer.ask("send", ticket, 5, [SPAN_BYTES])
    view = await two_sided_pair.link.receive(ticket, SPAN_BYTES)
    await two_sided_pair.peer.ask("send", ticket, 6, [SPAN_BYTES])
    await two_sided_pair.bring(SPAN_BYTES)  # all that was sent before is through
    assert bytes(view) == pattern(5, SPAN_BYTES)


async def test_tickets_released_at_any_moment_spoil_no_other_span(aware_pair: Pair) -> None:
    moments = random.Random(3)
    for seed in range(60):
        ticket = await aware_pair.link.grant()
        sent = aware_pair.peer.ask("send", ticket, seed, [SPAN_BYTES])
        if seed % 3:
            await asyncio.sleep(moments.random() * 0.004)
            aware_pair.link.release(ticket)
            await sent
        else:
            await sent
            await aware_pair.take(ticket, seed, SPAN_BYTES)


async def test_receive_ends_when_the_peer_is_killed(aware_pair: Pair) -> None:
    ticket = await aware_pair.link.grant()
    waiting = asyncio.create_task(aware_pair.link.receive(ticket, SPAN_BYTES))
    await asyncio.sleep(0.1)
    await aware_pair.peer.kill()
    await ends_with("worker_gone", waiting)
    await ends_with("worker_gone", aware_pair.link.grant())


async def send_until_it_waits(pair: Pair, tickets: list[int]) -> set[int]:
    """Send to a peer that is frozen; returns the tickets whose spans a transport takes off our hands all the same."""
    sent: set[int] = set()
    for ticket in itertools.cycle(tickets):
        try:
            async with asyncio.timeout(0.5):
                await pair.send(ticket, 1, SPAN_BYTES)
        except TimeoutError:
            break
        sent.add(ticket)
    return sent


async def test_send_ends_when_the_peer_is_killed(aware_pair: Pair) -> None:
    tickets = [await aware_pair.peer.ask("grant") for _ in range(PLACES)]
    aware_pair.peer.signal(signal.SIGSTOP)
    await send_until_it_waits(aware_pair, tickets)
    waiting = asyncio.create_task(aware_pair.send(tickets[0], 1, SPAN_BYTES))
    await asyncio.sleep(0.1)
    await aware_pair.peer.kill()
    await ends_with("worker_gone", waiting)


async def test_a_peer_killed_in_the_middle_of_traffic_is_noticed(aware_pair: Pair) -> None:
    async def bring_for_ever() -> None:
        while True:
            await aware_pair.bring(SPAN_BYTES)

    async def carry_for_ever() -> None:
        ticket = await aware_pair.peer.ask("grant")
        while True:  # all but the first are dropped there, after they have made the way
            await aware_pair.send(ticket, 1, SPAN_BYTES)

    bringing, carrying = asyncio.create_task(bring_for_ever()), asyncio.create_task(carry_for_ever())
    await asyncio.sleep(0.3)
    await aware_pair.peer.kill()
    await ends_with("worker_gone", carrying)
    bringing.cancel()  # it may be waiting for an answer of the peer
    await asyncio.gather(bringing, return_exceptions=True)
    await ends_with("worker_gone", aware_pair.link.grant())


async def test_a_frozen_peer_goes_on_where_it_was(aware_pair: Pair) -> None:
    tickets = [await aware_pair.peer.ask("grant") for _ in range(PLACES)]
    aware_pair.peer.signal(signal.SIGSTOP)
    sent = await send_until_it_waits(aware_pair, tickets)
    aware_pair.peer.signal(signal.SIGCONT)
    expected = hashlib.sha256(pattern(1, SPAN_BYTES)).hexdigest()
    for ticket in tickets:
        if ticket in sent:
            assert await aware_pair.peer.ask("receive", ticket, SPAN_BYTES) == expected
        else:
            await aware_pair.peer.ask("release", ticket)
    await aware_pair.bring(SPAN_BYTES)
    await aware_pair.carry(SPAN_BYTES)


async def test_a_link_to_a_frozen_peer_can_be_closed(pair: Pair) -> None:
    pair.peer.signal(signal.SIGSTOP)
    async with asyncio.timeout(NOTICE_S):
        await pair.link.close()
        await pair.transport.close()


async def test_a_restarted_peer_is_reached_by_its_new_card(pair: Pair) -> None:
    await pair.bring(SPAN_BYTES)
    old = pair.link
    await pair.peer.kill()
    await pair.connect()
    await pair.bring(SPAN_BYTES)
    await old.close()
    await pair.bring(SPAN_BYTES)
    await pair.carry(SPAN_BYTES)


async def test_places_of_a_lost_peer_serve_the_next_one(aware_pair: Pair) -> None:
    for _ in range(PLACES):
        await aware_pair.link.grant()
    lost = aware_pair.link
    await aware_pair.peer.kill()
    await aware_pair.connect()
    await lost.close()
    for _ in range(2 * PLACES):
        await aware_pair.bring(SPAN_BYTES)


async def test_close_ends_the_calls_that_wait(aware_pair: Pair) -> None:
    tickets = [await aware_pair.link.grant() for _ in range(PLACES)]
    waiting = [
        asyncio.create_task(aware_pair.link.grant()),
        asyncio.create_task(aware_pair.link.receive(tickets[0], 10)),
    ]
    await asyncio.sleep(0.05)
    await aware_pair.link.close()
    await aware_pair.link.close()
    for call in waiting:
        await ends_with("worker_gone", call)


async def test_a_card_that_is_none_is_refused(pair: Pair) -> None:
    for card in (b"", b"nonsense", pair.peer.card[:-3]):
        await ends_with("bad_message", pair.transport.connect(card))


async def test_a_peer_that_is_told_to_end_does(pair: Pair) -> None:
    await pair.bring(SPAN_BYTES)
    assert await pair.peer.stop() == 0


async def test_links_with_nothing_to_do_use_no_cpu(pair: Pair) -> None:
    peers = [pair.peer]
    for _ in range(2):
        peers.append((await pair.connect())[0])
        await pair.bring(SPAN_BYTES)
    await pair.link.grant()  # also while something is expected
    await asyncio.sleep(0.5)
    processes = [psutil.Process(), *(psutil.Process(peer.process.pid) for peer in peers)]
    before = [used(process) for process in processes]
    began = time.monotonic()
    await asyncio.sleep(IDLE_S)
    lasted_s = time.monotonic() - began
    shares = [(used(process) - was) / lasted_s for process, was in zip(processes, before, strict=True)]
    assert max(shares) < IDLE_SHARE, shares


def used(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system
