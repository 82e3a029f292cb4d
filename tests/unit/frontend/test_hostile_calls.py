"""Clients that are hostile over gRPC: each call is refused or cut, and the next honest one is answered."""

from __future__ import annotations

import asyncio
import random
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from benchmarks import bad_bodies
from frontend.grpc_writes import write_within
from frontend.tokenizer import TextModel
from slipstream.errors import CancelledByClientError
from slipstream.limit_settings import LimitSettings
from slipstream.v1 import inference_pb2, inference_pb2_grpc
from tests.support.scripted_dispatcher import ScriptedDispatcher, tokens
from tests.unit.frontend.conftest import Faces

GENERATE = "/slipstream.v1.Inference/Generate"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS = struct.pack(">I", 0)[1:] + b"\x04\x00" + struct.pack(">I", 0)

ALLOWED = (
    grpc.StatusCode.OK,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)


@pytest.fixture
def limits() -> LimitSettings:
    return LimitSettings(max_grpc_connections=16, max_metadata_bytes=4096, write_timeout_s=0.5, header_timeout_s=1)


@pytest.fixture(autouse=True)
async def the_next_call_is_answered(faces: Faces, dispatcher: ScriptedDispatcher) -> AsyncIterator[None]:
    script = dispatcher.script
    yield
    dispatcher.script = script
    for _ in range(50):  # a connection that was cut is not counted out at once
        async with grpc.aio.insecure_channel(faces.grpc) as channel:
            try:
                call = inference_pb2_grpc.InferenceStub(channel).Generate(inference_pb2.GenerateRequest(text="x"))
                assert "".join([response.text async for response in call]) == "hello world"
                return
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.UNAVAILABLE:
                    raise
        await asyncio.sleep(0.1)
    pytest.fail("no honest call is answered any more")


async def status_of(channel: grpc.aio.Channel, content: bytes, **options: Any) -> tuple[grpc.StatusCode, str, str]:
    method: Any = channel.unary_stream(GENERATE)
    try:
        async for _ in method(content, **options):
            pass
    except grpc.aio.AioRpcError as error:
        codes = [str(value) for name, value in error.trailing_metadata() or () if name == "slipstream-code"]
        return error.code(), error.details() or "", "".join(codes)
    return grpc.StatusCode.OK, "", ""


async def test_no_bytes_in_place_of_a_message_are_an_error_of_ours(
    channel: grpc.aio.Channel, dispatcher: ScriptedDispatcher
) -> None:
    chance = random.Random(11)
    seen = set()
    for _ in range(150):
        status, details, _ = await status_of(channel, bad_bodies.wire(chance, "tiny"), timeout=10)
        assert status in ALLOWED, details
        seen.add(status)
    assert grpc.StatusCode.INVALID_ARGUMENT in seen
    await dispatcher.until_running(0)


async def test_what_is_no_message_is_said_to_be_none(channel: grpc.aio.Channel) -> None:
    status, details, code = await status_of(channel, b"\x12\x02\xc3\x28")
    assert (status, code) == (grpc.StatusCode.INVALID_ARGUMENT, "bad_message")
    assert "google" not in details


@pytest.mark.parametrize("service", ["grpc.health.v1.Health/Check", "grpc.reflection.v1alpha.ServerReflection/x"])
async def test_other_services_refuse_garbage_too(channel: grpc.aio.Channel, service: str) -> None:
    method: Any = channel.unary_unary(f"/{service}")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await method(b"\xff\xff\xff")
    assert caught.value.code() in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED)


async def test_unknown_fields_and_a_field_said_twice_are_let_be(channel: grpc.aio.Channel) -> None:
    request = inference_pb2.GenerateRequest(text="x").SerializeToString()
    assert (await status_of(channel, request + request + b"\xfa\x7f\x05hello"))[0] == grpc.StatusCode.OK


