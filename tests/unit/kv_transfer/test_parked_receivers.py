"""A receiver may wait for a prompt that is queued, but not for one that nobody asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kv_transfer import permits, wire
from kv_transfer.door import Door
from kv_transfer.exchange import Exchange, Limits
from kv_transfer.identity import Identity, Peers
from kv_transfer.kv_memory import KvMemory
from kv_transfer.layout import Layout
from kv_transfer.outbound import Fence, Receiver
from kv_transfer.path_probe import ProbeMemory
from kv_transfer.permits import Permit
from kv_transfer.sender_link import Terms
from kv_transfer.transports.shm import DirectLink
from kv_transfer.ways import Transports

ID = b"a handoff's name"
PEER, TOKEN, SESSION = b"p" * 32, b"t" * 32, b"s" * 32
PERMIT = Permit(ID, TOKEN, PEER)
PARKED_S = 0.05


@pytest.fixture
async def exchange() -> AsyncIterator[Exchange]:
    memory = KvMemory([torch.zeros((4, 64), dtype=torch.uint8)], dtype="uint8")
    layout = Layout("", 4, 32, memory.regions)
    terms = Terms(1, "host", ["shm"], layout, "auto", "auto", "none", lambda _: None, False, 5.0, 5.0)
    limits = Limits(timeout_s=5.0, parked_s=PARKED_S, resend_budget=4, span_bytes=1 << 20)
    with ThreadPoolExecutor(1) as pool:
        door = Door(Identity(), Peers([PEER]), silence_s=5.0, refused=lambda _: None)
        ways = Transports({}, [], 1.0)
        made = Exchange(memory, door, terms, limits, ways, lambda _: None, pool, [], ProbeMemory())
        tidying = asyncio.create_task(made.tidy())
        yield made
        tidying.cancel()
        await made.close()


def receiver(posted: list[wire.Message], peer: bytes = PEER, token: bytes = TOKEN) -> Receiver:
    shown = permits.opens(token, SESSION, ID)
    return Receiver(posted.append, DirectLink(1), None, peer=peer, session=SESSION, shown=shown)


async def test_a_receiver_of_a_prompt_that_nobody_sent_is_turned_away(exchange: Exchange) -> None:
    posted: list[wire.Message] = []
    exchange.attach(ID, receiver(posted))
    async with asyncio.timeout(5):
        while not posted:  # noqa: ASYNC110
            await asyncio.sleep(PARKED_S)
    assert isinstance(posted[0], wire.Closed)
    assert posted[0].code == "unknown_handoff"


@pytest.mark.parametrize("receiver_is_first", [True, False])
async def test_a_receiver_of_a_queued_prompt_waits_until_it_is_computed(
    exchange: Exchange, receiver_is_first: bool
) -> None:
    posted: list[wire.Message] = []
    turned_away: list[wire.Message] = []
    if receiver_is_first:
        exchange.attach(ID, receiver(posted))
    exchange.expect(PERMIT, Fence())
    if not receiver_is_first:
        exchange.attach(ID, receiver(posted))
    exchange.attach(b"another handoff!", receiver(turned_away))
    async with asyncio.timeout(5):
        while not turned_away:  # noqa: ASYNC110 - those that came at the same time, and wait for nothing, are gone by now
            await asyncio.sleep(PARKED_S)
    assert posted == []
    exchange.begin(ID, 100, 7)
    assert posted == [wire.Started(ID, 100, 7, permits.begins(TOKEN, SESSION, ID, 100, 7))]


async def test_a_queued_prompt_that_is_aborted_releases_its_receiver(exchange: Exchange) -> None:
    posted: list[wire.Message] = []
    exchange.expect(PERMIT, Fence())
    exchange.attach(ID, receiver(posted))
    exchange.end(ID, "lease_ended", "given up")
    assert posted == [wire.Closed(ID, "lease_ended", "given up")]
    assert exchange.find(ID, posted.append) is None


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize(
    ("peer", "token", "code"),
    [
        (PEER, b"x" * 32, "bad_token"),
        (b"q" * 32, TOKEN, "bad_token"),
        (b"another registered worker's key!", TOKEN, "bad_token"),
    ],
    ids=["without the token", "not registered", "for another worker"],
)
async def test_who_is_not_meant_to_have_a_prompt_is_refused_and_learns_nothing_of_it(
    exchange: Exchange, peer: bytes, token: bytes, code: str, begun: bool
) -> None:
    posted: list[wire.Message] = []
    exchange._door.peers.set([PEER, b"another registered worker's key!"])
    exchange.expect(PERMIT, Fence())
    if begun:
        exchange.begin(ID, 100, 7)
    exchange.attach(ID, receiver(posted, peer, token))
    assert [type(message) for message in posted] == [wire.Closed]
    assert isinstance(posted[0], wire.Closed)
    assert posted[0].code == ("not_registered" if peer == b"q" * 32 else code)
    exchange.attach(ID, receiver(posted))
    exchange.begin(ID, 100, 7)
    assert isinstance(posted[1], wire.Started)


async def test_a_prompt_without_a_token_is_nobodys(exchange: Exchange) -> None:
    exchange.expect(Permit(ID, b"", PEER), Fence())
    exchange.begin(ID, 100, 7)
    assert exchange.find(ID, print) is None


async def test_who_was_registered_and_is_not_any_more_gets_nothing_new(exchange: Exchange) -> None:
    posted: list[wire.Message] = []
    exchange.expect(PERMIT, Fence())
    exchange._door.peers.set([])
    exchange.attach(ID, receiver(posted))
    assert isinstance(posted[0], wire.Closed)
    assert posted[0].code == "not_registered"
