"""Landing places: each has one holder at a time, and a ticket of the past is nobody's."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_transfer.transports.landing import Landing
from slipstream.errors import TransferError

PLACE_BYTES = 8


def a_landing(places: int) -> Landing:
    return Landing(places, PLACE_BYTES, memoryview(bytearray(places * PLACE_BYTES)))


@given(st.integers(1, 5), st.lists(st.integers(0, 9), max_size=40))
def test_no_two_tickets_share_a_place_and_none_comes_twice(places: int, choices: list[int]) -> None:
    async def play() -> None:
        landing = a_landing(places)
        out: list[int] = []
        used: set[int] = set()
        for choice in choices:
            if len(out) == places or (out and choice % 2):
                landing.release(out.pop(choice % len(out)))
            else:
                ticket = await asyncio.wait_for(landing.grant(), 1.0)
                assert 0 < ticket < 2**63
                assert ticket not in used
                used.add(ticket)
                out.append(ticket)
            offsets = [landing.offset(ticket) for ticket in out]
            assert len(set(offsets)) == len(offsets) == landing.granted

    asyncio.run(play())


async def test_who_comes_first_gets_the_next_free_place() -> None:
    landing = a_landing(1)
    ticket = await landing.grant()
    waiting = [asyncio.create_task(landing.grant()) for _ in range(3)]
    for task in waiting:
        await asyncio.sleep(0)
        assert not task.done()
        landing.release(ticket)
        ticket = await asyncio.wait_for(task, 1.0)
    assert landing.granted == 1


async def test_a_place_released_twice_is_free_once() -> None:
    landing = a_landing(1)
    old = await landing.grant()
    landing.release(old)
    landing.release(old)
    new = await landing.grant()
    landing.release(old)  # also not the next holder's
    assert landing.granted == 1
    assert new != old
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(landing.grant(), 0.02)


@pytest.mark.parametrize("turn", ["while waiting", "when it is its turn"])
async def test_one_who_stops_waiting_leaves_the_place_to_the_next(turn: str) -> None:
    landing = a_landing(1)
    ticket = await landing.grant()
    quitter, patient = asyncio.create_task(landing.grant()), asyncio.create_task(landing.grant())
    await asyncio.sleep(0)
    if turn == "when it is its turn":
        landing.release(ticket)
    quitter.cancel()
    await asyncio.gather(quitter, return_exceptions=True)
    landing.release(ticket)
    assert await asyncio.wait_for(patient, 1.0)


async def test_a_place_is_its_own_bytes() -> None:
    landing = a_landing(3)
    tickets = [await landing.grant() for _ in range(3)]
    for number, ticket in enumerate(tickets):
        landing.place(ticket)[:] = bytes([number]) * PLACE_BYTES
    assert [bytes(landing.place(ticket)) for ticket in tickets] == [bytes([n]) * PLACE_BYTES for n in range(3)]


@pytest.mark.parametrize("ticket", [0, 1, -5, 4 << 40, 1 << 62])
def test_a_ticket_to_nowhere_is_refused(ticket: int) -> None:
    with pytest.raises(TransferError, match="no landing place") as caught:
        a_landing(3).place(ticket)
    assert caught.value.code == "bad_handoff"