async def test_a_message_over_the_limit_is_not_parsed(
    channel: grpc.aio.Channel, dispatcher: ScriptedDispatcher
) -> None:
    request = inference_pb2.GenerateRequest(text="x" * (65 << 10)).SerializeToString()
    assert (await status_of(channel, request))[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dispatcher.requests == []


async def test_metadata_over_the_limit_is_refused(channel: grpc.aio.Channel, dispatcher: ScriptedDispatcher) -> None:
    request = inference_pb2.GenerateRequest(text="x").SerializeToString()
    many = tuple((f"x-{number}", "a" * 100) for number in range(100))
    assert (await status_of(channel, request, metadata=many))[0] == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dispatcher.requests == []


async def test_a_deadline_that_is_over_leaves_nothing(
    channel: grpc.aio.Channel, dispatcher: ScriptedDispatcher
) -> None:
    request = inference_pb2.GenerateRequest(text="x").SerializeToString()
    for left_s in (0, -1, 1e-9):
        assert (await status_of(channel, request, timeout=left_s))[0] == grpc.StatusCode.DEADLINE_EXCEEDED
    await dispatcher.until_running(0)


async def test_a_thousand_calls_begun_and_reset_leave_nothing(
    channel: grpc.aio.Channel, dispatcher: ScriptedDispatcher, text_model: TextModel
) -> None:
    a = text_model.encode_now("a", add_special_tokens=False)
    dispatcher.script = lambda request: [tokens(*a), asyncio.Event()]
    stub = inference_pb2_grpc.InferenceStub(channel)
    for _ in range(10):
        calls = [stub.Generate(inference_pb2.GenerateRequest(text="x")) for _ in range(100)]
        await asyncio.sleep(0.01)
        for call in calls:
            call.cancel()
    await dispatcher.until_running(0)


async def test_a_client_that_reads_nothing_is_not_waited_for() -> None:
    class Full:
        """As gRPC's context while the client's window is full."""

        async def write(self, message: object) -> None:
            await asyncio.Event().wait()

    context: Any = Full()
    with pytest.raises(CancelledByClientError, match=r"limits\.write_timeout_s"):
        await write_within(context, b"", 0.01)


@asynccontextmanager
async def connected(faces: Faces) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(*faces.grpc.rsplit(":", 1))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def frame(kind: int, flags: int, stream: int, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + content


HOSTILE_BYTES = {
    "garbage": b"\0\xff" * 2000,
    "HTTP/1.1": b"POST / HTTP/1.1\r\nHost: x\r\n\r\n",
    "a frame too large": PREFACE + SETTINGS + frame(0, 0, 1)[:0] + b"\xff\xff\xff\x00\x00" + struct.pack(">I", 1),
    "data without headers": PREFACE + SETTINGS + frame(0, 1, 1, b"x"),
    "headers that are none": PREFACE + SETTINGS + frame(1, 4, 1, b"\xff\xff\xff\xff\xff\x0f"),
    "continuations without end": PREFACE + SETTINGS + frame(1, 0, 1, b"") + frame(9, 0, 1, b"") * 5000,
    "a flood of settings": PREFACE + SETTINGS * 20_000,
    "a flood of pings": PREFACE + SETTINGS + frame(6, 0, 0, b"12345678") * 20_000,
    "a flood of resets": PREFACE + SETTINGS + frame(3, 0, 1, b"\0\0\0\x08") * 20_000,
    "a window too large": PREFACE + SETTINGS + frame(8, 0, 0, b"\x7f\xff\xff\xff") * 2,
}


async def test_bytes_that_are_no_calls_end_their_connection_and_nothing_else(faces: Faces) -> None:
    for content in HOSTILE_BYTES.values():
        async with connected(faces) as (reader, writer):
            writer.write(content)
            try:
                async with asyncio.timeout(0.3):
                    await reader.read(-1)
            except (TimeoutError, ConnectionError):
                pass  # it may also just be ignored: no call came of it


async def test_more_connections_than_the_limit_are_closed(faces: Faces) -> None:
    opened = [await asyncio.open_connection(*faces.grpc.rsplit(":", 1)) for _ in range(40)]
    for _, writer in opened:
        writer.write(PREFACE + SETTINGS)

    async def closed(reader: asyncio.StreamReader) -> bool:
        try:
            async with asyncio.timeout(0.5):
                while await reader.read(1 << 16):
                    pass
        except TimeoutError:
            return False
        except ConnectionError:
            return True
        return True

    gone = await asyncio.gather(*(closed(reader) for reader, _ in opened))
    for _, writer in opened:
        writer.transport.abort()
    assert 20 <= sum(gone) <= 26
