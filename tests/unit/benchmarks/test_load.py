"""The load client against a real HTTP server on loopback that plays back what it is given."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from benchmarks.load import Answer, LoadClient, Question
from slipstream.errors import DeadlineError, UnavailableError

Play = Callable[[asyncio.StreamWriter], Awaitable[None]]


def event(text: str) -> bytes:
    return f"data: {json.dumps({'choices': [{'index': 0, 'text': text}], 'usage': None})}\n\n".encode()


def usage(tokens: int, **more: object) -> bytes:
    body = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": tokens}, **more}
    return f"data: {json.dumps(body)}\n\ndata: [DONE]\n\n".encode()


@asynccontextmanager
async def playing(
    play: Play, status: str = "200 OK", timeout_s: float = 10.0
) -> AsyncIterator[tuple[LoadClient, list[dict[str, object]]]]:
    """A client of a server that answers each request with this status and with what `play` writes."""
    bodies: list[dict[str, object]] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.split("content-length:")[1].split("\r\n")[0])
            bodies.append(json.loads(await reader.readexactly(length)))
            writer.write(f"HTTP/1.1 {status}\r\nConnection: close\r\n\r\n".encode())
            await play(writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client hung up, which some of the tests want
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    async with server, LoadClient(f"http://127.0.0.1:{port}", "a-model", timeout_s=timeout_s) as client:
        yield client, bodies


async def write(writer: asyncio.StreamWriter, *blocks: bytes) -> None:
    """Each block as one read of the client's."""
    for block in blocks:
        writer.write(block)
        await writer.drain()
        await asyncio.sleep(0.02)


QUESTION = Question((5, 6, 7), max_tokens=3)


async def test_an_answer_has_one_arrival_for_each_event_with_text() -> None:
    async with playing(lambda writer: write(writer, event("a"), event("b"), event(""), event("c"), usage(4))) as (
        client,
        _,
    ):
        answer = await client.ask(QUESTION)

    assert (answer.text, len(answer.arrivals_s), answer.completion_tokens) == ("abc", 3, 4)
    assert answer.sent_s < answer.arrivals_s[0] < answer.arrivals_s[1] < answer.arrivals_s[2] <= answer.ended_s
    assert sum(answer.gaps_s) == pytest.approx(answer.arrivals_s[-1] - answer.arrivals_s[0])


async def test_events_that_come_in_one_read_share_its_time_and_are_told_apart() -> None:
    async with playing(lambda writer: write(writer, event("a") + event("b"), usage(2))) as (client, _):
        answer = await client.ask(QUESTION)

    assert (len(answer.arrivals_s), answer.reads, answer.gaps_s) == (2, 1, [0.0])


async def test_an_event_that_is_cut_in_two_is_put_together() -> None:
    whole = event("a")
    async with playing(lambda writer: write(writer, whole[:9], whole[9:], usage(1))) as (client, _):
        assert (await client.ask(QUESTION)).text == "a"


async def test_what_is_asked_is_greedy_and_of_an_exact_length() -> None:
    async with playing(lambda writer: write(writer, event("a"), usage(1))) as (client, bodies):
        await client.ask(QUESTION)

    assert bodies == [
        {
            "model": "a-model",
            "prompt": [5, 6, 7],
            "max_tokens": 3,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]


async def test_the_account_is_asked_for_and_kept() -> None:
    last = usage(1, slipstream={"account": {"prefill_s": 0.25}})
    async with playing(lambda writer: write(writer, event("a"), last)) as (client, bodies):
        answer = await client.ask(Question((1,), 1, with_account=True))

    assert answer.account == {"prefill_s": 0.25}
    assert bodies[0]["slipstream"] == {"account": True}


async def test_a_refusal_is_an_error_with_the_servers_words() -> None:
    async with playing(lambda writer: write(writer, b"no such model"), "404 Not Found") as (client, _):
        with pytest.raises(UnavailableError, match="404: no such model"):
            await client.ask(QUESTION)


async def test_an_error_in_the_middle_of_an_answer_is_an_error() -> None:
    failure = b'data: {"error": {"message": "worker lost"}}\n\n'
    async with playing(lambda writer: write(writer, event("a"), failure)) as (client, _):
        with pytest.raises(UnavailableError, match="worker lost"):
            await client.ask(QUESTION)


async def test_an_answer_without_a_token_is_an_error() -> None:
    async with playing(lambda writer: write(writer, usage(0))) as (client, _):
        with pytest.raises(UnavailableError, match="no token"):
            await client.ask(QUESTION)


async def test_a_server_that_stops_talking_runs_into_the_deadline() -> None:
    async def silent(writer: asyncio.StreamWriter) -> None:
        await write(writer, event("a"))
        await asyncio.sleep(5)

    async with playing(silent, timeout_s=0.5) as (client, _):
        with pytest.raises(DeadlineError, match=r"within 0\.5 s"):
            await client.ask(QUESTION)


async def test_what_came_before_hanging_up_is_kept() -> None:
    async def endless(writer: asyncio.StreamWriter) -> None:
        while True:
            await write(writer, event("a"))

    async with playing(endless) as (client, _):
        answer, three = Answer(prompt_tokens=3), asyncio.Event()
        task = asyncio.ensure_future(
            client.ask_into(answer, QUESTION, lambda now: three.set() if len(now.arrivals_s) == 3 else None)
        )
        async with asyncio.timeout(5):
            await three.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    assert len(answer.arrivals_s) >= 3
