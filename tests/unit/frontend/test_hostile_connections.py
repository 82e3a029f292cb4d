"""Clients that are hostile on the wire, over real sockets: each is refused or cut, and none keeps what it took."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from frontend import http_protocol
from frontend.http_protocol import CONNECTIONS, CUT_CONNECTIONS
from frontend.tokenizer import TextModel
from slipstream.limit_settings import LimitSettings
from tests.support.scripted_dispatcher import ScriptedDispatcher, tokens
from tests.unit.frontend.conftest import Faces

LINE = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
ALIVE = b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def limits() -> LimitSettings:
    return LimitSettings(
        max_connections=64,
        max_connections_per_address=32,
        header_timeout_s=0.3,
        body_timeout_s=0.3,
        write_timeout_s=0.5,
        max_pipelined=4,
    )


@pytest.fixture(autouse=True)
async def nothing_is_left(faces: Faces) -> AsyncIterator[None]:
    """Whatever a test did, all of its connections are gone and an honest request is answered."""
    yield
    async with asyncio.timeout(10):
        while _open_connections():  # noqa: ASYNC110 - the protocol tells nobody
            await asyncio.sleep(0.02)
    async with httpx.AsyncClient(base_url=faces.http, timeout=10) as client:
        assert (await client.get("/health/live")).status_code == 200


def _open_connections() -> float:
    return sum(sample.value for family in CONNECTIONS.collect() for sample in family.samples)


def cut(reason: str) -> float:
    return sum(
        sample.value
        for family in CUT_CONNECTIONS.collect()
        for sample in family.samples
        if sample.name.endswith("_total") and sample.labels["reason"] == reason
    )


@asynccontextmanager
async def connected(faces: Faces) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(*faces.http.removeprefix("http://").split(":"))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def answer(faces: Faces, content: bytes) -> bytes:
    """All that comes back until the server closes the connection; empty when it just cuts it."""
    async with connected(faces) as (reader, writer), asyncio.timeout(10):
        try:
            writer.write(content)
            return await reader.read(-1)
        except ConnectionResetError:
            return b""


def error_of(answered: bytes) -> dict[str, Any]:
    head, _, content = answered.partition(b"\r\n\r\n")
    assert b"application/json" in head
    error = json.loads(content)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error, dict)
    return error


TOO_LARGE = {
    "one long header": LINE + b"X: " + b"a" * 70_000 + b"\r\n\r\n",
    "one that never ends": LINE + b"X: " + b"a" * 700_000,
    "a long path": b"GET /" + b"a" * 400_000,
    "many headers": LINE + b"X: a\r\n" * 101 + b"\r\n",
}


async def test_too_large_a_head_is_a_431_that_names_the_limits(faces: Faces) -> None:
    for what, head in TOO_LARGE.items():
        answered = await answer(faces, head)
        assert answered.startswith(b"HTTP/1.1 431 "), what
        error = error_of(answered)
        assert error["code"] == "headers_too_large"
        assert "limits.max_header_bytes" in error["message"]
        assert "limits.max_headers" in error["message"]


NO_REQUESTS = {
    "another protocol": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100,
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/9.9": b"GET / HTTP/9.9\r\n\r\n",
    "an unknown method": b"EAT / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a NUL in the path": b"GET /v1/\0 HTTP/1.1\r\nHost: x\r\n\r\n",
    "raw bytes in the path": b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
    "a broken absolute URI": b"GET http://[::1/x HTTP/1.1\r\nHost: x\r\n\r\n",
    "CONNECT": b"CONNECT example.org HTTP/1.1\r\nHost: x\r\n\r\n",
    "both lengths": LINE + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "the other order": LINE + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": LINE + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n12345",
    "a list of lengths": LINE + b"Content-Length: 5, 5\r\n\r\n12345",
    "a negative length": LINE + b"Content-Length: -1\r\n\r\n",
    "a length with a sign": LINE + b"Content-Length: +5\r\n\r\n12345",
    "a length beyond numbers": LINE + b"Content-Length: " + b"9" * 40 + b"\r\n\r\n",
    "a chunk beyond numbers": LINE + b"Transfer-Encoding: chunked\r\n\r\nfffffffffffffffff\r\n{}",
    "no chunk size": LINE + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "another encoding": LINE + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n",
    "a header with a space": LINE + b"Content-Length : 5\r\n\r\n12345",
    "a folded header": LINE + b"X: a\r\n b\r\nContent-Length: 0\r\n\r\n",
    "a bare line feed": b"GET /health/live HTTP/1.1\nHost: x\n\n",
    "a NUL in a header": LINE + b"X: a\0b\r\n\r\n",
}


async def test_what_is_no_request_is_a_400_and_runs_nothing(faces: Faces, dispatcher: ScriptedDispatcher) -> None:
    for what, content in NO_REQUESTS.items():
        answered = await answer(faces, content)
        assert answered.startswith(b"HTTP/1.1 400 "), (what, answered)
        assert error_of(answered)["type"] == "invalid_request_error"
        assert answered.count(b"content-length") == 1, what
    assert dispatcher.requests == []


CLOSING = b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
ODD = {
    b"GET /health/live HTTP/1.0\r\n\r\n": b"200",
    b"GET http://example.org/health/live" + CLOSING: b"200",
    b"GET /nobody HTTP/1.1\r\nHost: [::1\r\nConnection: close\r\n\r\n": b"404",
    b"GET /docs HTTP/1.1\r\nHost: [\r\nConnection: close\r\n\r\n": b"200",
    b"GET /%00%ff%0d%0a" + CLOSING: b"404",
    b"GET /v1/models/%ed%a0%80" + CLOSING: b"404",
    b"TRACE /v1/models" + CLOSING: b"405",
    b"GET /v1/models HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n": b"200",
}


async def test_what_is_odd_and_allowed_is_answered(faces: Faces) -> None:
    for content, status in ODD.items():
        async with connected(faces) as (reader, writer), asyncio.timeout(10):
            writer.write(content)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 " + status), content


async def test_headers_after_a_chunked_body_are_not_believed(faces: Faces, dispatcher: ScriptedDispatcher) -> None:
    """A proxy that takes x-slipstream-tenant away would not see it there."""
    body = json.dumps({"model": "tiny", "prompt": "x"}).encode()
    head = LINE + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    trailer = b"0\r\nX-Slipstream-Tenant: other\r\n\r\n"
    answered = await answer(faces, head + b"%x\r\n" % len(body) + body + b"\r\n" + trailer)
    assert answered.startswith(b"HTTP/1.1 200 ")
    assert dispatcher.requests[0].claim.tenant == "default"


async def test_a_head_that_does_not_come_is_not_waited_for(faces: Faces) -> None:
    before = cut("header_timeout")
    slow = (b"", b"G", LINE, LINE + b"X-Slow: ")
    assert await asyncio.gather(*(answer(faces, begun) for begun in slow)) == [b""] * len(slow)
    assert cut("header_timeout") == before + len(slow)


async def test_a_head_that_comes_letter_by_letter_has_the_same_deadline(faces: Faces) -> None:
    before = cut("header_timeout")
    async with connected(faces) as (_, writer), asyncio.timeout(10):
        writer.write(b"GET /")
        while cut("header_timeout") == before:
            writer.write(b"a")
            await asyncio.sleep(0.02)


async def test_line_breaks_in_place_of_a_request_hold_no_connection(faces: Faces) -> None:
    async with connected(faces) as (reader, writer), asyncio.timeout(10):
        writer.write(ALIVE)
        await reader.readuntil(b"}")
        writer.write(b"\r\n")
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)


@pytest.mark.parametrize("sized", [b"Content-Length: 100\r\n", b"Transfer-Encoding: chunked\r\n"])
async def test_a_body_that_does_not_come_is_a_408(faces: Faces, dispatcher: ScriptedDispatcher, sized: bytes) -> None:
    answered = await answer(faces, LINE + sized + b"\r\n")
    assert answered.startswith(b"HTTP/1.1 408 ")
    error = error_of(answered)
    assert error["code"] == "request_timeout"
    assert "limits.body_timeout_s" in error["message"]
    assert dispatcher.requests == []


async def test_a_body_that_nobody_reads_and_never_ends_is_cut(faces: Faces, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "_BODY_GRACE_S", 0.1)
    before = cut("body_timeout")
    async with connected(faces) as (reader, writer), asyncio.timeout(10):
        writer.write(b"GET /health/live HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
        assert b"200" in await reader.readuntil(b"}")
        with pytest.raises(ConnectionResetError):
            await reader.readexactly(1)
    assert cut("body_timeout") == before + 1


async def test_a_413_ends_the_connection(faces: Faces) -> None:
    """What is left of the body would be read, to no end, as long as the client sends it."""
    answered = await answer(faces, LINE + b"Content-Length: 70000\r\n\r\n" + b"x" * 70_000)
    assert answered.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answered.lower()


async def test_requests_sent_ahead_are_answered_in_turn(faces: Faces) -> None:
    async with connected(faces) as (reader, writer), asyncio.timeout(10):
        writer.write(ALIVE * 5)
        for _ in range(5):
            assert b"200" in await reader.readuntil(b"}")


async def test_a_thousand_requests_sent_ahead_are_cut(faces: Faces, dispatcher: ScriptedDispatcher) -> None:
    before = cut("too_many_pipelined")
    await answer(faces, ALIVE * 1000)
    assert cut("too_many_pipelined") == before + 1


@pytest.fixture
def endless(dispatcher: ScriptedDispatcher, text_model: TextModel) -> None:
    a = text_model.encode_now("a", add_special_tokens=False)
    dispatcher.script = lambda request: [tokens(*a), asyncio.Event()]


def stream_request(**fields: Any) -> bytes:
    content = json.dumps({"model": "tiny", "prompt": "x", "stream": True} | fields).encode()
    return LINE + b"Content-Length: %d\r\n\r\n" % len(content) + content


@pytest.mark.usefixtures("endless")
async def test_leaving_aborts_the_request_that_runs_also_when_another_was_sent_ahead(
    faces: Faces, dispatcher: ScriptedDispatcher
) -> None:
    async with connected(faces) as (reader, writer), asyncio.timeout(10):
        writer.write(stream_request() + stream_request())
        await reader.readuntil(b"data: ")
        await dispatcher.until_running(1)
    await dispatcher.until_running(0)
    assert len(dispatcher.requests) == 1


@pytest.mark.usefixtures("endless")
async def test_garbage_after_a_request_ends_it_and_is_not_put_into_its_answer(
    faces: Faces, dispatcher: ScriptedDispatcher
) -> None:
    async with connected(faces) as (reader, writer), asyncio.timeout(10):
        writer.write(stream_request())
        await reader.readuntil(b"data: ")
        writer.write(b"\0\0\0\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            await reader.readuntil(b"HTTP/1.1")
    await dispatcher.until_running(0)


async def test_a_reader_who_takes_nothing_is_cut_and_its_request_ended(
    faces: Faces, dispatcher: ScriptedDispatcher, text_model: TextModel
) -> None:
    a = text_model.encode_now("a", add_special_tokens=False)
    dispatcher.script = lambda request: [tokens(*a * 50)] * 100_000
    before = cut("write_timeout")
    async with connected(faces) as (reader, writer), asyncio.timeout(20):
        transport = writer.transport
        writer.write(stream_request())
        await dispatcher.until_running(1)
        transport.pause_reading()  # type: ignore[attr-defined]  # what the kernel holds is all it takes
        await dispatcher.until_running(0)
        del reader
    assert cut("write_timeout") == before + 1


async def test_at_the_limit_of_an_address_idle_connections_make_room(faces: Faces, limits: LimitSettings) -> None:
    before = cut("idle")
    async with connected(faces) as (first, _):
        others = [await asyncio.open_connection(*faces.http.removeprefix("http://").split(":")) for _ in range(31)]
        assert b"200" in (await answer(faces, ALIVE.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")))
        with pytest.raises(ConnectionResetError):
            await first.readexactly(1)
        for _, writer in others:
            writer.transport.abort()
    assert cut("idle") == before + 1


@pytest.mark.usefixtures("endless")
async def test_where_no_connection_is_idle_a_new_one_is_refused_with_429(
    faces: Faces, dispatcher: ScriptedDispatcher
) -> None:
    streams = [await asyncio.open_connection(*faces.http.removeprefix("http://").split(":")) for _ in range(32)]
    for _, writer in streams:
        writer.write(stream_request())
    await dispatcher.until_running(32)
    answered = await answer(faces, ALIVE)
    assert answered.startswith(b"HTTP/1.1 429 ")
    assert b"retry-after: 1" in answered
    assert "limits.max_connections_per_address" in error_of(answered)["message"]
    for _, writer in streams:
        writer.transport.abort()
    await dispatcher.until_running(0)
