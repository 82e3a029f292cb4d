"""The load client against a real HTTP server on loopback that plays back what it is given."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from benchmarks.frontend_comparison import loaded
from benchmarks.stream_load import Streamed, chat_request, closed_load
from slipstream.errors import DeadlineError, UnavailableError

HEAD = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
ROLE = b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
TOKEN = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\ndata: [DONE]\n\n'
LAST = b"0\r\n\r\n"


def chunk(content: bytes) -> bytes:
    return f"{len(content):x}\r\n".encode() + content + b"\r\n"


ANSWER = [HEAD + chunk(ROLE), chunk(TOKEN) + chunk(TOKEN), chunk(USAGE), LAST]


@asynccontextmanager
async def playing(pieces: list[bytes], pause_s: float = 0.0) -> AsyncIterator[tuple[int, list[bytes]]]:
    """The port of a server that answers each request with these pieces, and the requests that it got."""
    bodies: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
                bodies.append(await reader.readexactly(length))
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(pause_s)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has what it wants
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1], bodies


async def load(port: int, requests: int, *, connections: int, timeout_s: float = 5.0) -> Streamed:
    sent = [chat_request("127.0.0.1", "m", f"prompt {index}", 2) for index in range(requests)]
    return await closed_load("127.0.0.1", port, sent, connections=connections, timeout_s=timeout_s)


async def test_counts_answers_tokens_and_events() -> None:
    async with playing(ANSWER) as (port, bodies):
        seen = await load(port, 7, connections=3)
    assert seen.errors == []
    assert (len(seen.total_s), seen.tokens, seen.events) == (7, 14, 28)
    assert len(set(bodies)) == 7


async def test_the_first_token_is_the_first_text_and_not_the_role() -> None:
    async with playing(ANSWER, pause_s=0.05) as (port, _):
        seen = await load(port, 1, connections=1)
    assert 0.05 <= seen.ttft_s[0] < seen.total_s[0]


async def test_an_answer_that_comes_byte_by_byte_is_the_same_answer() -> None:
    pieces = [ANSWER[0], *(bytes([byte]) for byte in b"".join(ANSWER[1:]))]
    async with playing(pieces) as (port, _):
        seen = await load(port, 1, connections=1)
    assert (seen.errors, seen.tokens) == ([], 2)
    assert len(seen.ttft_s) == 1


@pytest.mark.parametrize(
    "pieces",
    [
        [b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n"],
        [HEAD + chunk(ROLE), chunk(USAGE), LAST],
        [HEAD + chunk(TOKEN), chunk(b"data: [DONE]\n\n"), LAST],
    ],
    ids=["an error status", "no token", "no usage"],
)
async def test_what_is_no_whole_answer_is_an_error_and_fails_the_measurement(pieces: list[bytes]) -> None:
    async with playing(pieces) as (port, _):
        seen = await load(port, 1, connections=1)
    assert len(seen.errors) == 1
    with pytest.raises(UnavailableError, match="1 of 1 answers failed"):
        loaded(seen, 0.1, 2)


async def test_answers_that_are_too_short_fail_the_measurement() -> None:
    async with playing(ANSWER) as (port, _):
        seen = await load(port, 1, connections=1)
    assert loaded(seen, 0.1, 2).cpu_ms_per_request == pytest.approx(100)
    with pytest.raises(UnavailableError, match="1 answers of 64 tokens came to 2"):
        loaded(seen, 0.1, 64)


async def test_a_server_that_hangs_is_given_up() -> None:
    async with playing([HEAD + chunk(ROLE)]) as (port, _):
        with pytest.raises(DeadlineError, match="only 0 answers"):
            await load(port, 1, connections=1, timeout_s=0.2)
