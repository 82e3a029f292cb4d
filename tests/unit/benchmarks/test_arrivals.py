"""The open load: the same requests at the same times for every system, whatever becomes of those before."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from statistics import mean

from hypothesis import given
from hypothesis import strategies as st

from benchmarks.arrivals import Arrival, Load, draw, drive
from benchmarks.load import LoadClient
from benchmarks.server import Server

WORDS = range(1000)


@given(st.integers(), st.integers(min_value=1, max_value=50))
def test_a_seed_draws_the_same_arrivals_again(seed: int, requests: int) -> None:
    load = Load("any", 7, 0.5, requests, 64, busy=False)

    arrivals = draw(load, WORDS, seed)

    assert arrivals == draw(load, WORDS, seed)
    assert len(arrivals) == requests
    assert all(len(arrival.token_ids) == 7 for arrival in arrivals)
    assert arrivals[0].at_s == 0.0
    assert all(before.at_s <= after.at_s for before, after in pairwise(arrivals))


def test_arrivals_come_at_the_rate_that_was_asked_for() -> None:
    arrivals = draw(Load("any", 1, 4.0, 4001, 1, busy=True), WORDS, seed=1)

    gaps_s = [after.at_s - before.at_s for before, after in pairwise(arrivals)]
    assert 0.23 < mean(gaps_s) < 0.27
    # As if of many people who do not know of each other: as many short gaps as a Poisson process has.
    assert 0.59 < sum(gap_s < 0.25 for gap_s in gaps_s) / len(gaps_s) < 0.67


@asynccontextmanager
async def scripted(answers: dict[int, bytes], received: list[int]) -> AsyncIterator[str]:
    """A server that answers by the number of tokens in the prompt, once all the requests have come."""
    all_came = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        body = await reader.readexactly(length)
        tokens = len(json.loads(body)["prompt"])
        received.append(tokens)
        if len(received) == len(answers):
            all_came.set()
        async with asyncio.timeout(10):
            await all_came.wait()
        writer.write(answers[tokens])
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def streamed(text: str) -> bytes:
    events = (
        f'data: {{"choices": [{{"text": "{text}"}}]}}\n\n'
        'data: {"choices": [], "usage": {"completion_tokens": 1}}\n\ndata: [DONE]\n\n'
    )
    return f"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{events}".encode()


async def test_no_request_waits_for_the_one_before_and_a_failed_one_spoils_no_other() -> None:
    received: list[int] = []
    refusal = b"HTTP/1.1 500 Internal Server Error\r\nconnection: close\r\n\r\nno room"
    # None is answered before all three have come: a load that waited would never end.
    async with scripted({1: streamed("one"), 2: refusal, 3: streamed("three")}, received) as url:
        arrivals = [Arrival(0.0, [5]), Arrival(0.01, [5, 5]), Arrival(0.02, [5, 5, 5])]
        server = Server("any", url, "m", 0, has_account=False, start_s=0.0)
        async with LoadClient(url, "m", timeout_s=10.0) as client:
            driven = await drive(server, client, arrivals, max_tokens=1)

    assert [answer.text if answer else None for answer in driven.answers] == ["one", None, "three"]
    assert driven.failures == ("the server answered 500: no room",)
    assert received == [1, 2, 3]
