"""A receiver may wait for a prompt that is queued, but not for one that nobody asked for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kv_transfer import wire
from kv_transfer.exchange import Exchange, Limits
from kv_transfer.kv_memory import KvMemory
from kv_transfer.layout import Layout
from kv_transfer.outbound import Fence, Receiver
from kv_transfer.path_probe import ProbeMemory
from kv_transfer.sender_link import Terms
from kv_transfer.transports.shm import DirectLink
from kv_transfer.ways import Transports

ID = b"a handoff's name"
PARKED_S = 0.05


@pytest.fixture
async def exchange() -> AsyncIterator[Exchange]:
    memory = KvMemory([torch.zeros((4, 64), dtype=torch.uint8)], dtype="uint8")
    layout = Layout("", 4, 32, memory.regions)
    terms = Terms(1, "host", ["shm"], layout, "auto", "auto", "none", lambda _: None, False, 5.0, 5.0)
    limits = Limits(timeout_s=5.0, parked_s=PARKED_S, resend_budget=4, span_bytes=1 << 20)
    with ThreadPoolExecutor(1) as pool:
        made = Exchange(memory, terms, limits, Transports({}, [], 1.0), lambda _: None, pool, [], ProbeMemory())
        tidying = asyncio.create_task(made.tidy())
        yield made
        tidying.cancel()
        await made.close()


def receiver(posted: list[wire.Message]) -> Receiver:
    return Receiver(posted.append, DirectLink(1), None)


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
    fence = Fence()
    if receiver_is_first:
        exchange.attach(ID, receiver(posted))
    exchange.expect(ID, fence)
    if not receiver_is_first:
        exchange.attach(ID, receiver(posted))
    exchange.attach(b"another handoff!", receiver(turned_away))
    async with asyncio.timeout(5):
        while not turned_away:  # noqa: ASYNC110 - those that came at the same time, and wait for nothing, are gone by now
            await asyncio.sleep(PARKED_S)
    assert posted == []
    exchange.begin(ID, fence, 100, 7)
    assert posted == [wire.Started(ID, 100, 7)]


async def test_a_queued_prompt_that_is_aborted_releases_its_receiver(exchange: Exchange) -> None:
    posted: list[wire.Message] = []
    exchange.expect(ID, Fence())
    exchange.attach(ID, receiver(posted))
    exchange.end(ID, "lease_ended", "given up")
    assert posted == [wire.Closed(ID, "lease_ended", "given up")]
    assert exchange.find(ID) is None
