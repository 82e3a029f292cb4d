"""How a soak judges growth, and how the load generator reads answers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from benchmarks.goodput import ANSWERED, Try
from benchmarks.http_exchange import Connections
from benchmarks.slope import slope
from benchmarks.soak import thirds_of
from benchmarks.trust import chaos_counts, fault_counts
from slipstream.errors import UnavailableError

TIMES = [5.0 * number for number in range(720)]


def test_a_flat_figure_has_no_slope_however_noisy_it_is() -> None:
    chance = random.Random(1)
    told = slope(TIMES, [100.0 + chance.gauss(0, 3) + (500 if chance.random() < 0.02 else 0) for _ in TIMES])
    assert told.low <= 0 <= told.high
    assert abs(told.per_hour) < 1


def test_a_leak_is_found_beneath_noise() -> None:
    chance = random.Random(2)
    told = slope(TIMES, [100.0 + 10 * at_s / 3600 + chance.gauss(0, 3) for at_s in TIMES])
    assert 5 < told.low < 10 < told.high < 15


def test_a_slope_needs_samples() -> None:
    with pytest.raises(ValueError, match="2 samples"):
        slope([0.0, 1.0], [1.0, 2.0])


def test_thirds_leave_the_warm_up_out() -> None:
    tries = [Try(str(at), 0, "realtime", "a", at, at + 1, ANSWERED, ttft_s=at / 1000) for at in range(100)]
    assert [one.answers for one in thirds_of(tries, 100.0)] == [27, 27, 26]


@asynccontextmanager
async def answering(*answers: bytes) -> AsyncIterator[Connections]:
    """A server that says these, one after another, each in pieces."""
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while left and await reader.read(1000):
            answer = left.pop(0)
            for start in range(0, len(answer), 7):
                writer.write(answer[start : start + 7])
                await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    connections = Connections("127.0.0.1", server.sockets[0].getsockname()[1])
    try:
        yield connections
    finally:
        connections.close()
        server.close()
        await server.wait_closed()


STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    b'20\r\ndata: {"choices":[{"text":"one"}]}\n\n\r\n'
    b'20\r\ndata: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":17}}\n\n\r\n'
    b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"
)
REFUSAL = (
    b'HTTP/1.1 429 Too Many Requests\r\nRetry-After: 12\r\nContent-Length: 31\r\n\r\n{"error": {"code":"long_wait"}}'
)


async def test_answers_are_read_to_their_ends_over_one_connection() -> None:
    async with answering(STREAM, REFUSAL) as connections:
        answer = await connections.ask(b"GET / HTTP/1.1\r\n\r\n")
        assert (answer.status, answer.tokens) == (200, 17)
        assert 0 < answer.first_s <= answer.last_s
        refused = await connections.ask(b"GET / HTTP/1.1\r\n\r\n")
        assert (refused.status, refused.retry_after_s, refused.code) == (429, 12.0, "long_wait")


async def test_a_connection_that_is_lost_is_an_error() -> None:
    async with answering(STREAM[:60]) as connections:
        asking = asyncio.create_task(connections.ask(b"GET / HTTP/1.1\r\n\r\n"))
        with pytest.raises(UnavailableError, match="lost"):
            async with asyncio.timeout(5):
                await asking


def test_trust_counts_a_broken_promise_and_a_violation() -> None:
    counts = {"cases": 3, "kept_their_promise": 2, "wrong": 1, "untyped": 0, "hung": 0, "left_held": 0}
    _, targets = fault_counts({"counts": counts})
    assert [one.met for one in targets] == [False, False, True, True, True]
    report = {"minutes": 10.0, "rounds": 1, "requests": {"a": 5}, "faults": {"kill": 2}, "checked": {"x": 9}}
    _, targets = chaos_counts("chaos, vllm", report | {"tokens_compared": 70, "violations": []}, 10.0)
    assert [one.met for one in targets] == [True, True]
    hung = {"invariant": "no hang", "detail": "no end after 40 s"}
    told, targets = chaos_counts("chaos, vllm", report | {"tokens_compared": 70, "violations": [hung]}, 60.0)
    assert [one.met for one in targets] == [False, False]
    assert told["violation 1"] == "no hang: no end after 40 s"
